"""``ntm-model-server``: parses the settings and serves."""

import asyncio
import logging
import os
import sys
from collections.abc import Sequence

from pydantic import ValidationError
from pydantic_settings import CliApp

from service.loops import loop_factory
from service.model_server.config import Settings
from service.polling import poll_in_place

# As tensorflow_model_server has it, so that scripts which look at it see no difference.
_FAILED_TO_START = 255


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the server; exits with 0 after a drain, 2 for wrong settings, 255 where the models cannot be served."""
    try:
        settings = CliApp.run(Settings, cli_args=list(sys.argv[1:] if arguments is None else arguments))
    except ValidationError as error:
        for problem in error.errors():
            option = "".join(f"--{str(part).replace('_', '-')}: " for part in problem["loc"][:1])
            sys.stderr.write(f"ntm-model-server: {option}{problem['msg']}\n")
        sys.exit(2)
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    # TensorFlow reads these while it is imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1" if settings.one_dnn else "0"
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    poll_in_place()

    from service.model_server.errors import ServingError
    from service.model_server.server import serve

    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(serve(settings))
    except ServingError as error:
        sys.stderr.write(f"Failed to start server. Error: {error}\n")
        sys.exit(_FAILED_TO_START)


if __name__ == "__main__":
    main()
