"""Steps that go to the gateway as columns, with the network moved by hand."""

import pytest

from service.client.columns import look_of
from tests.service.client.pipeline_bench import INVALID, Bench, in_columns, outputs, requests_in, told


def test_steps_go_as_columns_once_the_gateway_takes_them_and_with_those_of_their_shape_and_time():
    bench = Bench(columns=True)
    told(bench)
    steps = [bench.step(f"s{n}", n, timeout=5) for n in range(4)]
    steps += [bench.step(f"t{n}", n, n, timeout=5) for n in range(3)]
    steps += [bench.step(f"u{n}", n, timeout=50) for n in range(2)]
    alone = bench.step("alone", 1, 2, 3)
    stream, message = bench.send()
    shapes = [list(columns.inputs.shape) for columns in message.columns]
    assert shapes == [[4, 1, 1], [3, 2, 1], [2, 1, 1]]
    assert [request.session_id for request in message.requests] == ["alone"]
    assert [columns.timeout.seconds for columns in message.columns] == [5, 5, 50]
    assert sorted(request.session_id for request in requests_in(message)) == sorted(
        step.line.session_id for step in [*steps, alone]
    )
    bench.answer(stream, message)
    assert [outputs(step) for step in steps[:4]] == [[0], [1], [2], [3]]
    assert outputs(steps[6]) == [2, 4]
    assert outputs(alone) == [1, 3, 6]


def test_a_gateway_that_does_not_say_so_gets_no_columns_and_a_new_stream_begins_without():
    bench = Bench(columns=False)
    told(bench)
    for n in range(3):
        bench.step(f"s{n}", n)
    stream, message = bench.send()
    assert (len(message.requests), len(message.columns)) == (3, 0)
    bench.columns = True
    bench.answer(stream, message)
    for n in range(3):
        bench.step(f"s{n}", n)
    assert len(bench.send()[1].columns) == 1
    bench.pipeline.stream_ended(stream, None)
    bench.clock.now += 60
    _, message = bench.send()
    assert (len(message.requests), len(message.columns)) == (3, 0)


def test_a_step_that_failed_among_columns_fails_alone():
    bench = Bench(columns=True)
    told(bench)
    good, bad = bench.step("good", 7), bench.step("bad", 8)
    stream, message = bench.send()
    (columns,) = message.columns
    answer = in_columns([bench.gateway.apply(requests_in(message)[0])])
    answer.responses.add(request_id=columns.request_ids[1], status=INVALID)
    bench.pipeline.received(answer, stream)
    assert outputs(good) == [7]
    assert bad.error.reason == "INVALID_TENSOR"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda results: results.positions.append(3),
        lambda results: results.outputs.shape.append(1),
        lambda results: setattr(results.outputs, "content", results.outputs.content[:-4]),
        lambda results: setattr(results.outputs, "dtype", 0),
        lambda results: results.positions.__setitem__(slice(None), [90, 90]),
    ],
    ids=["positions", "rank", "bytes", "dtype", "wrong positions"],
)
def test_results_that_make_no_sense_fail_their_steps_and_nothing_else(spoil):
    bench = Bench(columns=True)
    told(bench)
    steps = [bench.step("a", 1), bench.step("b", 2)]
    stream, message = bench.send()
    answer = in_columns([bench.gateway.apply(request) for request in requests_in(message)])
    spoil(answer.columns[0])
    bench.pipeline.received(answer, stream)
    for step in steps:
        assert step.error.code().name == "INTERNAL"
        assert "makes no sense" in step.error.details()
        step.mark_seen()
    again = bench.step("a", 1)
    bench.settle()
    assert outputs(again) == [1]


def test_each_output_is_an_array_of_its_own():
    bench = Bench(columns=True)
    told(bench)
    steps = [bench.step("a", 3), bench.step("b", 4)]
    stream, message = bench.send()
    assert len(message.columns) == 1
    bench.answer(stream, message)
    first, second = (step.result() for step in steps)
    first[:] = 9
    assert second.tolist() == [[4]]
    assert first.base is None
    assert second.base is None


def test_steps_that_are_traced_or_that_the_gateway_has_to_judge_go_by_themselves():
    bench = Bench()
    plain, traced = bench.step("a", 1), bench.step("b", 1)
    traced.traceparent = "00-1-2-01"
    assert look_of(plain, 0.0) is not None
    assert look_of(traced, 0.0) is None
    assert look_of(bench.step("c"), 0.0) is None  # no time step
