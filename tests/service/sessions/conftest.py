import itertools

import pytest
from hypothesis import Phase, settings

from tests.service.sessions.valkey import Valkey, documented_users

# For tests/mutants/run.py, which only wants to know whether a test fails: finding the shortest way there takes minutes.
settings.register_profile("no-shrinking", phases=[Phase.explicit, Phase.reuse, Phase.generate])

_numbers = itertools.count()


@pytest.fixture(scope="session")
def valkey(tmp_path_factory):
    """A server that the tests share; each has a prefix of its own. Gateways may do there what the documents say."""
    server = Valkey(tmp_path_factory.mktemp("valkey")).start()
    server.grant(documented_users()[0].replace("~ntm:*", "~*"))
    yield server
    server.stop()


@pytest.fixture
def prefix():
    return f"t{next(_numbers)}:"
