"""``ntm-serve``: what has to be settled before gRPC is imported, and then the gateway."""

from typing import NoReturn

from service.polling import poll_in_place


def command() -> NoReturn:
    """Serves until it is told to end; exits as ``service.server.command`` says."""
    poll_in_place()
    from service import server

    server.command()


if __name__ == "__main__":
    command()
