"""What a GPU gives: the step and the training update of an NTM, against the batch. Keras on JAX, beside PyTorch.

    KERAS_BACKEND=jax python benchmarks/gpu.py [PART...] [--seconds 0.5] [--json FILE]

Parts, each in a process of its own, so that one that fails takes no other with it:

- ``limits``: what the device copies and multiplies at best; everything else is to be read beside that.
- ``step``: a call of 1 and of 16 time steps on batches of 1 to 16,384 sequences, whose states stay on the device and go
  from call to call; as it comes, and with all matrix products in full float32. A call's latency has the input on its
  way in and the output on its way out, the throughput not: calls follow each other on the device. What was computed is
  compared with the same network on the host's CPU.
- ``kernels``: how often the compiled time loop starts a kernel in a time step.
- ``update``: updates as ``training/train.py`` makes them, many in a call, against the batch.
- ``peer``: the same update of a batched NTM in PyTorch (``torch_ntm.py``) on the same device.

The network is the paper's: a memory of 128 x 20, an LSTM controller of 100, one read and one write head, 10 values in
and 8 out. Without a GPU it runs on the CPU, and says so.
"""

import argparse
import collections
import functools
import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
BATCHES = (1, 4, 16, 64, 256, 1024, 4096, 16384)
TIMES = (1, 16)
TRAINING_BATCHES = (16, 32, 256, 2048)
PRECISIONS = ("default", "highest")


def main():
    options = parse_options()
    if options.child:
        print(json.dumps(PARTS[options.child](options)), flush=True)
        return 0
    results, failed = {"packages": packages()}, []
    for part in options.parts or PARTS:
        begin = time.monotonic()
        results[part] = run_part(part, options)
        if results[part] is None:
            failed.append(part)
        print(f"-- {part}: {time.monotonic() - begin:.0f} s", flush=True)
        if options.json:  # After each part: a run that is cut off leaves what it has.
            options.json.write_text(json.dumps(results, indent=2) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement (default: %(default)s)")
    parser.add_argument("--largest", type=int, default=BATCHES[-1], help="batch (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="writes what was measured")
    parser.add_argument("--hlo", type=Path, help="writes the compiled step, for whoever looks at its kernels")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"expected parts out of {', '.join(PARTS)}; received {', '.join(sorted(unknown))}")
    return options


def packages():
    """Versions of what matters."""
    names = ("keras", "jax", "jaxlib", "torch", "numpy")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def run_part(part, options):
    """The part's record, or None if it failed; what it prints goes through."""
    arguments = [sys.executable, __file__, "--child", part, "--seconds", str(options.seconds)]
    arguments += ["--largest", str(options.largest), *(["--hlo", options.hlo] if options.hlo else [])]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if not line.startswith("{"):
                print(line, end="", flush=True)
    return json.loads(lines[-1]) if process.returncode == 0 else None


def limits(options):
    """Bytes a second of a copy, counting those read and those written, and FLOP a second of a product."""
    import jax
    from jax import numpy as jnp

    on_gpu = jax.default_backend() == "gpu"
    many = jnp.ones((256 if on_gpu else 16) * 2**20, jnp.float32)
    size = 8192 if on_gpu else 1024
    matrix, factor = jax.random.normal(jax.random.key(0), (2, size, size), jnp.float32)
    factor /= size**0.5  # so that products of products keep their size: zeros are multiplied faster
    copy_s = seconds_a_call(jax.jit(lambda x: x + 1), many, options.seconds)
    record = {"device": jax.devices()[0].device_kind, "copy_gb_per_s": 2 * many.nbytes / copy_s / 1e9}
    for precision in PRECISIONS:
        with jax.default_matmul_precision(None if precision == "default" else precision):
            product = functools.partial(jax.jit(jnp.matmul), factor)
            product_s = seconds_a_call(product, matrix, options.seconds)
        record[f"product_tflop_per_s_{precision}"] = 2 * size**3 / product_s / 1e12
    print("  ".join(f"{name} {value:,.0f}" if name != "device" else value for name, value in record.items()))
    return record


def seconds_a_call(function, value, seconds):
    """Of calls that follow each other, each taking what the one before gave."""
    function(value).block_until_ready()
    took = []
    for _ in range(3):
        count, begin, now = 0, time.perf_counter(), value
        while time.perf_counter() - begin < seconds / 3:
            for _ in range(4):
                now = function(now)
            now.block_until_ready()
            count += 4
        took.append((time.perf_counter() - begin) / count)
    return min(took)


class Stepper:
    """The layer as a compiled function of inputs and state, on a device of JAX."""

    def __init__(self, device=None, precision=None):
        import jax
        import keras
        from training_speed import build

        keras.utils.set_random_seed(0)
        model = build("sigmoid")
        self.layer, self.device, self.precision = model.layers[-1], device, precision
        self.layer.return_state = True
        self.state_size = self.layer.cell.state_size
        # Weights away from where they begin: heads that write and move.
        generator = np.random.default_rng(1)
        weights = [
            np.asarray(weight.value) + 0.1 * generator.standard_normal(weight.shape).astype("float32")
            for weight in self.layer.trainable_variables
        ]
        self.weights = jax.device_put(weights, device)
        self.others = jax.device_put([variable.value for variable in self.layer.non_trainable_variables], device)
        self.step = jax.jit(self._step, donate_argnums=1)

    def _step(self, weights, state, inputs):
        import jax

        with jax.default_matmul_precision(self.precision):
            (outputs, *state), _ = self.layer.stateless_call(weights, self.others, inputs, initial_state=list(state))
        return outputs, state

    def first_state(self, batch):
        """Random memories and weightings: what is on the way costs the same whatever it is, but not if it is NaN."""
        import jax

        generator, state = np.random.default_rng(2), []
        for name, shape, _axes in self.layer.cell.state_layout:
            values = generator.standard_normal((batch, *shape)).astype("float32") * 0.1
            if "weightings" in name:
                values = np.exp(20 * values)
                values /= values.sum(-1, keepdims=True)
            state.append(jax.device_put(values.reshape(batch, -1), self.device))
        return state


def step(options):
    """Time steps a second and milliseconds a call, for each batch, length and precision; how far off it is."""
    import jax

    inputs = {
        (batch, length): np.random.default_rng(3).random((batch, length, 10), np.float32)
        for batch in BATCHES
        if batch <= options.largest
        for length in TIMES
    }
    rows, records = [], {}
    for precision in PRECISIONS:
        stepper = Stepper(precision=None if precision == "default" else precision)
        error = off_by(stepper)
        print(f"{precision}: outputs off by {error:.1e} of their norm from the host's CPU, after 64 time steps")
        for (batch, length), array in inputs.items():
            if precision != "default" and length != TIMES[-1]:
                continue
            compile_s, call_s, latency_s = timed(stepper, array, options.seconds)
            rate = batch * length / call_s
            rows.append({"precision": precision, "batch": batch, "time": length, "steps_per_s": rate})
            rows[-1] |= {"call_ms": 1e3 * call_s, "latency_ms": 1e3 * latency_s, "compile_s": compile_s}
            # The least that a time step can move: every state read once and written once.
            rows[-1]["state_gb_per_s"] = 2 * 4 * sum(stepper.state_size) * rate / 1e9
            text = f"{rate:14,.0f} steps/s, {1e3 * call_s:8.3f} ms a call, {1e3 * latency_s:8.3f} with in and out"
            print(f"{precision:8} batch {batch:6} x {length:2}: {text}, compiled in {compile_s:.1f} s", flush=True)
        records[f"off_{precision}"] = error
    return {"device": jax.devices()[0].device_kind, "rows": rows, **records}


def timed(stepper, array, seconds):
    """Seconds to compile; of a call among calls that follow each other; of one with the input in and the output out."""
    import jax

    state, on_device = stepper.first_state(len(array)), jax.device_put(array, stepper.device)
    begin = time.perf_counter()
    outputs, state = stepper.step(stepper.weights, state, on_device)
    outputs.block_until_ready()
    compile_s = time.perf_counter() - begin
    took = []
    for _ in range(3):
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds / 3:
            for _ in range(10):
                outputs, state = stepper.step(stepper.weights, state, on_device)
            outputs.block_until_ready()
            count += 10
        took.append((time.perf_counter() - begin) / count)
    latencies, end = [], time.perf_counter() + seconds / 2
    while time.perf_counter() < end or len(latencies) < 5:
        begin = time.perf_counter()
        outputs, state = stepper.step(stepper.weights, state, array)
        assert np.isfinite(np.asarray(outputs)).all()
        latencies.append(time.perf_counter() - begin)
    return compile_s, statistics.median(took), statistics.median(latencies)


def off_by(stepper):
    """The norm of the difference to the host's CPU over the norm there, of the last outputs after four calls of 16."""
    import jax

    reference = Stepper(device=jax.devices("cpu")[0], precision="highest")
    given, ends = np.random.default_rng(4).random((4, 64, 16, 10), np.float32), []
    for each in (stepper, reference):
        state = each.first_state(64)
        for array in given:
            outputs, state = each.step(each.weights, state, jax.device_put(array, each.device))
        ends.append(np.asarray(outputs, np.float64))
    return float(np.linalg.norm(ends[0] - ends[1]) / np.linalg.norm(ends[1]))


def kernels(options):
    """Instructions of the time loop's body that are a kernel or a call of a library, by kind."""
    stepper = Stepper()
    state = stepper.first_state(256)
    lowered = stepper.step.lower(stepper.weights, state, np.zeros((256, 16, 10), np.float32))
    text = lowered.compile().as_text()
    if options.hlo:
        options.hlo.write_text(text)
    bodies = re.findall(r"while\(.*body=%?([\w.\-]+)", text)
    counts = collections.Counter()
    for body in bodies:
        found = re.search(rf"^%?{re.escape(body)} .*?^}}", text, re.MULTILINE | re.DOTALL)
        for line in found.group().splitlines() if found else ():
            kind = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = .*? ([a-z\-]+)\(", line)
            if kind and kind.group(1) in ("fusion", "custom-call", "dot", "copy", "reduce", "transpose", "call"):
                counts[kind.group(1)] += 1
    print(f"in the time loop: {dict(counts)}")
    return {"in_time_loop": dict(counts)}


def update(options):
    """Milliseconds of an update as the trainer makes them, and sequences a second."""
    import jax
    import training_speed

    rows = []
    for batch in TRAINING_BATCHES:
        if batch > options.largest:
            continue
        training_speed.BATCH = batch
        run = training_speed.trainer_step(1)
        ms = median_ms(run, options.seconds) / training_speed.CHUNK
        rows.append({"batch": batch, "update_ms": ms, "sequences_per_s": 1e3 * batch / ms})
        print(f"update of {batch:5}: {ms:8.2f} ms, {1e3 * batch / ms:10,.0f} sequences/s", flush=True)
    return {"device": jax.devices()[0].device_kind, "rows": rows}


def peer(options):
    """The same of PyTorch, eager, with the model and the batch on the GPU."""
    import torch
    import training_speed
    from torch.nn import functional
    from torch_ntm import TorchNTM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for batch in TRAINING_BATCHES:
        if batch > options.largest:
            continue
        training_speed.BATCH = batch
        model = TorchNTM(10, 8).to(device)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        inputs, targets = (torch.tensor(array, device=device) for array in training_speed.batch())

        def run(model=model, optimizer=optimizer, inputs=inputs, targets=targets):
            optimizer.zero_grad()
            loss = functional.binary_cross_entropy_with_logits(model(inputs), targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            return loss.item()

        ms = median_ms(run, options.seconds)
        rows.append({"batch": batch, "update_ms": ms, "sequences_per_s": 1e3 * batch / ms})
        print(f"PyTorch update of {batch:5}: {ms:8.2f} ms, {1e3 * batch / ms:10,.0f} sequences/s", flush=True)
    return {"device": device, "rows": rows}


def median_ms(run, seconds):
    """Of a call that waits for its result."""
    for _ in range(2):
        run()
    took, end = [], time.perf_counter() + 2 * seconds
    while time.perf_counter() < end or len(took) < 3:
        begin = time.perf_counter()
        assert np.isfinite(run())
        took.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(took)


PARTS = {"limits": limits, "step": step, "kernels": kernels, "update": update, "peer": peer}


if __name__ == "__main__":
    sys.exit(main())
