"""Writes the README's section "Performance" out of ``results/serving.json``: ``python benchmarks/report.py``.

``--check`` changes nothing, and fails where the section is not what the results say. Without results it is empty.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "serving.json"
README = ROOT / "README.md"
MODES = {"coalesced": "coalesced, blocking client", "asyncio": "coalesced, asyncio client"}
BEGIN, END = "<!-- benchmarks/report.py writes this -->", "<!-- to here -->"


def section(results):
    """The text between the marks."""
    machine = results["machine"]
    lines = [
        f"`make bench`, {machine['date']}: {machine['processor']}, {machine['cores']} cores, Python "
        f"{machine['python']};",
        f"of the cores' time the host gave {machine['stolen']:.1%} to others;",
        "an NTM of 128 slots x 20 with an LSTM controller of 100 in the gateway's process, clients on the same cores.",
        "",
        "| closed loop | steps a request | steps/s | p50 ms | p99 ms | CPU us a request: client, gateway, executor |",
        "|---|---|---|---|---|---|",
        *(_row(case) for case in results["gateway"] if case["mode"] != "open"),
        "",
        "Brief batches run on the gateway's own thread: their CPU is in its column.",
        "",
        "| open loop, Poisson, 256 sessions | answered a second | p50 ms | p90 ms | p99 ms |",
        "|---|---|---|---|---|",
        *(_open_row(case) for case in results["gateway"] if case["mode"] == "open"),
        "",
        f"For scale: NumPy makes {_median(results, 'numpy'):,.0f} steps/s at batch 64 on one core, C++ "
        f"{_median(results, 'cpp'):,.0f} on two,",
        f"the bare executor at its best {max(c['steps_per_s'] for c in results['bare']):,.0f}.",
        "",
        "| ratio, in the same run, median of turns | figure | aim |",
        "|---|---|---|",
        *(f"| {ratio['name']} | {ratio['value']:.2f} | {ratio['aim']} |" for ratio in results["ratios"]),
    ]
    return "\n".join(lines) + "\n"


def _median(results, name):
    return statistics.median(turn[name] for turn in results["turns"])


def _row(case):
    cpu = ", ".join(f"{case[part + '_cpu_us']:.0f}" for part in ("client", "gateway", "executor"))
    mode = MODES.get(case["mode"], case["mode"])
    sessions = f"{mode}, {case['sessions']} session{'s' if case['sessions'] > 1 else ''}"
    return (
        f"| {sessions} | {case['steps']} | {case['steps_per_s']:,.0f} | {case['p50_ms']:.2f} | {case['p99_ms']:.2f} "
        f"| {cpu} |"
    )


def _open_row(case):
    return (
        f"| {case['rate']:,.0f} offered a second | {case['requests_per_s']:,.0f} | {case['p50_ms']:.2f} "
        f"| {case['p90_ms']:.2f} | {case['p99_ms']:.2f} |"
    )


def with_section(readme, text):
    """The README with the text between its marks.

    Raises:
        ValueError: it has not both marks.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"expected {BEGIN!r} and {END!r} in the README")
    return f"{before}{BEGIN}\n{text}{END}{after}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    readme = README.read_text()
    wanted = with_section(readme, section(json.loads(RESULTS.read_text())) if RESULTS.exists() else "")
    if options.check:
        if readme != wanted:
            print("the README's section on performance is not what benchmarks/results/serving.json says: make bench")
        return int(readme != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
