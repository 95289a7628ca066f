"""Lost answers, cut connections, gateways that die, drain or cannot be reached: each step is applied exactly once."""

import time

import grpc
import numpy as np
import pytest

from service.client import GatewayError, RetryPolicy, StepConflict
from tests.service.support import random_inputs, run_whole

QUICK = {"timeout": 20, "retry": RetryPolicy(initial=0.01, maximum=0.1)}


def test_a_step_whose_answer_was_lost_is_not_applied_twice(connect, gateway, proxy):
    session = connect(proxy.target, **QUICK).session("sums")
    inputs = random_inputs(6)
    outputs = [session.step(inputs[:2])]
    proxy.mute()
    future = session.start(inputs[2:4])
    gateway.eventually(lambda: gateway.position(session) == 4)
    proxy.cut()
    outputs.append(future.result(20))
    outputs.append(session.step(inputs[4:]))
    np.testing.assert_array_equal(np.concatenate(outputs), run_whole(inputs)[0])
    assert gateway.steps_run() == 6
    assert proxy.connections >= 2


def test_a_stream_cut_under_many_steps_loses_and_repeats_none(connect, gateway, proxy):
    client = connect(proxy.target, **QUICK)
    sessions = [client.session("sums") for _ in range(20)]
    inputs = [random_inputs(8, seed=n) for n in range(20)]
    futures = [
        [session.start(x[begin : begin + 2]) for begin in range(0, 8, 2)]
        for session, x in zip(sessions, inputs, strict=True)
    ]
    for steps in (40, 80):
        gateway.eventually(lambda steps=steps: gateway.steps_run() >= steps)
        proxy.cut()
    for x, parts in zip(inputs, futures, strict=True):
        np.testing.assert_array_equal(np.concatenate([part.result(20) for part in parts]), run_whole(x)[0])
    assert [gateway.position(session) for session in sessions] == [8] * 20


def test_a_lost_create_finds_the_session_that_it_made(connect, gateway, proxy, threads):
    client = connect(proxy.target, **QUICK)
    client.models()  # connected
    proxy.mute()
    opened = threads.loop.run_in_executor(None, lambda: client.session("sums", session_id="mine"))
    gateway.eventually(lambda: gateway.store._sessions)
    proxy.cut()

    async def wait():
        return await opened

    assert threads.run(wait()).session_id == "mine"


def test_a_gateway_that_dies_is_waited_for_and_its_successor_goes_on(connect, gateway, start_gateway):
    session = connect(gateway.target, **QUICK).session("sums")
    inputs = random_inputs(6)
    outputs = [session.step(inputs[:2])]
    gateway.hold()
    future = session.start(inputs[2:4])
    gateway.eventually(lambda: len(gateway.executor.batches) == 2)
    gateway.kill()
    successor = start_gateway(store=gateway.store, port=gateway.port)
    outputs.append(future.result(20))
    outputs.append(session.step(inputs[4:]))
    np.testing.assert_array_equal(np.concatenate(outputs), run_whole(inputs)[0])
    assert successor.steps_run() == 4


def test_calls_wait_for_a_successor_too(connect, gateway, start_gateway, threads):
    client = connect(gateway.target, **QUICK)
    session = client.session("sums")
    gateway.kill()
    asked = threads.loop.run_in_executor(None, session.info)
    start_gateway(store=gateway.store, port=gateway.port)

    async def wait():
        return await asked

    assert threads.run(wait()).position == 0


def test_a_gateway_that_stays_away_is_an_error_in_time(connect, gateway):
    client = connect(gateway.target, retry=RetryPolicy(initial=0.01, maximum=0.1))
    session = client.session("sums")
    session.step(random_inputs(1))
    gateway.kill()
    steps = (
        lambda: session.step(random_inputs(1), timeout=0.5),
        lambda: client.step_many([(session, random_inputs(1))], timeout=0.5),
        lambda: client.attach(session.session_id, timeout=0.5),
    )
    for call in steps:
        began = time.monotonic()
        with pytest.raises(GatewayError) as caught:
            call()
        assert caught.value.outcome_unknown
        assert time.monotonic() - began < 5
    assert session.position == 1


def test_a_silent_connection_ends_with_the_deadline_and_the_step_can_be_repeated(connect, gateway, proxy):
    session = connect(proxy.target, **QUICK).session("sums")
    inputs = random_inputs(4)
    session.step(inputs[:2])
    proxy.mute()
    with pytest.raises(GatewayError) as caught:
        session.step(inputs[2:3], timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    gateway.eventually(lambda: gateway.position(session) == 3)
    proxy.cut()
    with pytest.raises(StepConflict) as conflict:  # something else instead, while the first was applied
        session.step(inputs[3:])
    assert conflict.value.position == 3
    outputs = [session.step(inputs[2:3]), session.step(inputs[3:])]
    np.testing.assert_array_equal(np.concatenate(outputs), run_whole(inputs)[0][2:])
    assert gateway.steps_run() == 4


def test_a_draining_gateway_answers_what_it_has_and_another_takes_the_rest(connect, gateway, start_gateway):
    target = gateway.target
    session = connect(target, **QUICK).session("sums")
    inputs = random_inputs(5)
    gateway.hold()
    running = session.start(inputs[:2])
    gateway.eventually(lambda: gateway.executor.batches)
    gateway.begin_drain()
    waiting = session.start(inputs[2:])
    gateway.release()
    outputs = [running.result(20)]  # what it had taken on
    assert not waiting.done()
    gateway.kill()
    start_gateway(store=gateway.store, port=gateway.port)
    outputs.append(waiting.result(20))
    np.testing.assert_array_equal(np.concatenate(outputs), run_whole(inputs)[0])


def test_an_overloaded_gateway_is_asked_again(connect, start_gateway):
    gateway = start_gateway(max_queued_steps=1)
    client = connect(gateway.target, **QUICK)
    sessions = [client.session("sums") for _ in range(4)]
    outputs = client.step_many([(session, random_inputs(2)) for session in sessions])
    for y in outputs:
        np.testing.assert_array_equal(y, run_whole(random_inputs(2))[0])


def test_a_stream_that_its_server_stops_reading_is_no_deadlock(connect, start_gateway):
    gateway = start_gateway(max_stream_steps=2)
    client = connect(gateway.target, **QUICK)
    sessions = [client.session("sums") for _ in range(50)]
    for _ in range(3):
        assert len(client.step_many([(session, random_inputs(1)) for session in sessions])) == 50


def test_a_session_moves_between_ways_to_its_gateway_in_the_middle_of_its_sequence(connect, gateway, proxy):
    here, there = connect(gateway.target, **QUICK), connect(proxy.target, **QUICK)
    inputs = random_inputs(6)
    session = here.session("sums")
    outputs = [session.step(inputs[:2])]
    moved = there.attach(session.session_id, position=session.position)
    outputs.append(moved.step(inputs[2:4]))
    outputs.append(here.attach(session.session_id).step(inputs[4:]))
    np.testing.assert_array_equal(np.concatenate(outputs), run_whole(inputs)[0])
