"""Blocks and single steps of the same sessions, whatever the network and the caller do: each step is applied once."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from service.client.errors import GatewayError
from service.client.retry import RetryPolicy
from tests.service.client.pipeline_bench import FOREVER, Bench, told
from tests.service.client.pipeline_chance_test import FAULTS, meet

ROUND = st.fixed_dictionaries(
    {
        "how": st.sampled_from(["block", "block", "steps", "both", "a session twice", "two blocks"]),
        "length": st.integers(1, 3),
        "odd": st.booleans(),  # the last session's inputs have another shape
        "faults": st.lists(FAULTS, max_size=4),
        "settle": st.booleans(),
    }
)


def values(number, session, length):
    return [float(number * 100 + session * 10 + k) for k in range(length)]


def ask(bench, how, chunks):
    """Asks for a step of each session; returns what was asked for, each with its sessions."""
    if how == "block":
        return [(bench.block(*chunks), [chunk[0] for chunk in chunks])]
    if how == "steps":
        return [(bench.step(*chunk), [chunk[0]]) for chunk in chunks]
    if how == "a session twice":
        twice = [*chunks, chunks[0]]
        return [(bench.block(*twice), [chunk[0] for chunk in twice])]
    middle = len(chunks) // 2 if how == "two blocks" else 1
    return ask(bench, "steps" if how == "both" else "block", chunks[:middle]) + ask(bench, "block", chunks[middle:])


@settings(deadline=None, max_examples=150)
@given(sessions=st.integers(2, 5), rounds=st.lists(ROUND, min_size=1, max_size=6), columns=st.booleans())
def test_blocks_and_steps_of_the_same_sessions_are_applied_once_and_in_order(sessions, rounds, columns):
    bench = Bench(columns, policy=RetryPolicy(breaks=1000))
    told(bench)
    whole = {f"s{n}": [] for n in range(sessions)}
    asked, expected = [], []
    for number, a_round in enumerate(rounds):
        lengths = [a_round["length"]] * sessions
        lengths[-1] += a_round["odd"]
        chunks = [(f"s{n}", *values(number, n, lengths[n])) for n in range(sessions)]
        inputs = {name: list(rest) for name, *rest in chunks}
        for work, names in ask(bench, a_round["how"], chunks):
            asked.append(work)
            expected.append([])
            for name in names:
                before = sum(whole[name])
                whole[name] += inputs[name]
                expected[-1].append((before + np.cumsum(inputs[name])).tolist())
        meet(bench, a_round["faults"])
        if a_round["settle"]:
            bench.settle()
        bench.tell()
    bench.settle()
    bench.tell()
    for name, history in whole.items():
        assert bench.gateway.applied[name] == history
        assert bench.lines[name].position == bench.lines[name].tail == len(history)
        assert bench.lines[name].active is None
    assert len(bench.ended) == 1 + len(asked)  # each once: `told` had a step too
    for work, outcome in zip(asked, expected, strict=True):
        results = work.results() if hasattr(work, "results") else [work.result()]
        assert [result.ravel().tolist() for result in results] == outcome


@settings(deadline=None, max_examples=150)
@given(
    sessions=st.integers(2, 4),
    lengths=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    faults=st.lists(st.lists(FAULTS, max_size=3), max_size=12),
    moods=st.lists(st.sampled_from(["wait", "cancel", "expire", "close one"]), max_size=12),
    columns=st.booleans(),
)
def test_a_caller_who_gives_a_block_up_and_repeats_gets_each_sequence_once(sessions, lengths, faults, moods, columns):
    bench = Bench(columns, policy=RetryPolicy(breaks=1000))
    told(bench)
    faults, moods = iter(faults), iter(moods)
    got = {f"s{n}": [] for n in range(sessions)}
    whole = {name: [] for name in got}
    closed = set()
    asked = 0
    for number, length in enumerate(lengths):
        left = {name: values(number, n, length) for n, name in enumerate(got) if name not in closed}
        for name, chunk in left.items():
            whole[name] += chunk
        while left:
            mood = next(moods, "wait")
            asked += 1
            block = bench.block(
                *((name, *chunk) for name, chunk in left.items()), timeout=3 if mood == "expire" else FOREVER
            )
            meet(bench, next(faults, ["answer"]))
            if mood == "cancel":
                bench.pipeline.cancel(block)
            elif mood == "expire":
                bench.clock.now += 3
                bench.pipeline.tick()
            elif mood == "close one" and len(closed) < sessions - 1:
                closed.add(min(left))
                bench.pipeline.close_line(bench.lines[min(left)], "closed")
            if mood in ("wait", "close one"):
                bench.settle()
            bench.tell()
            block.mark_seen()
            for name, outcome in zip(list(left), block.outcomes(), strict=True):
                if not isinstance(outcome, GatewayError):
                    got[name] += outcome.ravel().tolist()
                    del left[name]
                elif name in closed:
                    del left[name]
    assert len(bench.ended) == 1 + asked
    for name in got:
        if name in closed:
            assert bench.gateway.applied[name] == whole[name][: len(bench.gateway.applied[name])]
        else:
            assert bench.gateway.applied[name] == whole[name]
            assert got[name] == np.cumsum(whole[name]).tolist()
