"""Talk to a gateway from Python: start here.

    .venv/bin/ntm-serve --model-dir models --listen 127.0.0.1:50051   # in one terminal
    .venv/bin/python examples/client.py                               # in another

It opens a session, feeds it a sequence in two chunks, looks into its memory, and goes on with it as another program
would, from nothing but its id.
"""

import argparse
import sys

import numpy as np

from service.client import GatewayError, SequenceClient


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="127.0.0.1:50051", help="the gateway's HOST:PORT (default: %(default)s)")
    parser.add_argument("--model", default="copy", help="the model's name (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=10, help="seconds that a call may take (default: %(default)s)")
    options = parser.parse_args()
    try:
        run(options.target, options.model, options.timeout)
    except GatewayError as error:
        print(f"{options.target}: {error}", file=sys.stderr)
        return 1
    return 0


def run(target: str, model: str, timeout: float) -> None:
    """A session from beginning to end."""
    with SequenceClient(target, timeout=timeout) as client:
        version = client.model(model).versions[0]
        print(
            f"{model} version {version.version} takes [time, {version.input_dim}], gives [time, {version.output_dim}]"
        )
        inputs = np.random.default_rng().integers(0, 2, (10, version.input_dim)).astype(np.float32)

        with client.session(model) as session:
            outputs = session.step(inputs[:4])
            print(f"session {session.session_id} is at position {session.position}; outputs {outputs.shape}")

            for name, value in session.inspect().items():
                print(f"  {name:24}{value.shape!s:16}mean {value.mean():+.4f}")

            # Another program, another machine, another gateway in front of the same store: the id is all it needs.
            elsewhere = client.attach(session.session_id)
            elsewhere.step(inputs[4:])
            print(f"and is now at position {elsewhere.position}")


if __name__ == "__main__":
    sys.exit(main())
