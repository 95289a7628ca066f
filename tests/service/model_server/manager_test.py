"""Loading and unloading, with servables that do as the test says."""

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from service.model_server.errors import ServingError
from service.model_server.manager import LoadPolicy, ModelManager
from service.model_server.states import State, StateMonitor
from tests.service.model_server.processes import wait_until

HERE = Path()


class Servable:
    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


class Recorder(StateMonitor):
    """Keeps every state."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[tuple[str, int, State]] = []

    def publish(self, name: str, version: int, state: State, error: ServingError | None = None) -> None:
        self.history.append((name, version, state))
        super().publish(name, version, state, error)


class Models:
    """A manager whose loads the test may hold up or let fail."""

    def __init__(self, *, retries: int = 0, interval: float = 0.0) -> None:
        self.monitor = Recorder()
        self.failing: set[tuple[str, int]] = set()
        self.attempts = 0
        self.gate = threading.Event()
        self.gate.set()
        self.servables: dict[tuple[str, int], Servable] = {}
        self.manager = ModelManager(self._load, monitor=self.monitor, policy=LoadPolicy(retries, interval))

    def _load(self, name: str, version: int, path: Path) -> Servable:
        self.attempts += 1
        self.gate.wait()
        if (name, version) in self.failing:
            raise ServingError(grpc.StatusCode.DATA_LOSS, "torn")
        self.servables[name, version] = Servable()
        return self.servables[name, version]

    def aspire(self, name: str, *versions: int) -> None:
        self.manager.aspire(name, dict.fromkeys(versions, HERE))

    def states(self, name: str) -> dict[int, State]:
        return {version: state.state for version, state in self.monitor.versions(name).items()}

    def await_states(self, name: str, wanted: dict[int, State]) -> None:
        wait_until(lambda: self.states(name) == wanted)

    def version_used(self, name: str, version: int | None = None) -> int:
        with self.manager.use(name, version) as handle:
            return handle.version


@pytest.fixture
def models() -> Iterator[Models]:
    made = Models()
    yield made
    made.gate.set()
    made.manager.close(5)


def test_the_new_version_is_there_before_the_old_one_goes(models: Models) -> None:
    models.aspire("m", 1)
    models.await_states("m", {1: State.AVAILABLE})
    models.gate.clear()
    models.aspire("m", 2)
    models.await_states("m", {2: State.LOADING, 1: State.AVAILABLE})
    assert models.version_used("m") == 1
    models.gate.set()
    models.await_states("m", {2: State.AVAILABLE, 1: State.END})
    assert models.version_used("m") == 2
    assert models.servables["m", 1].closed
    wanted = [(2, "START"), (2, "LOADING"), (2, "AVAILABLE"), (1, "UNLOADING"), (1, "END")]
    assert [(version, state.name) for _, version, state in models.monitor.history[3:]] == wanted


def test_a_version_in_use_is_unloaded_only_after_that(models: Models) -> None:
    models.aspire("m", 1)
    models.await_states("m", {1: State.AVAILABLE})
    with models.manager.use("m", 1):
        models.aspire("m")
        models.await_states("m", {1: State.UNLOADING})
        assert not models.servables["m", 1].closed
        with pytest.raises(ServingError, match=r"NOT_FOUND: Servable not found for request: Specific\(m, 1\)"):
            models.version_used("m", 1)
    models.await_states("m", {1: State.END})
    assert models.servables["m", 1].closed


def test_the_old_version_stays_where_the_new_one_cannot_be_loaded(models: Models) -> None:
    models.aspire("m", 1)
    models.await_states("m", {1: State.AVAILABLE})
    models.failing.add(("m", 2))
    models.aspire("m", 2)
    models.await_states("m", {2: State.END, 1: State.AVAILABLE})
    error = models.monitor.versions("m")[2].error
    assert error is not None
    assert str(error) == "DATA_LOSS: torn"
    assert models.version_used("m") == 1
    models.aspire("m", 2)  # as each look at the directory says again
    models.aspire("other", 1)
    models.await_states("other", {1: State.AVAILABLE})
    assert models.attempts == 3  # a version that failed is not tried again and again
    models.aspire("m", 3)
    models.await_states("m", {3: State.AVAILABLE, 2: State.END, 1: State.END})


def test_a_load_is_tried_again_as_often_as_the_policy_says() -> None:
    models = Models(retries=2)
    models.failing.add(("m", 1))
    models.aspire("m", 1)
    models.await_states("m", {1: State.END})
    assert models.attempts == 3
    models.manager.close(5)


def test_waiting_for_a_retry_ends_where_nobody_wants_the_version_any_more() -> None:
    models = Models(retries=5, interval=600)
    models.failing.add(("m", 1))
    models.aspire("m", 1)
    wait_until(lambda: models.attempts == 1)
    models.aspire("m", 2)
    models.await_states("m", {2: State.AVAILABLE, 1: State.END})
    assert models.attempts == 2
    models.manager.close(5)


def test_closing_ends_the_wait_for_a_retry() -> None:
    models = Models(retries=5, interval=600)
    models.failing.add(("m", 1))
    models.aspire("m", 1)
    wait_until(lambda: models.attempts == 1)
    models.manager.close(5)
    assert not models.manager._thread.is_alive()


def test_a_version_that_comes_back_is_loaded_anew(models: Models) -> None:
    models.aspire("m", 1)
    models.await_states("m", {1: State.AVAILABLE})
    first = models.servables["m", 1]
    with models.manager.use("m", None):
        models.aspire("m")
        models.await_states("m", {1: State.UNLOADING})
        models.aspire("m", 1)
    models.await_states("m", {1: State.AVAILABLE})
    assert first.closed
    assert models.servables["m", 1] is not first


def test_waiting_for_models_tells_the_failed_from_those_on_their_way_out() -> None:
    monitor = StateMonitor()
    monitor.publish("m", 1, State.AVAILABLE)
    since = monitor.sequence()
    monitor.publish("m", 1, State.END)  # an older instance goes
    assert monitor.wait_available(["m"], since=since, timeout=0.01) is None
    monitor.publish("m", 1, State.AVAILABLE)
    reached = monitor.wait_available(["m"], since=since, timeout=1)
    assert reached is not None
    assert [(key, state.state) for key, state in reached.items()] == [(("m", 1), State.AVAILABLE)]
    monitor.publish("n", 4, State.END, ServingError(grpc.StatusCode.DATA_LOSS, "torn"))
    reached = monitor.wait_available(["n"], since=since, timeout=1)
    assert reached is not None
    assert [state.error is not None for state in reached.values()] == [True]
