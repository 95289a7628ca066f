import itertools

import pytest

from tests.service.sessions.valkey import Valkey, documented_users

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
