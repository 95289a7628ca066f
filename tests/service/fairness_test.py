"""Who waits for whom, and who takes whose place."""

import asyncio

import grpc
import numpy as np

from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import sequence_service_pb2_grpc
from service.batcher import BatchPolicy
from tests.service.batching import NEVER, make, settle, submit
from tests.service.support import (
    INPUT_DIM,
    NumpyExecutor,
    initial_state,
    random_inputs,
    running_gateway,
    step_request,
    version_of,
)

POLICY = BatchPolicy(max_batch_size=4, max_steps_per_turn=8, executor_timeout=10, shared_steps=2, shared_seconds=0.25)


async def test_long_ones_run_in_short_turns_on_the_only_worker_as_long_as_short_ones_keep_coming():
    batcher, executor, clock = make(policy=POLICY)
    executor.gate.clear()
    long = submit(batcher, random_inputs(40))
    await settle()
    short = submit(batcher, random_inputs(1))
    await settle()
    for _ in range(3):  # its first turn, the short one's batch, and one more
        executor.gate.set()
        await asyncio.sleep(0)
        executor.gate.clear()
        executor.entered.clear()
        await executor.entered.wait()
    await short
    clock.now += POLICY.shared_seconds
    executor.gate.set()
    await long
    turns = [int(batch.lengths.max()) for batch in executor.batches]
    assert turns[:3] == [8, 1, 2]
    assert 8 in turns[3:]
    await batcher.close()


class Rows:
    """Where the outcomes of several rows go: nowhere."""

    gone = ()

    def set_results(self, rows, outputs, states, native=None): ...

    def set_exception(self, rows, error): ...


def put(batcher, caller, rows):
    inputs = np.full((rows, 1, INPUT_DIM), ord(caller), np.float32)
    batcher.put(version_of(), inputs, [None] * rows, NEVER, Rows(), caller)


def callers_of(batch):
    return "".join(chr(int(row[0, 0])) for row in batch.inputs)


async def test_who_has_more_than_a_share_gets_a_batch_in_turn_and_all_others_a_place_in_each():
    batcher, executor, _ = make(policy=POLICY)
    executor.gate.clear()
    put(batcher, "x", 1)
    await settle()  # it runs; the others wait
    for caller, rows in (("a", 4), ("b", 4), ("c", 1), ("a", 4), ("d", 1), ("d", 1)):
        put(batcher, caller, rows)
    executor.gate.set()
    await settle()
    assert [callers_of(batch) for batch in executor.batches[1:]] == ["cdaa", "dbbb", "aaba", "aaa\0"]
    await batcher.close()


async def test_long_ones_leave_a_worker_free_as_long_as_short_ones_keep_coming():
    batcher, executor, clock = make(NumpyExecutor(max_in_flight=3), POLICY)
    await submit(batcher, random_inputs(1))
    executor.gate.clear()
    long = [submit(batcher, random_inputs(16, seed)) for seed in range(20)]
    await settle()
    under_way = [batch.lengths.tolist() for batch in executor.batches[1:]]
    assert under_way == [[8, 8], [8, 8]]  # two of three workers, with half the rows each
    short = submit(batcher, random_inputs(1))
    await settle()
    assert executor.batches[3].lengths.tolist() == [1]
    clock.now += POLICY.shared_seconds
    executor.gate.set()
    await short
    executor.gate.clear()
    await settle()
    assert [batch.lengths.tolist() for batch in executor.batches[-3:]] == [[8] * 4] * 3  # all of them again
    executor.gate.set()
    await asyncio.gather(*long)
    await batcher.close()


async def test_a_caller_s_flood_does_not_make_another_wait_for_all_of_it():
    batcher, executor, _ = make()
    executor.gate.clear()
    first = submit(batcher, random_inputs(1))
    await settle()
    version, state = version_of(), initial_state()
    flood = [asyncio.create_task(batcher.submit(version, random_inputs(1), state, NEVER, "a")) for _ in range(100)]
    await settle()
    other = asyncio.create_task(batcher.submit(version, random_inputs(1), state, NEVER, "b"))
    await settle()
    executor.gate.set()
    await other
    assert sum(task.done() for task in flood) <= 8
    await asyncio.gather(first, *flood)
    await batcher.close()


async def test_a_connection_that_floods_leaves_room_and_turns_to_another():
    """Where nobody says who they are, connections are what is told apart."""
    async with running_gateway(max_queued_steps=20) as running:
        for number in range(20):
            await running.create(f"flood{number}")
        await running.create("other")
        running.executor.hold()
        steps = [step_request(f"flood{number}", random_inputs(1), 0) for number in range(20)]
        flood = asyncio.ensure_future(running.stub.BatchStep(pb.BatchStepRequest(requests=steps)))
        await running.executor.entered.wait()
        async with grpc.aio.insecure_channel(running.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = sequence_service_pb2_grpc.SequenceServiceStub(channel)
            other = asyncio.ensure_future(stub.Step(step_request("other", random_inputs(1), 0)))
            running.executor.gate.set()
            assert (await other).position == 1
        refused = [response.status for response in (await flood).responses if response.HasField("status")]
        assert len(refused) == 2  # a tenth is not for it
        assert all("18 while 18 of them are this caller's" in status.message for status in refused)
