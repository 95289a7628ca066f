"""How gRPC waits for the network. It reads that from the environment, once, while it is imported."""

import os

# With gRPC's event engine a message passes through one more thread, which has to be woken up for it. Without, the
# thread that waits for the network hands it over: a quarter less CPU a message on either side (docs/design.md).
SETTING, IN_PLACE = "GRPC_EXPERIMENTS", "-event_engine_listener,-event_engine_client"


def poll_in_place() -> None:
    """Has this process' gRPC wait for the network without its event engine, unless the environment says how.

    For programs; what only uses a client leaves that to its program. To be called before ``import grpc``: later it is
    without effect.
    """
    os.environ.setdefault(SETTING, IN_PLACE)
