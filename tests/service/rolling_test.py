"""kill -TERM under load, with another gateway over the same store: nothing is lost, nothing is applied twice."""

import threading

import numpy as np

from service.client import SequenceClient
from tests.service.gateway_process import gateway_process
from tests.service.sessions.valkey import Valkey
from tests.service.support import random_inputs, run_whole

SESSIONS, CHUNK = 12, 3


class Load:
    """Sessions that are stepped by a thread each, over both gateways, until they are told to stop."""

    def __init__(self, target):
        self.client = SequenceClient(target, timeout=60)
        self.sessions = [self.client.create_session("sums") for _ in range(SESSIONS)]
        self.inputs = [random_inputs(30_000, seed) for seed in range(SESSIONS)]
        self.outputs = [[] for _ in range(SESSIONS)]
        self.over = threading.Event()
        self._threads = [threading.Thread(target=self._step, args=(n,)) for n in range(SESSIONS)]
        for thread in self._threads:
            thread.start()

    def _step(self, number):
        session, inputs = self.sessions[number], self.inputs[number]
        while not self.over.is_set() and session.position < len(inputs):
            self.outputs[number].append(session.step(inputs[session.position : session.position + CHUNK]))

    def wait_for_more(self, count):
        """Returns once every session has been stepped so many times more."""
        wanted = [len(outputs) + count for outputs in self.outputs]
        while any(len(outputs) < many for outputs, many in zip(self.outputs, wanted, strict=True)):
            assert all(thread.is_alive() for thread in self._threads)
            self.over.wait(0.01)

    def finish(self):
        self.over.set()
        for thread in self._threads:
            thread.join(60)


def test_a_gateway_that_is_told_to_end_under_load_loses_nothing(tmp_path):
    store = Valkey(tmp_path / "store", port=0).start()
    try:
        with gateway_process(tmp_path / "staying", store.url) as (_, staying):
            with gateway_process(tmp_path / "ending", store.url) as (ending, port):
                load = Load(f"ipv4:127.0.0.1:{port},127.0.0.1:{staying}")
                load.wait_for_more(20)
                ending.terminate()
                assert ending.wait(30) == 0
            load.wait_for_more(20)
            load.finish()
            for session, inputs, outputs in zip(load.sessions, load.inputs, load.outputs, strict=True):
                came = np.concatenate(outputs)
                np.testing.assert_array_equal(came, run_whole(inputs[: len(came)])[0])
                assert session.info().position == session.position == len(came)
            load.client.close()
    finally:
        store.stop()
