"""Every query of the dashboard and of the alerts, asked of a real Prometheus that scrapes live gateways.

One pair of gateways works, over a shared store; the others are ill, each in a way that alerts are for.
"""

import asyncio
import hashlib
import json
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import numpy as np

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.config import Settings
from service.errors import CorruptState, StoreUnavailable
from service.server import Gateway
from service.sessions.memory import MemoryStore
from service.types import StepBatchResult, VersionKey
from tests.observe.prometheus import DEPLOY, needs_prometheus, running_prometheus
from tests.service.support import NumpyExecutor, random_inputs, running_gateway, step_request, version_of

pytestmark = needs_prometheus

HERE = {"metrics_listen": "127.0.0.1:0"}
SUMS = VersionKey("sums", 1)
ENOUGH_S = 60


def store(**changes):
    return type("Store", (MemoryStore,), changes)(max_sessions=100, clock=lambda: 0.0)


def panel_queries():
    """Panel titles and their queries, with the dashboard's variables filled in as Grafana does for 'All'."""
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "gateway.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$__rate_interval", "1m")
            yield panel["title"], query.replace("$instance", ".*").replace("$model", ".*")


async def step(running, name, position, length=1):
    return await running.stub.Step(step_request(name, random_inputs(length, position), position))


async def failing(running, name):
    try:
        await step(running, name, 0)
    except grpc.RpcError:
        return
    raise AssertionError("the step was to fail")


class Ward:
    """Gateways, well and ill."""

    def __init__(self, stack):
        self._stack = stack
        self.ports = []

    async def admit(self, executor=None, kept=None, **settings):
        running = await self._stack.enter_async_context(running_gateway(executor, kept, **HERE, **settings))
        self.ports.append(running.gateway.monitor.port)
        return running

    async def admit_starting(self):
        """Listens, and has not loaded its models."""
        settings = Settings(model_dir=Path(), listen="127.0.0.1:0", **HERE)
        gateway = Gateway(settings, executor=NumpyExecutor(), store=store())
        await gateway.listen()
        self._stack.push_async_callback(gateway.drain)
        self.ports.append(gateway.monitor.port)


async def work(first, second, executor):
    """Steps, one of them sent twice, one that two gateways run at once, and one in a stream that stays open."""
    for running in (first, second):
        await running.create("shared")
    position = (await first.stub.GetSession(pb.GetSessionRequest(session_id="shared"))).position
    executor.hold()
    slow = asyncio.ensure_future(step(first, "shared", position))
    await executor.entered.wait()
    await step(second, "shared", position)
    executor.gate.set()
    await slow
    await step(second, "shared", position)
    await first.stub.BatchStep(pb.BatchStepRequest(requests=[step_request("shared", random_inputs(20), position + 1)]))


async def fall_ill(ill):
    """What each ill gateway meets: real steps that fail, and times that are told by hand."""
    for name in ("poisoned", "corrupt", "broken", "forgotten"):
        await ill[name].create("a")
    ill["poisoned"].executor.fault = lambda batch: StepBatchResult(
        np.full((*batch.inputs.shape[:2], 3), np.nan, np.float32), batch.state
    )
    ill["forgotten"].executor.served.pop(SUMS)
    for name in ("poisoned", "corrupt", "broken", "forgotten", "storeless"):
        await failing(ill[name], "a")
    forgotten = ill["forgotten"].gateway.monitor.observer
    forgotten.versions_served(())
    forgotten.sessions_counted({SUMS: 1})
    ill["full"].executor.hold()
    await ill["full"].create("a")
    held = asyncio.ensure_future(step(ill["full"], "a", 0))
    await ill["full"].executor.entered.wait()
    ill["full"].gateway.monitor.observer.sessions_counted({SUMS: 1})
    await failing(ill["full"], "a")
    await asyncio.gather(*(failing(ill["guarded"], "a") for _ in range(400)))
    slow = ill["slow"].gateway.monitor.observer
    slow.batch_formed(SUMS, [2.0])
    slow.steps_committed(SUMS, 1, 3.0, 0.5)
    slow.loop_late(1.0)
    return held


async def admit_the_ill(ward, tmp_path):
    async def corrupt(self, key, *, fresh=False):
        raise CorruptState("bad checksum")

    async def unavailable(self, *_, **__):
        raise StoreUnavailable("down")

    async def broken(self, key, *, fresh=False):
        raise RuntimeError("a bug")

    def nothing(self, key, seconds):
        """No copy is at hand: whatever is wrong shows when the session is loaded."""

    tokens = tmp_path / "tokens.toml"
    tokens.write_text(f'[alice]\ntokens_sha256 = ["{hashlib.sha256(b"token").hexdigest()}"]\n')
    await ward.admit_starting()
    return {
        "poisoned": await ward.admit(),
        "corrupt": await ward.admit(None, store(load=corrupt, at_hand=nothing)),
        "broken": await ward.admit(None, store(load=broken, at_hand=nothing)),
        "storeless": await ward.admit(None, store(load=unavailable, counts=unavailable, at_hand=nothing)),
        "forgotten": await ward.admit(),
        "full": await ward.admit(max_queued_steps=1, max_sessions=1),
        "guarded": await ward.admit(token_file=tokens),
        "slow": await ward.admit(),
        "ahead": await ward.admit(NumpyExecutor(version_of(), version_of(version=2))),
    }


async def test_every_panel_and_alert_returns_data_from_a_live_run(tmp_path):
    async with AsyncExitStack() as stack:
        ward = Ward(stack)
        executor, shared = NumpyExecutor(), store()
        first, second = await ward.admit(executor, shared), await ward.admit(None, shared)
        ill = await admit_the_ill(ward, tmp_path)
        stream = first.stub.StreamSteps()
        await stream.write(pb.StreamStepsRequest(requests=[step_request("nobody", random_inputs(1), 0)]))
        nobody_listens = 1
        prometheus = stack.enter_context(running_prometheus([*ward.ports, nobody_listens]))
        async with asyncio.timeout(ENOUGH_S):
            # Rates need to have seen the counters before they move.
            while len(await prometheus.query("ntm_serving and on (instance) up == 1")) < len(ward.ports):
                pass
            held = await fall_ill(ill)
            rules = await prometheus.rules()
            asked = {f"panel {title}: {query}": query for title, query in panel_queries()}
            asked |= {f"alert {rule['name']}: {rule['query']}": rule["query"] for rule in rules}
            assert len(asked) > 60
        end = asyncio.get_running_loop().time() + ENOUGH_S
        while asked and asyncio.get_running_loop().time() < end:
            await work(first, second, executor)
            for name, query in list(asked.items()):
                if await prometheus.query(query):
                    del asked[name]
        assert not asked
        assert all(rule["health"] == "ok" for rule in await prometheus.rules())
        ill["full"].executor.gate.set()
        await held
        stream.cancel()
