"""Breaks a running service in every way there is, while sessions are stepped, and holds it to exactly once.

    python tests/chaos/run.py [--minutes 1] [--sessions 24] [--seed N] [--keep FOLDER] [--report FILE.json]

Two gateways, a model server and a Valkey (appendfsync always) run in processes of their own; a seeded schedule of
faults strikes them one after the other. Every output that a client gets must be that of the undisturbed run, and
in the end every session must stand where its client knows that it does, state and all. Exit code 0: so it was, and
enough was done for that to mean something: a machine that is too slow for the least of it in the time given is given
up to three times as long. `--minutes 10 --sessions 200` is the full size.

The seed decides which faults strike, when, and what the clients do; how the processes interleave is up to the machine.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import grpc

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ntm_serving.v1 import sequence_service_pb2 as pb  # noqa: E402 - after the path that makes this a script
from service.client import AsyncSequenceClient  # noqa: E402
from tests.chaos.clients import PATIENCE_S, BadUser, LibraryUser, Record, stubs_for  # noqa: E402
from tests.chaos.faults import FAULTS, schedule  # noqa: E402
from tests.chaos.stack import Stack  # noqa: E402


def main():
    arguments = parse_arguments()
    print(f"chaos: seed {arguments.seed}, {arguments.sessions} sessions, {arguments.minutes:g} minutes", flush=True)
    if arguments.keep is not None:
        arguments.keep.mkdir(parents=True, exist_ok=True)
        report = asyncio.run(run(arguments, arguments.keep))
    else:
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            report = asyncio.run(run(arguments, Path(folder)))
    show(report)
    if arguments.report is not None:
        arguments.report.write_text(json.dumps(report, indent=2) + "\n")
    failures = report["violations"] + shortfalls(report, arguments)
    for failure in failures[:20]:
        print(f"FAILED  {failure}")
    if failures:
        same = f"--seed {arguments.seed} --sessions {arguments.sessions} --minutes {arguments.minutes:g}"
        print(f"{len(failures)} failures; again: python tests/chaos/run.py {same}")
    return 1 if failures else 0


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="how long faults strike")
    parser.add_argument("--sessions", type=int, default=24, help="how many sessions are stepped all the time")
    parser.add_argument("--seed", type=int, default=None, help="replays a schedule; otherwise a new one")
    parser.add_argument("--quiet", type=float, default=1.0, help="seconds between faults, on average")
    parser.add_argument("--only", default="", help="only the faults whose name has this in it")
    parser.add_argument("--keep", type=Path, help="folder that logs and data stay in")
    parser.add_argument("--report", type=Path, help="writes the figures as JSON")
    arguments = parser.parse_args()
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().randrange(10**6)
    return arguments


async def run(arguments, folder):
    """The whole of it; returns the report."""
    export_model(folder / "models")
    stack = Stack(folder, folder / "models")
    try:
        await stack.start()
        return await strike(arguments, stack)
    finally:
        await stack.stop()


def export_model(folder):
    command = [sys.executable, "-m", "tests.chaos.model", str(folder)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the model could not be exported:\n{done.stderr}")


async def strike(arguments, stack):
    record, over = Record(), asyncio.Event()
    channels, stubs = stubs_for(stack.addresses())
    client = AsyncSequenceClient(f"ipv4:{','.join(stack.addresses())}")
    users = [
        LibraryUser(n, arguments.seed, record, client) if n % 2 else BadUser(n, arguments.seed, record, stubs)
        for n in range(arguments.sessions)
    ]
    tasks = [asyncio.create_task(user.run(over)) for user in users]
    began = time.monotonic()
    strikes = await break_things(arguments, stack, record, tasks)
    seconds = time.monotonic() - began
    over.set()
    await asyncio.gather(*tasks)
    await verify(users, stubs, record)
    await client.close()
    for channel in channels:
        await channel.close()
    return report_of(arguments, record, strikes, seconds, stack.refusals())


async def break_things(arguments, stack, record, tasks):
    """Strikes by the schedule, until the time is over and enough was done; returns (kind, begin, end) of each fault."""
    choose, strikes, began = random.Random(arguments.seed), [], time.monotonic()
    for wait, kind, lasts in schedule(arguments.seed, 5000, arguments.quiet):
        if arguments.only not in kind:
            continue
        await asyncio.sleep(wait)
        minutes = (time.monotonic() - began) / 60
        enough = not shortfalls(report_of(arguments, record, strikes, 60 * minutes, stack.refusals()), arguments)
        if minutes > arguments.minutes * (1 if enough else 3) or all(task.done() for task in tasks):
            break
        begin = time.monotonic()
        async with FAULTS[kind](stack, choose):
            await asyncio.sleep(lasts)
        strikes.append((kind, begin, time.monotonic()))
    return strikes


async def verify(users, stubs, record):
    """Every session stands where its client is, on either gateway, and its state is that of the undisturbed run."""
    for user in users:
        for stub in stubs:
            reply = await inspect(stub, user.name)
            counters = b"".join(part.value.content for part in reply.state)
            if reply.session.position != user.position:
                record.violations.append(f"{user.name}: stands at {reply.session.position}, not at {user.position}")
            elif user.position and counters != user.chain.state.astype("<f4").tobytes():
                record.violations.append(f"{user.name}: the state is not that of the undisturbed run")


async def inspect(stub, name):
    """A session's state; the gateway may have yet to find out that what it needs is there again."""
    request, began = pb.InspectSessionRequest(session_id=name), time.monotonic()
    while True:
        try:
            return await stub.InspectSession(request, timeout=20)
        except grpc.aio.AioRpcError as error:
            waited = time.monotonic() - began
            if error.code() is not grpc.StatusCode.UNAVAILABLE or waited > PATIENCE_S:
                raise
            await asyncio.sleep(0.2)


def report_of(arguments, record, strikes, seconds, refusals):
    return {
        "seed": arguments.seed,
        "sessions": arguments.sessions,
        "seconds": round(seconds, 1),
        "faults": len(strikes),
        "kinds": len({kind for kind, _, _ in strikes}),
        "tally": dict(record.tally),
        "refused_commits": refusals,
        "commits_per_second": round(record.tally["commits"] / seconds, 1),
        "longest_pause_s": longest_pauses(record.answers, strikes),
        "violations": record.violations,
    }


def longest_pauses(answers, strikes):
    """By kind of fault: how many struck, and the longest that any session waited for an answer meanwhile."""
    times = defaultdict(list)
    for when, name in answers:
        times[name].append(when)
    gaps = [(early, late) for whens in times.values() for early, late in itertools.pairwise(whens)]
    gaps = sorted(gap for gap in gaps if gap[1] - gap[0] > 0.2)
    pauses = {}
    for kind, begin, end in strikes:
        count, longest = pauses.get(kind, (0, 0.0))
        # Counted for the fault that it began with: 0.3 s before that is the longest that a step takes undisturbed.
        during = [late - early for early, late in gaps if begin - 0.3 < early < end and late > begin]
        pauses[kind] = (count + 1, round(max([longest, *during]), 2))
    return dict(sorted(pauses.items()))


def shortfalls(report, arguments):
    """What was too little to show anything, for the time that it ran."""
    if arguments.only:
        return []
    full = arguments.minutes >= 10
    refused = sum(report["refused_commits"].values())
    least = {
        "faults": (report["faults"], 100 if full else 8),
        "kinds of faults": (report["kinds"], 8 if full else 6),
        "commits": (report["tally"].get("commits", 0), 100_000 if full else 2_000),
        "replays served": (report["tally"].get("replays", 0), 20),
        "commits refused by compare-and-set": (refused, 20 if full else 5),
    }
    return [f"{count} {what}; expected at least {enough}" for what, (count, enough) in least.items() if count < enough]


def show(report):
    print(f"{report['faults']} faults of {report['kinds']} kinds in {report['seconds']} s")
    print(f"{report['tally'].get('commits', 0)} commits, {report['commits_per_second']} a second")
    print(", ".join(f"{count} {what}" for what, count in sorted(report["tally"].items()) if what != "commits"))
    print("refused commits:", ", ".join(f"{count} {what}" for what, count in report["refused_commits"].items()))
    print(f"{'fault':28} {'times':>5}  longest pause of any session")
    for kind, (count, pause) in report["longest_pause_s"].items():
        print(f"{kind:28} {count:5}  {pause:.2f} s")
    print(f"{len(report['violations'])} lost, repeated or wrong")


if __name__ == "__main__":
    sys.exit(main())
