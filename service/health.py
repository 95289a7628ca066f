"""``python -m service.health HOST:PORT``: asks a gRPC server whether it is SERVING; exits with 0 if it is.

For container engines, whose health checks are commands. Kubernetes asks by itself.
"""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_LIMIT_S = 4.0


def check(address: str) -> str:
    """The status by its name, or why there is none."""
    with grpc.insecure_channel(address) as channel:
        try:
            # The stubs leave the method out.
            ask = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
            reply = ask(health_pb2.HealthCheckRequest(), timeout=_LIMIT_S)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 SERVING, 1 anything else, 2 wrong usage."""
    if len(argv) != 1:
        print("usage: python -m service.health HOST:PORT", file=sys.stderr)
        return 2
    status = check(argv[0])
    print(status)
    return 0 if status == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
