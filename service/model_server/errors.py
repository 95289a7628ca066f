"""The one exception of the model server: a status as TensorFlow Serving answers it."""

import grpc

# Longer texts are cut by TensorFlow Serving before they go on the wire (its grpc_status_util.cc).
_MESSAGE_LIMIT = 1024

# TensorFlow's error codes are gRPC's, number by number.
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class ServingError(Exception):
    """A request, or a load, failed with a gRPC status code and a message."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message

    @property
    def details(self) -> str:
        """The message as it goes on the wire."""
        if len(self.message) <= _MESSAGE_LIMIT:
            return self.message
        return self.message[:_MESSAGE_LIMIT] + "...TRUNCATED"


def invalid_argument(message: str) -> ServingError:
    """The client's fault."""
    return ServingError(grpc.StatusCode.INVALID_ARGUMENT, message)


def not_found(message: str) -> ServingError:
    """No such model, version or file."""
    return ServingError(grpc.StatusCode.NOT_FOUND, message)


def failed_precondition(message: str) -> ServingError:
    """Not in the state that the request needs."""
    return ServingError(grpc.StatusCode.FAILED_PRECONDITION, message)


def code_of(number: int) -> grpc.StatusCode:
    """The status code of a TensorFlow error code."""
    return _CODES.get(number, grpc.StatusCode.UNKNOWN)
