"""``python -m service.client.cli``: the ``ntm-client`` command."""

import sys

from service.client.cli import main

sys.exit(main())
