"""One version of a sequence model (docs/contract.md) in this process: loaded, checked, compiled and run."""

import functools
import gc
import itertools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from service.errors import BadModelOutput, ExecutorUnavailable, ModelLoadError
from service.executors.description import DescriptionError, parse_description
from service.types import (
    ALIGNMENT,
    ModelVersion,
    StepBatch,
    StepBatchResult,
    VersionKey,
    address_of,
    all_finite,
)

_STEP_INPUTS = {"inputs": ("float32", 3), "lengths": ("int32", 1), "reset": ("bool", 1), "state": ("float32", 2)}
_Function: TypeAlias = Callable[..., tuple[Any, Any]]
_FLOAT32 = np.dtype(np.float32)
_STEP_OUTPUTS = {"outputs": ("float32", 3), "state": ("float32", 2)}


def import_tensorflow() -> ModuleType:
    """TensorFlow, quiet and set up to share the machine. It takes seconds: never on the event loop.

    Each step runs on one core, and several of them side by side: for recurrent models that is about twice as many steps
    for a CPU second as spreading the small matrices of one step over the cores (docs/design.md).
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # With oneDNN's operations TensorFlow 2.21 corrupts its heap now and then (docs/design.md, "oneDNN is off").
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    first = "tensorflow" not in sys.modules
    import tensorflow as tf

    if first:
        # Its import makes some 280,000 objects that stay. Looking through them for cycles stops everything, each time,
        # for a tenth of a second and more.
        gc.freeze()
    tf.get_logger().setLevel("ERROR")
    try:
        tf.config.threading.set_intra_op_parallelism_threads(1)
        for device in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(device, True)
    except RuntimeError:
        # TensorFlow is in use in this process already, with settings of its own.
        pass
    return tf  # type: ignore[no-any-return] # TensorFlow publishes no types


class SavedModel:
    """A loaded version. Thread-safe.

    Args:
        key: Which version it is.
        path: Its directory, with ``saved_model.pb`` in it.

    Attributes:
        version: What its ``describe`` signature says.
        on_cpu: Whether it runs on this machine's own processor, so that the time it takes is the calling thread's.

    Raises:
        ModelLoadError: it cannot be loaded, or breaks the contract; the text says where.
    """

    def __init__(self, key: VersionKey, path: Path) -> None:
        self._tf = tf = import_tensorflow()
        self._from_dlpack = tf.experimental.dlpack.from_dlpack
        self.on_cpu = not tf.config.list_logical_devices("GPU")
        try:
            self._loaded = tf.saved_model.load(str(path), tags=["serve"])
        except Exception as error:
            raise ModelLoadError(f"model {key} cannot be loaded from {path}: {_first_line(error)}") from error
        signatures = self._loaded.signatures
        self.version = _describe(key, signatures)
        self._step = signatures["step"]
        _check_step(self.version, self._step)
        self._plain = self._make_function(compile=False)
        self._compiled: _Function | None = None
        self._compiled_shapes: set[tuple[int, int]] = set()
        # The last batch that comes again, and its tensors. One value: threads that run at once see either all of it.
        self._kept: tuple[StepBatch | None, tuple[Any, ...]] = (None, ())
        self._try_out()

    @property
    def key(self) -> VersionKey:
        """Which version it is."""
        return self.version.key

    def run(self, batch: StepBatch) -> StepBatchResult:
        """Runs one batch, compiled where its shape has been compiled.

        Returns:
            Arrays that may be read-only: they are the graph's own memory, not copied.

        Raises:
            BadModelOutput: the graph fails on this batch, or answers other dtypes than the contract says.
            ExecutorUnavailable: it was stopped, or there is no memory for it now.
        """
        compiled = self._compiled if batch.inputs.shape[:2] in self._compiled_shapes else None
        return self._run(compiled or self._plain, batch)

    def is_compiled(self, rows: int, steps: int) -> bool:
        """Whether batches of this shape run compiled."""
        return (rows, steps) in self._compiled_shapes

    def compile(self, rows: int, steps: int) -> None:
        """Compiles ``step`` for one shape, which takes seconds; other threads run on meanwhile.

        The time loop ends with the longest of ``lengths``: one compile serves every number of time steps up to
        ``steps``.

        Raises:
            BadModelOutput, ExecutorUnavailable: it cannot be compiled.
        """
        if self._compiled is None:
            self._compiled = self._make_function(compile=True)
        self._run(self._compiled, self._empty_batch(rows, steps))
        self._compiled_shapes.add((rows, steps))

    def _make_function(self, *, compile: bool) -> _Function:  # noqa: A002 - as in Keras
        """``step`` from four tensors to two, in the order of the contract.

        Called flat: looking up what each argument is called costs as much as running a small batch. And by its name,
        as TensorFlow itself calls it in the end: on the way there it looks for gradient tapes and graphs under
        construction, of which there are none here, and words errors anew.
        """
        from tensorflow.python.eager import context, execute

        specs = self._step.structured_input_signature[1]

        def step(inputs: Any, lengths: Any, reset: Any, state: Any) -> tuple[Any, Any]:
            result = self._step(inputs=inputs, lengths=lengths, reset=reset, state=state)
            return result["outputs"], result["state"]

        function = self._tf.function(
            step, input_signature=[specs[name] for name in _STEP_INPUTS], autograph=False, jit_compile=compile
        ).get_concrete_function()
        # What it closes over, the weights, are arguments too.
        captured = tuple(function.captured_inputs)
        eager = context.context()
        name = function.inference_fn.name.decode()
        attributes = tuple(itertools.chain(*eager.function_call_options.as_attrs().items()))
        run = functools.partial(execute.execute, name, len(_STEP_OUTPUTS), attrs=attributes, ctx=eager)

        def call(*tensors: Any, function: Any = function) -> Any:  # while it is kept, TensorFlow knows it by its name
            return run([*tensors, *captured])

        return call

    def _run(self, function: _Function, batch: StepBatch) -> StepBatchResult:
        errors = self._tf.errors
        try:
            outputs, state = function(*self._tensors(batch))
            # The buffers of the tensors themselves: `.numpy()` would copy them.
            arrays = np.asarray(memoryview(outputs)), np.asarray(memoryview(state))
        except (errors.ResourceExhaustedError, errors.UnavailableError, errors.CancelledError) as error:
            raise ExecutorUnavailable(f"model {self.key} could not be run now: {_first_line(error)}") from error
        except errors.OpError as error:
            raise BadModelOutput(f"model {self.key} failed: {_first_line(error)}") from error
        for name, array in zip(_STEP_OUTPUTS, arrays, strict=True):
            if array.dtype is not _FLOAT32 and array.dtype != _FLOAT32:
                raise BadModelOutput(f"model {self.key} answered {name} of {array.dtype}; expected float32")
        # Here they are in this core's cache; whoever hands them out sits on another.
        return StepBatchResult(*arrays, finite=all_finite(*arrays), native=state if self.on_cpu else None)

    def _tensors(self, batch: StepBatch) -> tuple[Any, ...]:
        """What ``step`` is called with. On the memory of a batch that comes again they are made once.

        Not where they are copied to another device to be read: TensorFlow may keep the copy for the next time.
        """
        kept = self._kept
        if kept[0] is batch:
            return kept[1]
        tensor = self._tensor_on if batch.aligned else self._tensor
        before = tensor(batch.state) if batch.native is None else batch.native
        tensors = tensor(batch.inputs), tensor(batch.lengths), tensor(batch.reset), before
        if batch.again and batch.aligned and self.on_cpu:
            self._kept = batch, tensors
        return tensors

    def _tensor(self, array: npt.NDArray[Any]) -> Any:
        """A tensor on the array's own memory where that is aligned as TensorFlow wants it; else on a copy."""
        flags = array.flags
        if flags.c_contiguous and flags.writeable and array.size and address_of(array) % ALIGNMENT == 0:
            return self._tensor_on(array)
        return self._tf.convert_to_tensor(array)

    def _tensor_on(self, array: npt.NDArray[Any]) -> Any:
        """A tensor on the memory of an array that is as TensorFlow wants it."""
        return self._from_dlpack(array.__dlpack__())

    def _empty_batch(self, rows: int, steps: int) -> StepBatch:
        """Nothing but first states, and one time step each."""
        return StepBatch(
            inputs=np.zeros((rows, steps, self.version.input_dim), np.float32),
            lengths=np.ones(rows, np.int32),
            reset=np.ones(rows, np.bool_),
            state=np.zeros((rows, self.version.state_size), np.float32),
        )

    def _try_out(self) -> None:
        """Runs one step, so that what TensorFlow makes once is made before anybody waits for it."""
        try:
            result = self._run(self._plain, self._empty_batch(1, 1))
        except (BadModelOutput, ExecutorUnavailable) as error:
            raise ModelLoadError(f"model {self.key} cannot be stepped: {error.message}") from error
        came = (result.outputs.shape, result.state.shape)
        expected = ((1, 1, self.version.output_dim), (1, self.version.state_size))
        if came != expected:
            raise ModelLoadError(
                f"model {self.key}: step answers outputs {came[0]} and state {came[1]}; its description says "
                f"{expected[0]} and {expected[1]}"
            )


def _describe(key: VersionKey, signatures: Mapping[str, Any]) -> ModelVersion:
    missing = [name for name in ("step", "serving_default", "describe") if name not in signatures]
    if missing:
        raise ModelLoadError(
            f"model {key} is no sequence model: it has no signature {', '.join(missing)}; it has "
            f"{', '.join(sorted(signatures)) or 'none'} (docs/contract.md)"
        )
    try:
        config = signatures["describe"]()["config"].numpy()
        return parse_description(key, config)
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(
            f"model {key}: expected the signature describe to take nothing and return one string, config"
        ) from error
    except DescriptionError as error:
        raise ModelLoadError(f"model {key}: {error}") from error


def _check_step(version: ModelVersion, step: Any) -> None:
    """Compares the signature with the contract and with what the model says of itself."""
    widths = {"inputs": version.input_dim, "outputs": version.output_dim, "state": version.state_size}
    _check_tensors(version.key, "input", step.structured_input_signature[1], _STEP_INPUTS, widths)
    _check_tensors(version.key, "output", step.structured_outputs, _STEP_OUTPUTS, widths)


def _check_tensors(
    key: VersionKey,
    what: str,
    found: Mapping[str, Any],
    expected: Mapping[str, tuple[str, int]],
    widths: Mapping[str, int],
) -> None:
    if set(found) != set(expected):
        raise ModelLoadError(f"model {key}: step has the {what}s {sorted(found)}; expected {sorted(expected)}")
    for name, (dtype, rank) in expected.items():
        tensor = found[name]
        free = (None,) * (rank - 1)
        shape = [*free, widths[name] if name in widths and rank > 1 else None]
        if tensor.dtype.name != dtype or not tensor.shape.is_compatible_with(shape):
            raise ModelLoadError(
                f"model {key}: step's {what} {name!r} is {tensor.dtype.name} {tensor.shape}; expected {dtype} {shape}"
            )
        if what == "input" and any(size is not None for size in tensor.shape[: max(rank - 1, 1)]):
            raise ModelLoadError(f"model {key}: step's {what} {name!r} has the fixed shape {tensor.shape}")


def _first_line(error: BaseException) -> str:
    text = str(getattr(error, "message", None) or error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
