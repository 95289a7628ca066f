"""Runs the requests that an exporter put beside its model, so that the first caller does not pay for tracing."""

from pathlib import Path

from service.model_server.errors import ServingError
from service.model_server.examples import classify, multi_inference, regress
from service.model_server.manager import Handle
from service.model_server.predict import predict
from service.model_server.saved_model import SavedModel, warmup_requests


def warm_up(handle: Handle[SavedModel], path: Path) -> None:
    """Runs every warmup record of a version that is not served yet.

    Raises:
        ServingError: one of them failed: the version should not be served then.
    """
    for log in warmup_requests(path):
        kind = log.WhichOneof("log_type")
        try:
            if kind == "predict_log":
                predict(handle, log.predict_log.request)
            elif kind == "classify_log":
                classify(handle, log.classify_log.request)
            elif kind == "regress_log":
                regress(handle, log.regress_log.request)
            elif kind == "multi_inference_log":
                multi_inference(handle, log.multi_inference_log.request)
        except ServingError as error:
            raise ServingError(
                error.code, f"Warmup of {{name: {handle.name} version: {handle.version}}} failed: {error.message}"
            ) from error
