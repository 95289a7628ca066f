"""The README's section on performance is what the committed results say."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import ratios
import report


def case(mode, sessions, steps, steps_per_s, **more):
    return {
        "mode": mode,
        "sessions": sessions,
        "steps": steps,
        "steps_per_s": steps_per_s,
        "requests_per_s": steps_per_s / steps,
        **{f"p{level}_ms": level / 10 for level in (50, 90, 99)},
        **{f"{part}_cpu_us": 10.0 for part in ("client", "gateway", "executor")},
        **more,
    }


def turn(number):
    """Everything ``number`` times as fast, but NumPy, C++ and the bare executor."""
    return {
        "numpy": 33_000.0,
        "cpp": 100_000.0,
        "single": case("coalesced", 64, 1, 14_000.0 * number),
        "single_asyncio": case("asyncio", 64, 1, 13_500.0 * number),
        "batch_1": case("coalesced", 64, 1, 1_000.0),
        "streams": case("stream", 64, 1, 3_900.0 * number),
        "echo": {"p50_ms": 0.1},
        "one": case("stream", 1, 1, 1_000.0, p50_ms=0.5),
        "alone": {"ms": 0.3},
        "best": {"steps_per_s": 110_000.0},
        "best_after": {"steps_per_s": 90_000.0},
        "full": case("coalesced", 256, 16, 40_000.0 * number),
        "full_asyncio": case("asyncio", 256, 16, 44_000.0 * number),
        "together": {"steps_per_s": 60_000.0},
    }


@pytest.fixture
def results():
    found = {
        "machine": {"processor": "one", "cores": 2, "python": "3", "date": "today", "stolen": 0.0123},
        "bare": [{"steps_per_s": 100_000.0}],
        "turns": [turn(1), turn(2), turn(9)],
        "gateway": [case("coalesced", 1, 1, 500.0), case("open", 256, 1, 900.0, rate=1000.0)],
        "predict": {"added_ms": 0.7},
        "live": {"few_us": 100.0, "many_us": 105.0},
    }
    return {**found, "ratios": ratios.of(found)}


def test_the_readme_quotes_the_committed_results(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_ratios_are_medians_over_turns_and_know_their_aims(results):
    found = [(ratio["value"], ratio["met"]) for ratio in results["ratios"]]
    expected = [
        (0.8, False),  # over the bare executor
        (1.0, False),  # gateway over executor
        (0.88, True),  # the asyncio client over the bare executor
        (28_000 / 33_000, True),  # coalesced, over NumPy
        (27_000 / 33_000, True),  # of the asyncio client
        (7_800 / 33_000, True),  # a stream each, over NumPy
        (0.1, True),  # beyond bare call and echo
        (28.0, True),  # over batches of one
        (0.6, True),  # bare over C++
        (0.7, False),  # added to Predict
        (1.05, True),  # live sessions
    ]
    assert [met for _, met in found] == [met for _, met in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected])


def test_a_changed_figure_changes_the_section(results):
    before = report.section(results)
    assert "| coalesced, blocking client, 1 session | 1 | 500 |" in before
    assert "| 1,000 offered a second | 900 |" in before
    results["ratios"][0]["value"] = 0.91
    after = report.section(results)
    assert [b for a, b in zip(before.splitlines(), after.splitlines(), strict=True) if a != b] == [
        "| 256 sessions x 16 steps, over the bare executor at its best | 0.91 | at least 0.85 |"
    ]


def test_only_what_is_between_the_marks_is_written():
    readme = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.with_section(readme, "new\n") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    with pytest.raises(ValueError, match="expected"):
        report.with_section("no marks", "new")
