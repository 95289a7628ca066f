import asyncio
import hashlib
import urllib.error

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.errors import StoreUnavailable
from service.metrics import Histogram, Metrics
from service.observing import BatchRun, Observer
from service.server import StartError
from service.sessions.memory import MemoryStore
from service.types import VersionKey
from tests.observe.scrape import Scrape, scrape
from tests.service.support import NumpyExecutor, random_inputs, running_gateway, step_request

HERE = {"metrics_listen": "127.0.0.1:0"}
SUMS = {"model": "sums", "version": "1"}


async def scraped(running) -> Scrape:
    return await scrape(running.gateway.monitor.port)


async def test_steps_batches_and_time_steps_are_counted_as_they_ran():
    async with running_gateway(**HERE) as running:
        for name in ("a", "b", "c"):
            await running.create(name)
        steps = [step_request(name, random_inputs(length), 0) for name, length in (("a", 2), ("b", 5), ("c", 20))]
        answer = await running.stub.BatchStep(pb.BatchStepRequest(requests=steps))
        assert not any(response.HasField("status") for response in answer.responses)
        await running.stub.Step(step_request("a", random_inputs(1), 2))
        now = await scraped(running)
        batches = running.executor.batches
        assert now.value("ntm_steps_total", **SUMS) == 4
        assert now.value("ntm_step_duration_seconds_count", **SUMS) == 4
        assert now.value("ntm_commit_duration_seconds_count", **SUMS) == 4
        assert now.value("ntm_time_steps_total", **SUMS) == 2 + 5 + 20 + 1
        assert now.value("ntm_computed_time_steps_total", **SUMS) == sum(
            b.inputs.shape[0] * b.inputs.shape[1] for b in batches
        )
        assert now.value("ntm_executor_duration_seconds_count", **SUMS) == len(batches)
        assert now.value("ntm_batch_rows_sum", **SUMS) == sum(int((b.lengths > 0).sum()) for b in batches)
        assert now.value("ntm_queue_duration_seconds_count", **SUMS) == now.value("ntm_batch_rows_sum", **SUMS)
        assert now.value("ntm_rpcs_total", rpc="BatchStep", code="OK") == 1
        assert now.value("ntm_rpc_duration_seconds_count", rpc="CreateSession") == 3


async def test_durations_add_up_to_no_more_than_the_steps_took():
    async with running_gateway(**HERE) as running:
        await running.create("a")
        for position in range(20):
            await running.stub.Step(step_request("a", random_inputs(1, position), position))
        now = await scraped(running)
        parts = [now.value(f"ntm_{part}_duration_seconds_sum", **SUMS) for part in ("queue", "executor", "commit")]
        assert all(part > 0 for part in parts)
        assert sum(parts) < now.value("ntm_step_duration_seconds_sum", **SUMS)
        assert now.value("ntm_step_duration_seconds_sum", **SUMS) < now.value(
            "ntm_rpc_duration_seconds_sum", rpc="Step"
        )


async def test_errors_are_counted_by_reason_and_where_it_is_known_by_model():
    async with running_gateway(**HERE) as running:
        await running.create("a")
        bad = [
            step_request("nobody", random_inputs(1), 0),
            step_request("a", np.full((1, 2), np.nan, np.float32), 0),
            step_request("a", random_inputs(1), 7),
        ]
        await running.stub.BatchStep(pb.BatchStepRequest(requests=bad))
        with pytest.raises(grpc.RpcError):
            await running.stub.Step(step_request("a", random_inputs(1), 8))
        now = await scraped(running)
        assert now.value("ntm_errors_total", reason="SESSION_NOT_FOUND", model="") == 1
        assert now.value("ntm_errors_total", reason="INVALID_TENSOR", model="") == 1
        assert now.value("ntm_errors_total", reason="POSITION_MISMATCH", **SUMS) == 2
        assert now.value("ntm_rpcs_total", rpc="Step", code="ABORTED") == 1
        assert now.value("ntm_steps_total", **SUMS) == 0


async def test_a_cancelled_step_is_counted_whether_in_a_call_or_in_a_stream():
    executor = NumpyExecutor()
    async with running_gateway(executor, **HERE) as running:
        await running.create("a")
        executor.hold()
        call = running.stub.Step(step_request("a", random_inputs(1), 0))
        waiting = asyncio.ensure_future(call)
        await executor.entered.wait()
        call.cancel()
        await asyncio.wait([waiting])
        stream = running.stub.StreamSteps()
        await stream.write(pb.StreamStepsRequest(requests=[step_request("a", random_inputs(1), 0, request_id="1")]))
        await stream.write(pb.StreamStepsRequest(cancel=["1"]))
        assert (await stream.read()).responses[0].status.code == grpc.StatusCode.CANCELLED.value[0]
        assert (await scraped(running)).value("ntm_open_streams", rpc="StreamSteps") == 1
        executor.gate.set()
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        now = await scraped(running)
        assert now.value("ntm_errors_total", reason="CANCELLED") == 2
        assert now.value("ntm_open_streams", rpc="StreamSteps") == 0


async def test_a_stream_that_its_client_breaks_is_closed_all_the_same():
    async with running_gateway(**HERE) as running:
        stream = running.stub.StreamSteps()
        await stream.write(pb.StreamStepsRequest(requests=[step_request("nobody", random_inputs(1), 0)]))
        await stream.read()
        stream.cancel()
        while (now := await scraped(running)).value("ntm_open_streams", rpc="StreamSteps") != 0:
            pass  # each look gives the gateway its turn
        # The handler sees the cancellation or, before it, that no more requests come.
        ended = [now.value("ntm_rpcs_total", rpc="StreamSteps", code=code) for code in ("CANCELLED", "OK")]
        assert [count for count in ended if count] == [1]


async def test_replays_and_refused_commits_are_counted():
    executor = NumpyExecutor()
    store = MemoryStore(max_sessions=10, clock=lambda: 0.0)
    async with running_gateway(executor, store, **HERE) as running, running_gateway(None, store) as other:
        await running.create("a")
        executor.hold()
        slow = asyncio.ensure_future(running.stub.Step(step_request("a", random_inputs(1), 0)))
        await executor.entered.wait()
        await other.stub.Step(step_request("a", random_inputs(1), 0))
        executor.gate.set()
        await slow
        now = await scraped(running)
        assert now.value("ntm_commit_refusals_total", verdict="replay", **SUMS) == 1
        assert now.value("ntm_replayed_steps_total", **SUMS) == 1
        assert now.value("ntm_steps_total", **SUMS) == 0


async def test_a_failed_batch_is_counted_and_so_is_its_error():
    def fault(batch):
        raise StoreUnavailable("gone")  # any error of the service's own

    executor = NumpyExecutor()
    executor.fault = fault
    async with running_gateway(executor, **HERE) as running:
        await running.create("a")
        with pytest.raises(grpc.RpcError):
            await running.stub.Step(step_request("a", random_inputs(1), 0))
        now = await scraped(running)
        assert now.value("ntm_failed_batches_total", **SUMS) == 1
        assert now.value("ntm_errors_total", reason="STORE_UNAVAILABLE", **SUMS) == 1


async def test_gauges_tell_what_is_there_now():
    executor = NumpyExecutor()
    async with running_gateway(executor, **HERE, max_queued_steps=7) as running:
        await running.create("a")
        executor.hold()
        step = asyncio.ensure_future(running.stub.Step(step_request("a", random_inputs(3), 0)))
        await executor.entered.wait()
        running.gateway.monitor.observer.sessions_counted(await running.gateway.engine.session_counts())
        now = await scraped(running)
        assert now.value("ntm_steps_under_way") == 1
        assert now.value("ntm_bytes_under_way") == 3 * 2 * 4
        assert now.value("ntm_steps_under_way_limit") == 7
        assert now.value("ntm_queued_chunks", **SUMS) == 0
        assert now.value("ntm_sessions", **SUMS) == 1
        assert now.value("ntm_model_version_served", **SUMS) == 1
        assert now.value("ntm_serving") == 1
        assert now.value("ntm_store_up") == 1
        executor.gate.set()
        await step


async def test_a_store_that_cannot_be_asked_shows_and_no_old_number_stays():
    class Down(MemoryStore):
        async def counts(self):
            raise StoreUnavailable("down")

    async with running_gateway(store=Down(max_sessions=10, clock=lambda: 0.0), **HERE) as running:
        while (now := await scraped(running)).value("ntm_store_up") != 0:
            pass
        assert now.value("ntm_store_up") == 0
        assert now.value("ntm_sessions") is None


async def test_no_label_holds_an_identity_or_a_session(tmp_path):
    token = "secret-of-alice"
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(f'[alice]\ntokens_sha256 = ["{hashlib.sha256(token.encode()).hexdigest()}"]\n')
    async with running_gateway(**HERE, token_file=tokens) as running:
        metadata = (("authorization", f"Bearer {token}"),)
        create = pb.CreateSessionRequest(session_id="the-session", model=pb.ModelSpec(name="sums"))
        await running.stub.CreateSession(create, metadata=metadata)
        await running.stub.Step(step_request("the-session", random_inputs(1), 0, "the-request"), metadata=metadata)
        with pytest.raises(grpc.RpcError):
            await running.stub.Step(step_request("the-session", random_inputs(1), 9), metadata=metadata)
        with pytest.raises(grpc.RpcError):
            await running.create("the-session", model="no-such-model")
        now = await scraped(running)
        assert now.value("ntm_errors_total", reason="UNAUTHENTICATED") == 1
        for word in (token, "alice", "the-session", "the-request", "no-such-model"):
            assert word not in now.text
        labels = {label for sample in now.samples if sample.name.startswith("ntm_") for label in sample.labels}
        assert labels == {"model", "version", "reason", "rpc", "code", "le"}


async def test_metrics_end_with_the_gateway_and_are_off_unless_asked_for():
    async with running_gateway(**HERE) as running:
        port = running.gateway.monitor.port
        await scrape(port)
    with pytest.raises(urllib.error.URLError):
        await scrape(port)
    async with running_gateway() as running:
        assert running.gateway.monitor.port is None
        assert type(running.gateway.monitor.observer) is Observer


async def test_a_metrics_port_that_is_taken_is_named():
    async with running_gateway(**HERE) as running:
        taken = f"127.0.0.1:{running.gateway.monitor.port}"
        with pytest.raises(StartError, match=taken):
            async with running_gateway(metrics_listen=taken):
                pass


def test_a_histogram_counts_a_value_under_the_first_bound_that_is_not_below_it():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.add(value)
    assert histogram.read() == ([("1.0", 2), ("2.0", 4), ("+Inf", 5)], 7.5)
    assert histogram.count() == 5


def test_a_histogram_reads_the_same_before_and_after_it_settles():
    histogram = Histogram((1.0, 2.0))
    values = np.random.default_rng(0).uniform(0, 3, 3000)
    for value in values.tolist():
        histogram.add(value)
        histogram.settle()
    assert len(histogram._pending) < 1024
    histogram.settle(at_least=1)
    assert not histogram._pending
    counts, total = histogram.read()
    assert dict(counts) == {"1.0": (values <= 1).sum(), "2.0": (values <= 2).sum(), "+Inf": 3000}
    assert total == pytest.approx(values.sum())
    assert histogram.count() == 3000


@pytest.mark.parametrize("rows", [1, 64])
def test_what_batches_add_does_not_wait_without_end_to_be_sorted(rows):
    metrics, key = Metrics(CollectorRegistry()), VersionKey("sums", 1)
    for _ in range(3000):
        metrics.batch_formed(key, [0.5] * rows)
        metrics.batch_ran(BatchRun(key, rows, rows, rows, 0.5, failed=False))
        metrics.steps_committed(key, rows, 0.5, 0.5)
    numbers = metrics._versions[key]
    assert max(len(histogram._pending) for histogram in numbers.histograms) <= 1024
    assert (numbers.step.count(), numbers.executor.count()) == (3000 * rows, 3000)
