"""``ntm-client``: look at a gateway, and use it, from a shell."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import grpc

from service.client.blocking import SequenceClient
from service.client.cli import commands
from service.client.cli.data import DataError
from service.client.cli.output import Output
from service.client.errors import GatewayError

_EPILOG = """\
examples:
  ntm-client models
  ntm-client step --model copy inputs.npy --output outputs.npy
  seq 1 10 | ntm-client step --model sums -             one time step a line, columns separated by commas
  ntm-client inspect SESSION --picture memory.png
  ntm-client bench --model copy --sessions 64

With --json each command prints one JSON document. Exit codes: 0, 1 where the gateway refused, 2 for wrong arguments.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The ``ntm-client`` command; returns its exit code."""
    options = _parser().parse_args(argv)
    output = Output(as_json=options.json)
    try:
        with _connect(options) as client:
            options.run(client, options, output)
    except (DataError, ValueError, TypeError, OSError) as error:
        output.error(f"ntm-client: {error}")
        return 2
    except GatewayError as error:
        output.refused(error, options.target)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ntm-client", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    target = os.environ.get("NTM_TARGET", "127.0.0.1:50051")
    parser.add_argument("--target", default=target, help="the gateway (default: %(default)s; or set NTM_TARGET)")
    parser.add_argument("--timeout", type=float, default=30, help="seconds that a call may take (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument("--token-file", type=Path, help="file with the bearer token")
    parser.add_argument("--ca", type=Path, help="connect by TLS; this file (PEM) says whom to trust")
    parser.add_argument("--tls", action="store_true", help="connect by TLS; trust whom this machine trusts")
    parser.add_argument("--cert", type=Path, help="client certificate (PEM), with --key")
    parser.add_argument("--key", type=Path, help="its private key (PEM)")
    commands.add_to(parser.add_subparsers(title="commands", metavar="COMMAND", required=True))
    return parser


def _connect(options: argparse.Namespace) -> SequenceClient:
    token = options.token_file.read_text().strip() if options.token_file else None
    return SequenceClient(options.target, credentials=_credentials(options), token=token, timeout=options.timeout)


def _credentials(options: argparse.Namespace) -> grpc.ChannelCredentials | None:
    if (options.cert is None) != (options.key is None):
        raise DataError("--cert and --key go together")
    if not (options.tls or options.ca or options.cert):
        return None
    ca, key, cert = (path.read_bytes() if path else None for path in (options.ca, options.key, options.cert))
    return grpc.ssl_channel_credentials(ca, key, cert)
