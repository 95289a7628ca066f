// The yardstick: one NTM step (LSTM controller of 100, one read and one write head, memory of 128 slots x 20) in
// straightforward C++, on two threads, states in and out as the executor has them. Random weights: the arithmetic is
// what counts. Checked against the Keras layer by benchmarks/yardstick.py, which also builds and runs it.
//
// g++ -std=c++20 -O3 -march=native -ffast-math -pthread yardstick.cc -o yardstick; ./yardstick BATCH STEPS SECONDS [THREADS]
// With a fifth argument it reads weights, inputs and states from that file and writes outputs and states beside it.

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

constexpr int kIn = 10, kOut = 8, kSlots = 128, kDepth = 20, kUnits = 100, kShifts = 3;
constexpr int kRead = kDepth + kShifts + 3;       // key, strength, gate, shifts, gamma
constexpr int kWrite = kRead + 2 * kDepth;        // and erase, add
constexpr int kParams = kRead + kWrite;
constexpr int kController = kIn + kDepth;
// Where each part of the flat state row stands.
constexpr int kMemory = 0, kReads = kSlots * kDepth, kReadW = kReads + kDepth, kWriteW = kReadW + kSlots,
              kHidden = kWriteW + kSlots, kCarry = kHidden + kUnits, kState = kCarry + kUnits;

struct Weights {
  float kernel[kController][4 * kUnits], recurrent[kUnits][4 * kUnits], bias[4 * kUnits];
  float params[kUnits][kParams], params_bias[kParams];
  float output[kUnits + kDepth][kOut], output_bias[kOut];
};

static float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }
static float softplus(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }

template <int N>
static void softmax(float* x) {
  float top = x[0], sum = 0;
  for (int i = 1; i < N; ++i) top = std::max(top, x[i]);
  for (int i = 0; i < N; ++i) sum += x[i] = std::exp(x[i] - top);
  for (int i = 0; i < N; ++i) x[i] /= sum;
}

template <int Rows, int Cols>
static void affine(const float* x, const float (&w)[Rows][Cols], float* y) {
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Cols; ++j) y[j] += x[i] * w[i][j];
}

// One head's addressing. p: key, strength, gate, shifts, gamma (before their activations). w: in, out.
static void address(const float* memory, const float* norms, const float* p, float* w) {
  float key[kDepth], shifts[kShifts], content[kSlots] = {}, gated[kSlots];
  float square = 0;
  for (int d = 0; d < kDepth; ++d) key[d] = std::tanh(p[d]), square += key[d] * key[d];
  const float scale = softplus(p[kDepth]) / std::sqrt(square + 1e-12f), gate = sigmoid(p[kDepth + 1]);
  for (int s = 0; s < kShifts; ++s) shifts[s] = p[kDepth + 2 + s];
  softmax<kShifts>(shifts);
  const float gamma = 1.0f + softplus(p[kDepth + 2 + kShifts]);
  for (int d = 0; d < kDepth; ++d)
    for (int n = 0; n < kSlots; ++n) content[n] += key[d] * memory[d * kSlots + n];
  for (int n = 0; n < kSlots; ++n) content[n] *= scale / std::sqrt(norms[n] + 1e-12f);
  softmax<kSlots>(content);
  for (int n = 0; n < kSlots; ++n) gated[n] = gate * content[n] + (1 - gate) * w[n];
  for (int n = 0; n < kSlots; ++n) {
    const int before = (n + kSlots - 1) % kSlots, after = (n + 1) % kSlots;
    const float shifted = shifts[0] * gated[after] + shifts[1] * gated[n] + shifts[2] * gated[before];
    w[n] = gamma * std::log(std::max(shifted, 1e-20f));
  }
  softmax<kSlots>(w);
}

static void step(const Weights& k, const float* input, float* state, float* output) {
  float *memory = state + kMemory, *reads = state + kReads, *hidden = state + kHidden, *carry = state + kCarry;
  float gates[4 * kUnits], p[kParams], norms[kSlots] = {};
  std::memcpy(gates, k.bias, sizeof gates);
  float both[kController];
  std::memcpy(both, input, kIn * sizeof(float));
  std::memcpy(both + kIn, reads, kDepth * sizeof(float));
  affine<kController, 4 * kUnits>(both, k.kernel, gates);
  affine<kUnits, 4 * kUnits>(hidden, k.recurrent, gates);
  for (int u = 0; u < kUnits; ++u) {
    carry[u] = sigmoid(gates[kUnits + u]) * carry[u] + sigmoid(gates[u]) * std::tanh(gates[2 * kUnits + u]);
    hidden[u] = sigmoid(gates[3 * kUnits + u]) * std::tanh(carry[u]);
  }
  std::memcpy(p, k.params_bias, sizeof p);
  affine<kUnits, kParams>(hidden, k.params, p);
  for (int d = 0; d < kDepth; ++d)
    for (int n = 0; n < kSlots; ++n) norms[n] += memory[d * kSlots + n] * memory[d * kSlots + n];
  address(memory, norms, p, state + kReadW);
  address(memory, norms, p + kRead, state + kWriteW);
  const float *read = state + kReadW, *write = state + kWriteW, *erase = p + 2 * kRead, *add = erase + kDepth;
  for (int d = 0; d < kDepth; ++d) {
    const float e = sigmoid(erase[d]), a = std::tanh(add[d]);
    float sum = 0;
    for (int n = 0; n < kSlots; ++n) {
      float& m = memory[d * kSlots + n];
      m = m * (1 - write[n] * e) + write[n] * a;
      sum += read[n] * m;
    }
    reads[d] = sum;
  }
  float y[kOut];
  std::memcpy(y, k.output_bias, sizeof y);
  float seen[kUnits + kDepth];
  std::memcpy(seen, hidden, kUnits * sizeof(float));
  std::memcpy(seen + kUnits, reads, kDepth * sizeof(float));
  affine<kUnits + kDepth, kOut>(seen, k.output, y);
  for (int o = 0; o < kOut; ++o) output[o] = sigmoid(y[o]);
}

// Rows begin..end of a batch, `steps` each: state in, state out.
static void run(const Weights& k, const float* inputs, const float* in, float* out, float* outputs, int begin, int end,
                int steps) {
  for (int row = begin; row < end; ++row) {
    float* state = out + row * kState;
    std::memcpy(state, in + row * kState, kState * sizeof(float));
    for (int t = 0; t < steps; ++t)
      step(k, inputs + (row * steps + t) * kIn, state, outputs + (row * steps + t) * kOut);
  }
}

static void fill(float* x, size_t count, float scale) {
  static std::mt19937 random(0);
  std::normal_distribution<float> normal(0, scale);
  for (size_t i = 0; i < count; ++i) x[i] = normal(random);
}

int main(int argc, char** argv) {
  if (argc < 4) return std::fprintf(stderr, "usage: yardstick BATCH STEPS SECONDS [THREADS [FILE]]\n"), 2;
  const int batch = std::atoi(argv[1]), steps = std::atoi(argv[2]), threads = argc > 4 ? std::atoi(argv[4]) : 2;
  const double seconds = std::atof(argv[3]);
  auto* k = new Weights;
  std::vector<float> inputs(size_t(batch) * steps * kIn), in(size_t(batch) * kState), out(in.size()),
      outputs(size_t(batch) * steps * kOut);
  if (argc > 5) {
    std::FILE* file = std::fopen(argv[5], "rb");
    bool good = file && std::fread(k, sizeof *k, 1, file) == 1 &&
                std::fread(inputs.data(), sizeof(float), inputs.size(), file) == inputs.size() &&
                std::fread(in.data(), sizeof(float), in.size(), file) == in.size();
    if (!good) return std::fprintf(stderr, "cannot read %s\n", argv[5]), 1;
    std::fclose(file);
    run(*k, inputs.data(), in.data(), out.data(), outputs.data(), 0, batch, steps);
    file = std::fopen((std::string(argv[5]) + ".out").c_str(), "wb");
    std::fwrite(outputs.data(), sizeof(float), outputs.size(), file);
    std::fwrite(out.data(), sizeof(float), out.size(), file);
    std::fclose(file);
    return 0;
  }
  fill(reinterpret_cast<float*>(k), sizeof *k / sizeof(float), 0.1f);
  fill(inputs.data(), inputs.size(), 1);
  fill(in.data(), in.size(), 0.1f);
  for (float& value : in) value = std::abs(value);
  const auto start = std::chrono::steady_clock::now();
  auto passed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  // All threads meet after each call, as the rows of one batch do.
  bool stop = false;
  long calls = 0;
  std::barrier meet(threads, [&]() noexcept { ++calls, stop = passed() >= seconds; });
  auto work = [&](int thread) {
    const int begin = batch * thread / threads, end = batch * (thread + 1) / threads;
    do {
      run(*k, inputs.data(), in.data(), out.data(), outputs.data(), begin, end, steps);
      meet.arrive_and_wait();
    } while (!stop);
  };
  std::vector<std::thread> pool;
  for (int thread = 0; thread < threads; ++thread) pool.emplace_back(work, thread);
  for (auto& thread : pool) thread.join();
  std::printf("%.0f\n", calls * double(batch) * steps / passed());
}
