import pytest

from tests.integration import models
from tests.integration.processes import Gateway


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    models.export_all(directory)
    return directory


@pytest.fixture(scope="session")
def wholes(model_dir):
    return {kind: models.Whole(model_dir / kind / "1") for kind in models.KINDS}


@pytest.fixture(scope="session")
def gateway(model_dir, tmp_path_factory):
    """One gateway that the tests which do not end it share."""
    with Gateway(tmp_path_factory.mktemp("gateway"), "--model-dir", str(model_dir)) as running:
        yield running
