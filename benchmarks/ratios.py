"""The ratios that the project holds itself to, out of one run of ``serving.py``: medians over its turns.

Throughput is told over that of the NumPy step on one core, so that a machine's speed cancels out: the aims were set
where NumPy made 33,000 steps a second.
"""

import statistics

NUMPY_REFERENCE = 33_000


def of(results):
    """Name, value, aim and whether it is met, for each."""
    live = results["live"]

    def median(ratio):
        return statistics.median(ratio(turn) for turn in results["turns"])

    def over(name, base):
        return median(lambda turn: _rate(turn[name]) / _rate(turn[base]))

    def over_best(name):
        # Measured before and after: the machine's speed may change by more than this ratio in the seconds between.
        return median(lambda turn: 2 * _rate(turn[name]) / (_rate(turn["best"]) + _rate(turn["best_after"])))

    beyond = median(lambda turn: turn["one"]["p50_ms"] - turn["alone"]["ms"] - turn["echo"]["p50_ms"])
    share = median(lambda turn: turn["full"]["gateway_cpu_us"] / turn["full"]["executor_cpu_us"])
    return [
        _least("256 sessions x 16 steps, over the bare executor at its best", over_best("full"), 0.85),
        _most("its gateway CPU over its executor CPU", share, 0.20),
        _least("256 sessions x 16 steps of an asyncio client, likewise", over_best("full_asyncio"), 0.85),
        _least("64 sessions x 1 step, over NumPy", over("single", "numpy"), 14_000 / NUMPY_REFERENCE),
        _least(
            "64 sessions x 1 step of an asyncio client, likewise",
            over("single_asyncio", "numpy"),
            14_000 / NUMPY_REFERENCE,
        ),
        _least("64 connections x 1 step, over NumPy", over("streams", "numpy"), 3_900 / NUMPY_REFERENCE),
        _most("1 session x 1 step, p50 beyond bare call and bare echo, ms", beyond, 0.25),
        _least("64 sessions x 1 step, over the same with batches of one", over("single", "batch_1"), 8),
        _least("bare executor 64 x 16, over C++ on two threads", over("together", "cpp"), 0.5),
        _most("p50 that the gateway adds to a bare Predict, ms", results["predict"]["added_ms"], 0.6),
        _most("CPU a step, 10,000 live sessions over 64", live["many_us"] / live["few_us"], 1.10),
    ]


def _rate(measured):
    return measured if isinstance(measured, float) else measured["steps_per_s"]


def _least(name, value, bound):
    return {"name": name, "value": value, "aim": f"at least {bound:.3g}", "met": value >= bound}


def _most(name, value, bound):
    return {"name": name, "value": value, "aim": f"at most {bound:.3g}", "met": value <= bound}
