"""Which steps go as columns together."""

from hypothesis import given
from hypothesis import strategies as st

from service.client.columns import Sorter, look_of
from tests.service.client.pipeline_bench import Bench

NOW = 100.0


# Hundredths of a second, which is what limits are rounded to, and a part of one more.
LEFT = st.tuples(st.integers(-2, 4), st.sampled_from([0.2, 0.8])).map(lambda left: sum(left) / 100)


@given(steps=st.lists(st.tuples(st.integers(0, 2), LEFT, st.booleans()), max_size=12))
def test_steps_are_sorted_by_what_each_looks_like_by_itself(steps):
    bench = Bench()
    sorter, expected = Sorter(NOW, columns=True), {}
    for number, (length, left, traced) in enumerate(steps):
        step = bench.step(f"s{number}", *range(length))
        step.deadline, step.traceparent = NOW + left, "00-1-2-01" if traced else ""
        sorter.add(step)
        expected.setdefault(look_of(step, NOW), []).append(step)
    assert sorter.alike == expected
