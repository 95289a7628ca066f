"""The requests and replies recorded from a TensorFlow Serving, as calls that can be made again."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
from google.protobuf import json_format
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    predict_pb2,
    regression_pb2,
)

DIRECTORY = Path(__file__).parents[2] / "recordings" / "tf_serving"

_PREDICTION, _MODEL = "/tensorflow.serving.PredictionService/", "/tensorflow.serving.ModelService/"
_TYPES: dict[str, tuple[Any, Any]] = {
    _PREDICTION + "Predict": (predict_pb2.PredictRequest, predict_pb2.PredictResponse),
    _PREDICTION + "GetModelMetadata": (
        get_model_metadata_pb2.GetModelMetadataRequest,
        get_model_metadata_pb2.GetModelMetadataResponse,
    ),
    _PREDICTION + "Classify": (classification_pb2.ClassificationRequest, classification_pb2.ClassificationResponse),
    _PREDICTION + "Regress": (regression_pb2.RegressionRequest, regression_pb2.RegressionResponse),
    _PREDICTION + "MultiInference": (inference_pb2.MultiInferenceRequest, inference_pb2.MultiInferenceResponse),
    _MODEL + "GetModelStatus": (
        get_model_status_pb2.GetModelStatusRequest,
        get_model_status_pb2.GetModelStatusResponse,
    ),
    _MODEL + "HandleReloadConfigRequest": (
        model_management_pb2.ReloadConfigRequest,
        model_management_pb2.ReloadConfigResponse,
    ),
}


class Row(NamedTuple):
    """One recorded call, or one recorded observation where there is no ``rpc``."""

    case: str
    rpc: str
    fields: dict[str, Any]

    @property
    def reloads(self) -> bool:
        return self.rpc.endswith("HandleReloadConfigRequest")

    @property
    def asks_only(self) -> bool:
        """Whether it may be repeated until what it waits for has happened."""
        return self.rpc.endswith(("GetModelStatus", "GetModelMetadata"))


class Reply(NamedTuple):
    code: str
    message: str
    response: bytes


def rows(file: str) -> list[Row]:
    loaded = json.loads((DIRECTORY / "cases" / f"{file}.json").read_text())
    return [Row(fields["case"], fields.get("rpc", ""), fields) for fields in loaded]


def request_bytes(row: Row, models: Path) -> bytes:
    """The recorded request. Those too large to be recorded are made again, of the recorded size."""
    request = row.fields["request"]
    if "raw_hex" in request:
        return bytes.fromhex(request["raw_hex"])
    if request.get("_truncated"):
        return _large_request(request["_bytes"])
    text = _with_paths(json.dumps(request), models)
    message = json_format.Parse(text, _TYPES[row.rpc][0]())
    return bytes(message.SerializeToString())


def call(
    channel: grpc.Channel,
    row: Row,
    models: Path,
    *,
    timeout: float | None = 60,
    compression: grpc.Compression | None = None,
    metadata: tuple[tuple[str, str], ...] | None = None,
) -> Reply:
    method = channel.unary_unary(row.rpc)
    try:
        request = request_bytes(row, models)
        response = method(request, timeout=timeout, compression=compression, metadata=metadata)
    except grpc.RpcError as error:
        return Reply(error.code().name, error.details() or "", b"")  # type: ignore[attr-defined]
    return Reply("OK", "", response)


def differences(row: Row, reply: Reply, models: Path) -> list[str]:
    """What is not as recorded; empty where all is."""
    found = []
    if reply.code != row.fields["code"]:
        found.append(f"code {reply.code}, recorded {row.fields['code']}")
    expected = _with_paths(row.fields["message"], models)
    # What the client's own transport says (its deadline, its size limit) gRPC's releases wrap differently.
    wrapped = reply.message.startswith("Stream removed (") and expected in reply.message
    if reply.message != expected and not wrapped:
        found.append(f"message {reply.message!r}, recorded {expected!r}")
    if not found and row.fields["code"] == "OK":
        found.extend(_response_differences(row, reply, models))
    return [f"{row.case}: {text}" for text in found]


def _response_differences(row: Row, reply: Reply, models: Path) -> list[str]:
    size = row.fields.get("response_bytes")
    if size is not None and size != len(reply.response):
        return [f"response of {len(reply.response)} bytes, recorded {size}"]
    recorded = row.fields["response"]
    if recorded.get("_truncated"):
        return [] if recorded["_bytes"] == len(reply.response) else [f"{len(reply.response)} bytes"]
    kind = _TYPES[row.rpc][1]
    text = _with_paths(json.dumps(recorded), models)
    expected = json_format.Parse(text, kind())
    came = kind.FromString(reply.response)
    # Compared as JSON, since NaN is not equal to itself.
    if json_format.MessageToDict(came) != json_format.MessageToDict(expected):
        return [f"response {str(came)[:2000]}, recorded {str(expected)[:2000]}"]
    return []


def _with_paths(text: str, models: Path) -> str:
    """The recorder wrote MODELS and MODELSE for the directories that it used."""
    return text.replace("MODELSE/", f"{models}/").replace("MODELS/", f"{models}/")


def _large_request(size: int) -> bytes:
    """``x`` [rows, 8] and ``state`` [rows, 64, 128], with or without a filter: what gives the recorded size."""
    for output_filter in ([], ["y"]):
        count = size // (4 * (8 + 64 * 128))
        request = predict_pb2.PredictRequest(output_filter=output_filter)
        request.model_spec.name = "big"
        _put(request, "x", np.arange(count * 8, dtype=np.float32).reshape(count, 8))
        _put(request, "state", np.ones((count, 64, 128), np.float32))
        if request.ByteSize() == size:
            return bytes(request.SerializeToString())
    raise AssertionError(f"no request of {size} bytes")


def _put(request: Any, alias: str, array: Any) -> None:
    tensor = request.inputs[alias]
    tensor.dtype = 1
    for length in array.shape:
        tensor.tensor_shape.dim.add(size=length)
    tensor.tensor_content = array.tobytes()
