"""The short run of ``many_sessions.py``, through both kinds of gateways."""

import numpy as np
import pytest

from service.client import SequenceClient
from tests.integration import many_sessions, models


@pytest.fixture(scope="module", params=["embedded", "model server"])
def target(request, model_dir, tmp_path_factory):
    if request.param == "embedded":
        yield request.getfixturevalue("gateway").target
        return
    with many_sessions.before_model_server(model_dir, tmp_path_factory.mktemp("model-server")) as gateway:
        yield gateway.target


def test_sessions_of_three_models_with_forks_and_snapshots_give_what_whole_sequences_give(target, wholes):
    with SequenceClient(target) as client:
        walks = many_sessions.step_all(client, 24, np.random.default_rng(1))
    assert sum(walk.since > 0 for walk in walks) >= 5
    for kind in models.KINDS:
        mine = [walk for walk in walks if walk.kind == kind]
        assert many_sessions.difference(mine, wholes[kind]) <= many_sessions.tolerance(mine, wholes[kind])


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("fault", many_sessions.FAULTS)
def test_the_control_a_state_that_went_wrong_shows_a_hundred_times_over(target, wholes, kind, fault):
    with SequenceClient(target) as client:
        assert many_sessions.control(client, kind, fault, wholes[kind]) > 100 * wholes[kind].tolerance()
