"""Steps that stay together, with the network moved by hand: what makes them single steps, and what those still are."""

import grpc
import numpy as np
import pytest

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.client.blocks import Block
from service.client.errors import GatewayError, PrecedingStepFailed
from service.client.retry import RetryPolicy
from service.client.steps import Line
from tests.service.client.pipeline_bench import INVALID, UNAVAILABLE, Bench, ids, in_columns, requests_in, told


@pytest.fixture
def bench():
    bench = Bench(columns=True)
    told(bench)
    return bench


def rows(block):
    return [outcome.ravel().tolist() for outcome in block.results()]


def of(message, *places):
    requests = requests_in(message)
    return pb.StreamStepsRequest(requests=[requests[place] for place in places])


def test_results_come_in_parts_and_in_any_order(bench):
    block = bench.block(*((f"s{n}", n) for n in range(6)))
    stream, message = bench.send()
    assert [len(columns.request_ids) for columns in message.columns] == [6]
    for places in [(4, 5), (1, 3), (2, 0)]:
        bench.tell()
        assert block not in bench.ended
        bench.answer(stream, of(message, *places))
    bench.tell()
    assert bench.ended[-1] is block
    assert rows(block) == [[0], [1], [2], [3], [4], [5]]
    assert [bench.lines[f"s{n}"].position for n in range(6)] == [1] * 6


def test_a_result_that_comes_again_is_taken_once(bench):
    before = len(bench.ended)
    block = bench.block(("a", 1), ("b", 2), ("c", 3))
    stream, message = bench.send()
    for _ in range(3):
        bench.answer(stream, of(message, 0))
    bench.tell()
    assert len(bench.ended) == before
    bench.answer(stream, of(message, 1, 2))
    bench.tell()
    assert len(bench.ended) == before + 1
    assert rows(block) == [[1], [2], [3]]


def test_outputs_are_the_callers_to_write_and_hold_nothing_but_those_of_their_call(bench):
    block, other = bench.block(("a", 1), ("b", 2)), bench.block(("c", 3), ("d", 4))
    bench.answer(*bench.send())
    first, second = block.results()
    first[:] = 9
    assert second.tolist() == [[2]]
    assert first.base.nbytes == 8
    assert rows(other) == [[3], [4]]


def test_inputs_may_be_written_to_again_and_need_not_be_contiguous(bench):
    wide = np.arange(8, dtype=np.float32).reshape(4, 2)
    lines = [bench.lines.setdefault(name, Line(name, 0)) for name in "ab"]
    block = Block(lines, [wide[:, :1], wide[::-1, 1:]], bench.clock.now + 9, bench.ended.append)
    wide[:] = 0
    bench.pipeline.submit(block)
    bench.settle()
    assert bench.gateway.applied["a"] == [0, 2, 4, 6]
    assert bench.gateway.applied["b"] == [7, 5, 3, 1]


def test_a_refusal_is_of_one_step_and_the_others_go_on_waiting_for_their_answers(bench):
    block = bench.block(("a", 1), ("b", 2), ("c", 3))
    stream, message = bench.send()
    bench.refuse(stream, of(message, 1), INVALID)
    assert bench.send()[1] is None
    bench.answer(stream, of(message, 0, 2))
    bench.tell()
    assert bench.ended[-1].line is bench.lines["b"] or bench.ended[-1].line is bench.lines["c"]
    first, failed, last = block.outcomes()
    assert failed.reason == "INVALID_TENSOR"
    assert (first.tolist(), last.tolist()) == ([[1]], [[3]])
    with pytest.raises(GatewayError, match="INVALID_TENSOR"):
        block.results()


def test_what_is_refused_for_now_is_sent_again_by_itself(bench):
    block = bench.block(("a", 1), ("b", 2), ("c", 3))
    stream, message = bench.send()
    bench.refuse(stream, of(message, 1), UNAVAILABLE)
    bench.answer(stream, of(message, 0, 2))
    bench.clock.now = bench.pipeline.wake_at()
    _, again = bench.send()
    assert ids(again) == ["b"]
    bench.answer(stream, again)
    assert rows(block) == [[1], [2], [3]]


def test_a_result_that_ends_elsewhere_fails_its_step_and_no_other(bench):
    block = bench.block(("a", 1), ("b", 2), ("c", 3))
    stream, message = bench.send()
    answer = in_columns([bench.gateway.apply(request) for request in requests_in(message)])
    answer.columns[0].positions[1] = 90
    bench.pipeline.received(answer, stream)
    first, failed, last = block.outcomes()
    assert "position is 90 after a step that ends at 1" in failed.details()
    assert (first.tolist(), last.tolist()) == ([[1]], [[3]])


@pytest.mark.parametrize("name", ["", ".", "1.", "1.x", "1.²", "1.99", "1." + "9" * 5000, "nobody.0"])
def test_an_answer_to_what_nobody_asked_changes_nothing(bench, name):
    block = bench.block(("a", 1), ("b", 2))
    stream, message = bench.send()
    answer = in_columns([bench.gateway.apply(request) for request in requests_in(message)])
    stranger = in_columns([bench.gateway.apply(request) for request in requests_in(message)])
    stranger.columns[0].request_ids[0] = name.replace("1", message.columns[0].request_ids[0].partition(".")[0], 1)
    del stranger.columns[0].request_ids[1], stranger.columns[0].positions[1]
    stranger.columns[0].outputs.shape[0] = 1
    stranger.columns[0].outputs.content = stranger.columns[0].outputs.content[:4]
    bench.pipeline.received(stranger, stream)
    bench.pipeline.received(answer, stream)
    assert rows(block) == [[1], [2]]


def test_a_session_whose_failure_nobody_has_seen_takes_no_step_of_a_block_either(bench):
    failed = bench.step("a", 1)
    bench.refuse(*bench.send(), INVALID)
    block = bench.block(("a", 2), ("b", 3))
    bench.settle()
    behind, fine = block.outcomes()
    assert isinstance(behind, PrecedingStepFailed)
    assert fine.tolist() == [[3]]
    failed.mark_seen()
    again = bench.block(("a", 2), ("b", 3))
    bench.settle()
    assert rows(again) == [[2], [6]]


def test_the_deadline_of_a_block_wakes_the_pipeline_whatever_ended_before_it(bench):
    bench.step("early", 1, timeout=1)
    block = bench.block(("a", 1), ("b", 2), timeout=5)
    _, message = bench.send()
    bench.clock.now += 1
    bench.pipeline.tick()
    assert bench.pipeline.wake_at() == bench.clock.now + 4
    bench.clock.now += 4
    _, told_off = bench.send()
    assert set(told_off.cancel) == {request.request_id for request in requests_in(message)}
    assert [outcome.reason for outcome in block.outcomes()] == ["DEADLINE_EXCEEDED"] * 2


def test_a_session_that_is_closed_leaves_a_block_and_the_others_stay(bench):
    block = bench.block(("a", 1), ("b", 2))
    stream, message = bench.send()
    bench.pipeline.close_line(bench.lines["a"], "closed")
    assert list(bench.send()[1].cancel) == [requests_in(message)[0].request_id]
    bench.answer(stream, message)
    gone, fine = block.outcomes()
    assert gone.reason == "CLOSED"
    assert fine.tolist() == [[2]]


def test_closing_fails_the_blocks_on_their_way_and_those_that_come_later(bench):
    block = bench.block(("a", 1), ("b", 2))
    bench.send()
    waiting = bench.block(("c", 1), ("d", 2))
    bench.pipeline.close("the client is closed")
    late = bench.block(("e", 1), ("f", 2))
    bench.tell()
    for each in (block, waiting, late):
        assert [outcome.reason for outcome in each.outcomes()] == ["CLOSED"] * 2
    assert not bench.pipeline.wants_stream()


def test_a_stream_that_is_refused_for_good_fails_the_blocks_that_wait(bench):
    bench.pipeline.stream_ended(bench.pipeline.stream, None)
    stream = bench.pipeline.open_stream()
    block = bench.block(("a", 1), ("b", 2))
    bench.pipeline.stream_ended(stream, GatewayError(grpc.StatusCode.UNAUTHENTICATED, "no such token"))
    with pytest.raises(GatewayError, match="no such token"):
        block.results()


def test_what_was_sent_as_a_block_on_a_stream_that_is_lost_is_sent_again(bench):
    block = bench.block(("a", 1), ("b", 2), ("c", 3))
    stream, message = bench.send()
    bench.answer(stream, of(message, 1))
    bench.pipeline.stream_ended(stream, GatewayError(grpc.StatusCode.UNAVAILABLE, "it is gone"))
    bench.clock.now = bench.pipeline.wake_at()
    stream, again = bench.send()
    assert ids(again) == ["a", "c"]
    bench.answer(stream, again)
    assert rows(block) == [[1], [2], [3]]


def test_a_block_that_is_larger_than_a_message_goes_in_some():
    bench = Bench(columns=True, max_message_bytes=2000, policy=RetryPolicy())
    told(bench)
    block = bench.block(*((f"s{n}", *range(50)) for n in range(20)))
    sizes = []
    while (sent := bench.send())[1] is not None:
        sizes.append(sent[1].ByteSize())
        bench.answer(*sent)
    assert len(sizes) > 1
    assert max(sizes) <= 2000
    assert [len(outputs) for outputs in block.results()] == [50] * 20


def test_what_got_its_outcome_before_it_was_sent_takes_no_room_in_a_message():
    bench = Bench(max_message_bytes=2000)
    given_up, sent = bench.step("a", *range(400)), bench.step("b", *range(400))
    bench.pipeline.cancel(given_up)
    stream, message = bench.send()
    assert ids(message) == ["b"]
    bench.answer(stream, message)
    assert len(sent.result()) == 400
