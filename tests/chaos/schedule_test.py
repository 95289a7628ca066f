"""What the chaos suite decides by its seed, and how it reads its own record. The suite itself is ``run.py``."""

from tests.chaos.faults import FAULTS, schedule
from tests.chaos.run import longest_pauses


def test_a_seed_is_a_schedule():
    assert schedule(7, 50, 1.0) == schedule(7, 50, 1.0)
    assert schedule(7, 50, 1.0) != schedule(8, 50, 1.0)


def test_every_kind_strikes_before_any_does_so_again():
    kinds = [strike.kind for strike in schedule(3, 2 * len(FAULTS), 1.0)]
    assert len(FAULTS) >= 8
    assert set(kinds[: len(FAULTS)]) == set(kinds[len(FAULTS) :]) == set(FAULTS)


def test_a_pause_counts_for_the_fault_that_it_began_with():
    answers = [(0.0, "a"), (1.0, "a"), (4.0, "a"), (4.1, "a"), (1.0, "b"), (1.5, "b"), (9.0, "b")]
    strikes = [("first", 1.1, 1.3), ("second", 3.0, 5.0), ("first", 7.0, 8.0)]
    assert longest_pauses(answers, strikes) == {"first": (2, 3.0), "second": (1, 0.0)}
