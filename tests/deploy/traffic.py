"""Clients at work while things are rolled out: many sessions, every output checked, every failure kept."""

import threading
import time

import grpc
import numpy as np

from service.client import SequenceClient
from service.client.retry import RetryPolicy
from tests.service.executors.sequence_models import WIDTH

MODEL = "copy"
_CHUNK = 4
_STEPS_OF_A_SESSION = 5
# So that the machine has time for what is tested.
_PAUSE_S = 0.02


class Traffic:
    """Threads that step sessions until the block ends.

    Each has one session for all of that time, and a succession of short ones beside it. The models are
    ``sequence_models``' sums: outputs are running sums times the version's scale, and exact for small whole numbers.

    Args:
        target: Of the gateways.
        scales: By version.
        threads: How many.
        client: More of the clients' arguments.

    Attributes:
        failures: Steps and calls that failed, and outputs that were wrong.
        retried: What the clients were refused and tried again by themselves.
        opened: Versions of the sessions opened so far, in order.
        steps: By version, the steps that were answered.
    """

    def __init__(self, target, scales, *, threads=3, **client):
        self.failures, self.retried, self.opened, self.steps = [], [], [], {}
        self._target, self._scales, self._client = target, scales, client
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._work, args=(seed,)) for seed in range(threads)]

    def _work(self, seed):
        random = np.random.default_rng(seed)
        with SequenceClient(self._target, retry=self._noted(), **self._client) as client:
            try:
                old = Stepped(self, client, random)
                while not self._stop.is_set():
                    young = Stepped(self, client, random)
                    for _ in range(_STEPS_OF_A_SESSION):
                        old.step()
                        young.step()
                    young.session.close()
                    self._stop.wait(_PAUSE_S)
                old.session.close()
            except (grpc.RpcError, AssertionError) as error:
                self.failures.append(error)

    def _noted(self):
        retried = self.retried

        class Noted(RetryPolicy):
            def delay(self, attempt, error):
                retried.append(error)
                return RetryPolicy.delay(self, attempt, error)

        return Noted()

    def answered(self, version):
        with self._lock:
            self.steps[version] = self.steps.get(version, 0) + 1

    def random(self):
        return np.random.default_rng(99)

    def scale(self, version):
        return self._scales[version]

    def wait(self, condition, limit=60.0):
        """Until a condition holds, with the work going on."""
        deadline = time.monotonic() + limit
        while not condition():
            assert not self.failures, self.failures
            assert time.monotonic() < deadline, (self.opened[-9:], self.steps)
            time.sleep(0.02)

    def wait_steps(self, version, count=20):
        """Until so many more steps of a version were answered."""
        wanted = self.steps.get(version, 0) + count
        self.wait(lambda: self.steps.get(version, 0) >= wanted)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


class Stepped:
    """A session, and what its outputs have to be."""

    def __init__(self, traffic, client, random):
        self._traffic, self._random = traffic, random
        self.session = client.create_session(MODEL)
        self.version = self.session.info().version
        traffic.opened.append(self.version)
        self._sum = np.zeros(WIDTH, np.float32)

    def step(self):
        inputs = self._random.integers(-3, 4, (_CHUNK, WIDTH)).astype(np.float32)
        wanted = self._sum + np.cumsum(self._traffic.scale(self.version) * inputs, axis=0)
        came = self.session.step(inputs)
        assert np.array_equal(came, wanted), f"version {self.version}: expected {wanted}, got {came}"
        self._sum = wanted[-1]
        self._traffic.answered(self.version)
