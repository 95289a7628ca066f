"""A SavedModel in a TensorFlow 1 session: what TensorFlow Serving runs, errors of the graph included."""

import ctypes
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import config_pb2, saved_model_pb2

# Session.run() converts and checks what it is fed in Python; the call below it hands arrays to the runtime as they
# are, so that a wrong dtype or shape meets the same code, and gets the same answer, as in TensorFlow Serving.
from tensorflow.python.client import pywrap_tf_session
from tensorflow_serving.apis import prediction_log_pb2

from service.model_server.errors import ServingError, code_of, failed_precondition, invalid_argument, not_found
from service.model_server.tensors import Array

_log = logging.getLogger(__name__)

_TAGS = ["serve"]
_WARMUP_FILE = "assets.extra/tf_serving_warmup_requests"
_MAX_WARMUP_RECORDS = 1000


class SavedModel:
    """One loaded version. Thread-safe.

    Args:
        path: The version's directory, with ``saved_model.pb`` in it.
        intra_op_threads: Threads that one operation may run on; 0 for one a core. All models of a process share them,
            as many as the first one that was loaded said.

    Raises:
        ServingError: it cannot be loaded.
    """

    def __init__(self, path: Path, *, intra_op_threads: int = 1) -> None:
        self._graph = tf.Graph()
        config = tf.compat.v1.ConfigProto()
        config.gpu_options.allow_growth = True
        config.intra_op_parallelism_threads = intra_op_threads
        self._session = tf.compat.v1.Session(graph=self._graph, config=config)
        try:
            with self._graph.as_default():
                meta_graph = tf.compat.v1.saved_model.load(self._session, _TAGS, str(path))
        except tf.errors.OpError as error:
            self._session.close()
            raise ServingError(code_of(error.error_code), _load_message(error.message)) from error
        except Exception as error:
            self._session.close()
            raise _load_error(path, error) from error
        self.signatures: Mapping[str, Any] = dict(meta_graph.signature_def)
        self._endpoints: dict[str, tuple[Any, int]] = {}

    def signature(self, name: str) -> Any:
        """The ``SignatureDef`` of a name, or None."""
        return self.signatures.get(name)

    def run(self, feeds: Mapping[str, Array], fetches: Sequence[str], timeout_ms: int = 0) -> list[tuple[Array, int]]:
        """Runs the graph once.

        Args:
            feeds: Arrays by tensor name, as they came: nothing is converted.
            fetches: Tensor names.
            timeout_ms: 0 for none.

        Returns:
            For each fetch its array and its ``DataType``.

        Raises:
            ServingError: what TensorFlow says.
        """
        feed_outputs = {self._endpoint(name)[0]: array for name, array in feeds.items()}
        endpoints = [self._endpoint(name) for name in fetches]
        options = None
        if timeout_ms > 0:
            run_options = config_pb2.RunOptions(timeout_in_ms=timeout_ms)
            options = pywrap_tf_session.TF_NewBufferFromString(run_options.SerializeToString())
        try:
            values = pywrap_tf_session.TF_SessionRun_wrapper(
                self._session._session,  # noqa: SLF001 - the handle that the call below Session.run() takes
                options,
                feed_outputs,
                [output for output, _ in endpoints],
                [],
                None,
            )
        except tf.errors.OpError as error:
            raise ServingError(code_of(error.error_code), error.message) from error
        finally:
            if options is not None:
                pywrap_tf_session.TF_DeleteBuffer(options)
        return [(_as_array(value, dtype), dtype) for value, (_, dtype) in zip(values, endpoints, strict=True)]

    def close(self) -> None:
        """Frees the session. Nothing may be running."""
        self._session.close()

    def _endpoint(self, name: str) -> tuple[Any, int]:
        """A tensor's handle and ``DataType``, looked up once."""
        endpoint = self._endpoints.get(name)
        if endpoint is None:
            tensor = self._tensor(name)
            endpoint = (tensor._as_tf_output(), tensor.dtype.as_datatype_enum)  # noqa: SLF001 - as Session.run() does
            self._endpoints[name] = endpoint
        return endpoint

    def _tensor(self, name: str) -> Any:
        full_name = name if ":" in name else f"{name}:0"
        try:
            return self._graph.get_tensor_by_name(full_name)
        except (KeyError, ValueError):
            operation = name.partition(":")[0]
        try:
            self._graph.get_operation_by_name(operation)
        except (KeyError, ValueError):
            raise not_found(f"FetchOutputs node {full_name}: not found") from None
        raise invalid_argument(
            f"Tried to fetch data for '{full_name}', which produces no output.  To run to a node but not fetch any "
            f"data, pass '{full_name}' as an argument to the 'target_node_names' argument of the Session::Run API."
        )


def warmup_requests(path: Path) -> list[Any]:
    """The ``PredictionLog`` records that stand beside a model to warm it up.

    Raises:
        ServingError: there are more than 1,000, or one cannot be read.
    """
    file = path / _WARMUP_FILE
    if not file.is_file():
        return []
    logs = []
    try:
        for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
            logs.append(prediction_log_pb2.PredictionLog.FromString(record))
            if len(logs) > _MAX_WARMUP_RECORDS:
                raise invalid_argument(
                    f"Number of warmup records exceeds the maximum ({_MAX_WARMUP_RECORDS}) at {file}"
                )
    except tf.errors.OpError as error:
        raise ServingError(code_of(error.error_code), error.message) from error
    except DecodeError as error:
        raise ServingError(grpc.StatusCode.DATA_LOSS, f"Failed to parse warmup record {len(logs)} of {file}") from error
    return logs


def disable_xla() -> None:
    """Makes functions marked ``jit_compile=True`` fail, as in TensorFlow Serving without its XLA flags."""
    library = Path(tf.sysconfig.get_lib()) / "libtensorflow_cc.so.2"
    try:
        # tensorflow::DisableXlaCompilation(); Python has no name for it.
        ctypes.CDLL(str(library))["_ZN10tensorflow21DisableXlaCompilationEv"]()
    except (OSError, AttributeError) as error:
        _log.warning("XLA cannot be switched off in this TensorFlow, jit_compile=True will be compiled: %s", error)


def _as_array(value: Any, dtype: int) -> Array:
    """A fetched value as an array; scalars come as NumPy scalars or ``bytes``."""
    if isinstance(value, np.ndarray):
        return value
    return np.array(value, dtype=object if isinstance(value, bytes) else tf.dtypes.as_dtype(dtype).as_numpy_dtype)


def _load_message(message: str) -> str:
    """A load error without what Python wraps around it and without the restoring node's name."""
    return message.removeprefix("Graph execution error:\n\n").partition("\n\t [[")[0]


def _load_error(path: Path, error: Exception) -> ServingError:
    """What TensorFlow Serving's loader says of a directory that Python's loader raised ``error`` for."""
    proto = path / "saved_model.pb"
    if not proto.is_file() and not proto.with_suffix(".pbtxt").is_file():
        return not_found(f"Could not find SavedModel .pb or .pbtxt at supplied export directory path: {path}")
    try:
        saved_model = saved_model_pb2.SavedModel.FromString(proto.read_bytes()) if proto.is_file() else None
    except DecodeError:
        return ServingError(grpc.StatusCode.DATA_LOSS, f"Can't parse {proto} as binary proto")
    if saved_model is not None and not any(set(_TAGS) == set(g.meta_info_def.tags) for g in saved_model.meta_graphs):
        return not_found(
            f"Could not find meta graph def matching supplied tags: {{ {' '.join(_TAGS)} }}. To inspect available "
            "tag-sets in the SavedModel, please use the SavedModel CLI: `saved_model_cli`"
        )
    if isinstance(error, ValueError) and "not a valid checkpoint" in str(error):
        return not_found(f"Could not find the variables of {path}")
    return failed_precondition(f"{type(error).__name__}: {error}")
