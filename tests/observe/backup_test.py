"""The backup and the restore of docs/operations.md, with a real server and real steps."""

import shutil
import time

import grpc
import numpy as np
import pytest

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.sessions.redis import RedisStore
from tests.service.sessions.valkey import Valkey
from tests.service.support import outputs_of, random_inputs, run_whole, running_gateway, step_request

INPUTS = random_inputs(8)


@pytest.fixture
def servers():
    started = []
    yield started
    for server in started:
        server.stop()


def gateway(server):
    return running_gateway(None, RedisStore(server.url, max_sessions=100))


async def step(running, begin, end):
    return outputs_of(await running.stub.Step(step_request("a", INPUTS[begin:end], begin)))


def wait_until(server, true):
    while not true(server.client.info("persistence")):
        time.sleep(0.01)


async def test_sessions_go_on_from_a_backup_and_what_came_after_it_is_told(tmp_path, servers):
    server = Valkey(tmp_path / "first", appendonly="yes").start()
    servers.append(server)
    async with gateway(server) as running:
        await running.create("a")
        await running.create("b")
        await step(running, 0, 3)
        server.client.bgsave()
        wait_until(server, lambda info: not info["rdb_bgsave_in_progress"] and not info["rdb_changes_since_last_save"])
        await step(running, 3, 5)
    server.kill()

    fresh = tmp_path / "second"
    fresh.mkdir()
    shutil.copy(tmp_path / "first" / "dump.rdb", fresh)
    restored = Valkey(fresh, appendonly="no").start()
    servers.append(restored)
    restored.client.config_set("appendonly", "yes")
    wait_until(restored, lambda info: info["aof_enabled"] and not info["aof_rewrite_in_progress"])
    async with gateway(restored) as running:
        with pytest.raises(grpc.RpcError) as lost:
            await step(running, 5, 6)
        assert lost.value.code() is grpc.StatusCode.ABORTED
        assert (await running.stub.GetSession(pb.GetSessionRequest(session_id="a"))).position == 3
        assert len((await running.stub.ListSessions(pb.ListSessionsRequest())).sessions) == 2
        assert sum((await running.gateway.engine.session_counts()).values()) == 2
        again = await step(running, 3, 6)
        np.testing.assert_allclose(again, run_whole(INPUTS)[0][3:6], rtol=1e-6)
    restored.kill()

    # From here on it is a server like any other: what was committed after the restore is in its log.
    later = Valkey(fresh, appendonly="yes").start()
    servers.append(later)
    async with gateway(later) as running:
        assert (await running.stub.GetSession(pb.GetSessionRequest(session_id="a"))).position == 6
