import json
import subprocess
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from tensorflow_serving.apis import prediction_log_pb2

from ntm import NeuralTuringMachine
from service.types import StepBatch, StepBatchResult
from tests.service.executors import stepping
from tests.training import backends, zoo
from training.export import ExportError, export_model
from training.exporting.description import describe
from training.exporting.stages import stages_of


class Exported:
    """An exported version, loaded again, beside the model that it came from."""

    def __init__(self, model, path: Path) -> None:
        self.model = model
        self.path = path
        self._loaded = tf.saved_model.load(str(path))
        self.signatures = self._loaded.signatures
        self.description = json.loads(self.signatures["describe"]()["config"].numpy())

    def step(self, batch: StepBatch) -> StepBatchResult:
        fields = {name: tf.constant(getattr(batch, name)) for name in ("inputs", "lengths", "reset", "state")}
        result = self.signatures["step"](**fields)
        return StepBatchResult(result["outputs"].numpy(), result["state"].numpy())

    def whole(self, inputs):
        return self.signatures["serving_default"](inputs=tf.constant(inputs))["outputs"].numpy()


@pytest.fixture(scope="module", params=zoo.KINDS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model = zoo.make(request.param)
    directory = tmp_path_factory.mktemp("models")
    return Exported(model, export_model(model, directory, name=request.param, task="noise", provenance={"steps": 3}))


def test_stepped_anyhow_is_the_whole_sequence_and_a_fault_shows(exported: Exported) -> None:
    sequences = stepping.random_sequences(9, 40, zoo.INPUT_DIM)
    wanted = [exported.whole(sequence[None])[0] for sequence in sequences]
    limit = stepping.tolerance(exported.whole, zoo.INPUT_DIM)
    state_size = exported.description["state_size"]
    for seed in range(3):
        came = stepping.run(exported.step, stepping.batches(sequences, state_size, seed))
        assert stepping.difference(came, wanted) <= limit
    for fault in stepping.FAULTS:
        came = stepping.run(exported.step, stepping.batches(sequences, state_size, fault=fault))
        assert stepping.difference(came, wanted) > 100 * limit, fault


def test_serving_default_is_the_model(exported: Exported) -> None:
    inputs = np.random.default_rng(1).normal(size=(3, 17, zoo.INPUT_DIM)).astype(np.float32)
    wanted = ops.convert_to_numpy(exported.model(inputs, training=False))
    np.testing.assert_allclose(exported.whole(inputs), wanted, rtol=0, atol=1e-5)


def test_no_time_steps_give_the_first_state_or_the_same_one(exported: Exported) -> None:
    size = exported.description["state_size"]
    state = np.random.default_rng(2).normal(size=(2, size)).astype(np.float32)
    nothing = np.zeros((2, 3, zoo.INPUT_DIM), np.float32), np.zeros(2, np.int32)
    result = exported.step(StepBatch(*nothing, reset=np.array([True, False]), state=state))
    first = np.concatenate(
        [
            np.reshape(ops.convert_to_numpy(part), -1)
            for stage in stages_of(exported.model)
            for part in stage.initial_state()
        ]
    )
    np.testing.assert_array_equal(result.state, np.stack([first, state[1]]))
    assert not result.outputs.any()


def test_lengths_past_the_inputs_stop_at_their_end(exported: Exported) -> None:
    inputs = np.random.default_rng(3).normal(size=(1, 4, zoo.INPUT_DIM)).astype(np.float32)
    state = np.zeros((1, exported.description["state_size"]), np.float32)
    result = exported.step(StepBatch(inputs, np.array([9], np.int32), np.array([True]), state))
    np.testing.assert_allclose(result.outputs, exported.whole(inputs), rtol=0, atol=1e-5)


def test_describes_itself(exported: Exported) -> None:
    description = exported.description
    layout = description["state_layout"]
    assert description["model"] == exported.model.name
    assert (description["input_dim"], description["output_dim"]) == (
        exported.model.input_shape[-1],
        exported.model.output_shape[-1],
    )
    assert (description["task"], description["provenance"]) == ("noise", {"steps": 3})
    assert len({part["name"] for part in layout}) == len(layout)
    assert [part["offset"] for part in layout] == [
        sum(np.prod(p["shape"]) for p in layout[:i]) for i in range(len(layout))
    ]
    assert sum(np.prod(part["shape"]) for part in layout) == description["state_size"]
    assert all(len(part["axes"]) in (0, len(part["shape"])) for part in layout)
    rebuilt = keras.models.model_from_json(json.dumps(description["keras_config"]))
    assert [type(layer) for layer in rebuilt.layers] == [type(layer) for layer in exported.model.layers]
    manifest = json.loads((exported.path / "assets.extra" / "manifest.json").read_text())
    assert manifest.items() >= description.items()
    assert manifest["keras_version"] == keras.__version__


def test_the_layout_names_what_stands_in_the_row(tmp_path: Path) -> None:
    model = zoo.make("ntm-lstm-heads")
    exported = Exported(model, export_model(model, tmp_path, name="m"))
    inputs = np.random.default_rng(4).normal(size=(2, 5, zoo.INPUT_DIM)).astype(np.float32)
    zeros = np.zeros((2, exported.description["state_size"]), np.float32)
    row = exported.step(StepBatch(inputs, np.full(2, 5, np.int32), np.ones(2, np.bool_), zeros)).state
    layer = model.layers[0]
    layer.return_state = True
    _, *states = layer(inputs)
    layout = exported.description["state_layout"]
    assert [part["name"] for part in layout][:4] == ["memory", "read_vectors", "read_weightings", "write_weightings"]
    for part, state in zip(layout, states, strict=True):
        end = part["offset"] + int(np.prod(part["shape"]))
        np.testing.assert_allclose(row[:, part["offset"] : end], ops.convert_to_numpy(state), rtol=0, atol=1e-5)
    weightings = row[:, layout[2]["offset"] : layout[3]["offset"]].reshape(2, *layout[2]["shape"])
    np.testing.assert_allclose(weightings.sum(axis=-1), 1, rtol=1e-5)


def test_one_loop_of_operations_that_a_gpu_has_too(exported: Exported) -> None:
    from tensorflow.python.framework.kernels import get_registered_kernels_for_op

    functions = exported.signatures["step"].graph.as_graph_def()
    nodes = [*functions.node, *(node for function in functions.library.function for node in function.node_def)]
    assert sum(node.op in ("While", "StatelessWhile") for node in nodes) == 1
    assert not {node.device for node in nodes} - {""}
    # Structure and constants, which TensorFlow places by itself.
    placed = {"Arg", "Retval", "NoOp", "While", "StatelessWhile", "PartitionedCall", "StatefulPartitionedCall"}
    for op in {node.op for node in nodes} - placed:
        devices = {kernel.device_type for kernel in get_registered_kernels_for_op(op).kernel}
        assert "GPU" in devices or "DEFAULT" in devices, op


def test_warmup_requests_fit_the_signature(exported: Exported) -> None:
    file = exported.path / "assets.extra" / "tf_serving_warmup_requests"
    shapes = set()
    for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
        request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
        assert request.model_spec.name == exported.model.name
        assert request.model_spec.signature_name == "step"
        fields = {name: tf.make_ndarray(tensor) for name, tensor in request.inputs.items()}
        shapes.add(fields["inputs"].shape[:2])
        if fields["inputs"].shape[0] <= 2:
            assert np.isfinite(exported.step(StepBatch(**fields)).outputs).all()
    assert shapes == {(1 << power, steps) for power in range(9) for steps in (1, 16)}


class TestPublication:
    def test_takes_the_next_version_and_leaves_nothing_else(self, tmp_path: Path) -> None:
        model = zoo.make("lstm")
        (tmp_path / "m" / "not-a-version").mkdir(parents=True)
        assert export_model(model, tmp_path, name="m") == tmp_path / "m" / "1"
        assert export_model(model, str(tmp_path), name="m", version=10) == tmp_path / "m" / "10"
        assert export_model(model, tmp_path, name="m") == tmp_path / "m" / "11"
        assert {child.name for child in (tmp_path / "m").iterdir()} == {"not-a-version", "1", "10", "11"}
        assert (tmp_path / "m" / "1").stat().st_mode & 0o777 == tmp_path.joinpath("m").stat().st_mode & 0o777

    def test_never_overwrites(self, tmp_path: Path) -> None:
        path = export_model(zoo.make("lstm"), tmp_path, name="m")
        before = (path / "saved_model.pb").read_bytes()
        with pytest.raises(FileExistsError, match="never overwritten"):
            export_model(zoo.make("gru"), tmp_path, name="m", version=1)
        assert (path / "saved_model.pb").read_bytes() == before

    def test_a_failure_leaves_nothing(self, tmp_path: Path) -> None:
        model = zoo.make("lstm")
        model.save = lambda path: (_ for _ in ()).throw(OSError("disk full"))
        with pytest.raises(OSError, match="disk full"):
            export_model(model, tmp_path, name="m")
        assert not list((tmp_path / "m").iterdir())

    @pytest.mark.parametrize("name", ["", "a/b", "..", "m" * 65, "ü"])
    def test_refuses_names_that_are_not_served(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ValueError, match="expected a model name"):
            export_model(zoo.make("lstm"), tmp_path, name=name)

    def test_refuses_version_zero_and_what_json_cannot_hold(self, tmp_path: Path) -> None:
        model = zoo.make("lstm")
        with pytest.raises(ValueError, match="at least 1; got 0"):
            export_model(model, tmp_path, name="m", version=0)
        with pytest.raises(ValueError, match="JSON"):
            export_model(model, tmp_path, name="m", provenance={"loss": float("nan")})
        assert not list(tmp_path.iterdir())


class TestFingerprint:
    @staticmethod
    def of(model, **options) -> str:
        stages = stages_of(model)
        components = [part for stage in stages for part in stage.components]
        return describe(model, components, **{"name": "m", "task": "", "provenance": None, **options})["fingerprint"]

    def test_tells_models_apart_and_nothing_else(self, tmp_path: Path) -> None:
        model = zoo.make("mixed-ntm-lstm")
        first = self.of(model)
        assert len(first) == 64
        assert self.of(model, name="other", task="copy", provenance={"a": 1}) == first
        model.save(tmp_path / "m.keras")
        assert self.of(keras.saving.load_model(tmp_path / "m.keras")) == first
        model.compile("adam", "mse")
        assert self.of(model) == first
        assert self.of(zoo.make("mixed-ntm-lstm", seed=8)) != first
        weight = model.weights[-1]
        values = weight.numpy()
        values.flat[0] = np.nextafter(values.flat[0], np.inf)
        weight.assign(values)
        assert self.of(model) != first

    def test_an_activation_counts_too(self) -> None:
        def model(activation):
            gru = layers.GRU(3, activation, return_sequences=True, name="gru")
            built = keras.Sequential([keras.Input((None, 2), name="inputs"), gru], name="m")
            zoo.randomize(built)
            return built

        assert self.of(model("tanh")) == self.of(model("tanh"))
        assert self.of(model("tanh")) != self.of(model("relu"))

    def test_what_a_stateful_layer_has_seen_does_not_count(self) -> None:
        layer = layers.LSTM(3, return_sequences=True, stateful=True)
        model = keras.Sequential([keras.Input((None, 2), batch_size=2), layer])
        first = self.of(model)
        model(np.ones((2, 3, 2), np.float32))
        assert np.any(layer.states[0].numpy())
        assert self.of(model) == first


class _SeesTime(layers.Layer):
    def call(self, inputs):
        return ops.cumsum(inputs, axis=1)


class _Scales(layers.Layer):
    def call(self, inputs):
        return 2 * inputs

    def compute_output_shape(self, shape):
        return shape


class _LooksAhead(layers.LSTM):
    def call(self, sequences, initial_state=None, mask=None, training=False):
        return super().call(ops.flip(sequences, axis=1), initial_state, mask, training)


def _lstm(**options):
    return layers.LSTM(3, **{"return_sequences": True, **options})


def _model(*chain):
    return keras.Sequential([keras.Input((None, 2)), *chain])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: _model(layers.Bidirectional(_lstm())), "Bidirectional.*from its end"),
        (lambda: _model(_lstm(go_backwards=True)), "go_backwards"),
        (lambda: _model(_lstm(return_sequences=False)), "return_sequences|inputs|outputs"),
        (lambda: _model(_lstm(), layers.Conv1D(3, 2, padding="causal")), "Conv1D.*other time steps"),
        (lambda: _model(_lstm(), layers.Lambda(lambda x: x)), "Lambda"),
        (lambda: _model(_lstm(), _SeesTime()), "wrap it in keras.layers.TimeDistributed"),
        (lambda: _model(_lstm(), layers.Softmax(axis=1)), "along axis 1"),
        (lambda: _model(layers.Masking(), _lstm()), "Masking.*only a length"),
        (lambda: _model(_LooksAhead(3, return_sequences=True)), "does not give what the model gives"),
        (lambda: _model(layers.Dense(3)), "no recurrent layer"),
        (lambda: _model(_lstm(dtype="float64")), "do not fit into float32"),
        (lambda: keras.Sequential([layers.Embedding(5, 3), _lstm()]), "no shapes yet|cannot be stepped"),
        (lambda: keras.Sequential([keras.Input((None,)), layers.Embedding(5, 3), _lstm()]), "shape|Embedding"),
        (
            lambda: keras.Sequential([keras.Input((None, 4, 4, 1)), layers.ConvLSTM2D(2, 2, return_sequences=True)]),
            "images",
        ),
        (lambda: keras.Model(x := keras.Input((None, 2)), _lstm()(x)), "expected a keras.Sequential; got Functional"),
    ],
)
def test_refuses_what_cannot_be_stepped_and_says_why(tmp_path: Path, make, why: str) -> None:
    with pytest.raises(ExportError, match=why):
        export_model(make(), tmp_path, name="m")
    assert not list(tmp_path.rglob("*.pb"))


def test_attention_is_refused_inside_a_chain_of_one_input() -> None:
    class SelfAttention(layers.MultiHeadAttention):
        def call(self, inputs, **options):
            return super().call(inputs, inputs, **options)

        def build(self, shape):
            super().build(shape, shape)

        def compute_output_shape(self, shape):
            return shape

        def compute_output_spec(self, inputs, **options):
            return keras.KerasTensor(inputs.shape, inputs.dtype)

    with pytest.raises(ExportError, match=r"SelfAttention.*other time steps"):
        stages_of(_model(_lstm(), SelfAttention(1, 2)))


def test_a_layer_of_the_users_own_is_taken_where_time_distributed_vouches_for_it(tmp_path: Path) -> None:
    model = _model(_lstm(), layers.TimeDistributed(_Scales()))
    inputs = np.random.default_rng(5).normal(size=(2, 6, 2)).astype(np.float32)
    exported = Exported(model, export_model(model, tmp_path, name="m"))
    np.testing.assert_allclose(exported.whole(inputs), ops.convert_to_numpy(model(inputs)), rtol=0, atol=1e-6)


def test_a_stateful_layer_is_exported_from_its_first_state_and_left_as_it_was(tmp_path: Path) -> None:
    layer = NeuralTuringMachine(2, 5, 4, controller_units=3, return_sequences=True, stateful=True, batch_size=2)
    model = keras.Sequential([keras.Input((None, 2), batch_size=2), layer])
    inputs = np.random.default_rng(6).normal(size=(2, 6, 2)).astype(np.float32)
    wanted = ops.convert_to_numpy(model(inputs))
    before = [state.numpy() for state in layer.states]
    exported = Exported(model, export_model(model, tmp_path, name="m"))
    np.testing.assert_allclose(exported.whole(inputs), wanted, rtol=0, atol=1e-5)
    for state, value in zip(layer.states, before, strict=True):
        np.testing.assert_array_equal(state.numpy(), value)


def test_half_precision_is_stepped_in_half_precision(tmp_path: Path) -> None:
    policy = keras.DTypePolicy("mixed_float16")
    model = keras.Sequential([keras.Input((None, 2)), _lstm(dtype=policy), layers.Dense(2, dtype=policy)])
    inputs = np.random.default_rng(7).normal(size=(2, 6, 2)).astype(np.float32)
    exported = Exported(model, export_model(model, tmp_path, name="m"))
    outputs = exported.whole(inputs)
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, ops.convert_to_numpy(model(inputs)), rtol=0, atol=2e-3)


_ELSEWHERE = """
import sys
import keras, numpy as np
from keras import ops
from tests.training import zoo
model = zoo.make("mixed-ntm-lstm")
model.save(sys.argv[1] + "/m.keras")
inputs = np.random.default_rng(8).normal(size=(2, 9, zoo.INPUT_DIM)).astype(np.float32)
outputs = ops.convert_to_numpy(model(inputs))
np.savez(sys.argv[1] + "/expected.npz", inputs=inputs, outputs=outputs)
"""


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_model_of_another_backend_is_saved_there_and_exported_here(tmp_path: Path, backend: str) -> None:
    command = [backends.python_with(backend), "-c", _ELSEWHERE, str(tmp_path)]
    subprocess.run(command, env=backends.environment(backend), capture_output=True, timeout=200, check=True)
    model = keras.saving.load_model(tmp_path / "m.keras")
    exported = Exported(model, export_model(model, tmp_path, name="m"))
    with np.load(tmp_path / "expected.npz") as expected:
        np.testing.assert_allclose(exported.whole(expected["inputs"]), expected["outputs"], rtol=0, atol=1e-5)


def test_another_backend_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match=r"Save the model as \.keras"):
        export_model(zoo.make("lstm"), tmp_path, name="m")
