"""``ntm-client``: what has to be settled before gRPC is imported, and then the command.

It stands beside the package ``service.client``, which imports gRPC as soon as anything of it is imported.
"""

import sys

from service.polling import poll_in_place


def main() -> int:
    """The ``ntm-client`` command; returns its exit code."""
    poll_in_place()
    from service.client import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
