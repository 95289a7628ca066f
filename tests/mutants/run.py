"""Breaks the exactly-once protocol on purpose, one rule of it at a time, and shows that a test notices each.

    python tests/mutants/run.py [--only NAME] [--jobs 1]

Each mutant is a change of a few words, made in a copy of the sources. The test that is named with it has to fail there;
it passes on the sources as they are, which is checked first. Exit code 0: every mutant was caught.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("service", "protos", "tests/service", "docs/durability.md", "pyproject.toml")

MEMORY = "service/sessions/memory.py"
SESSIONS = "service/sessions/__init__.py"
ENGINE = "service/engine.py"
EXPRESS = "service/express.py"
SINGLE = "service/single.py"
COLUMNS = "service/columns.py"
ALIKE = "service/alike.py"
PIPELINE = "service/client/pipeline.py"
BLOB = "service/sessions/blob.py"
STORE = "service/sessions/redis/store.py"
COMMIT = "service/sessions/redis/scripts/commit.lua"

CONTRACT = "tests/service/sessions/store_contract_test.py::"
CLIENT_BLOCKS = "tests/service/client/blocks_chance_test.py::"
COHORT = "tests/service/sessions/cohort_test.py::"
COHORTS = "tests/service/cohorts_test.py::"
PROTOCOL = "tests/service/sessions/protocol_test.py::"
FAILURES = "tests/service/sessions/redis/failures_test.py::"
REDIS = "tests/service/sessions/redis/store_test.py::"
DURABILITY = "tests/service/sessions/redis/durability_test.py::"


class Mutant(NamedTuple):
    """A rule that is broken.

    Attributes:
        name: What is wrong with it.
        file: Where.
        before: The text that is replaced; it stands there once.
        after: By what.
        test: What has to fail.
    """

    name: str
    file: str
    before: str
    after: str
    test: str


MUTANTS = (
    Mutant(
        "memory: no compare-and-set",
        MEMORY,
        "if session.token != ran_on:",
        "if False:",
        f"{CONTRACT}test_of_many_commits_on_one_session_one_is_written[memory]",
    ),
    Mutant(
        "valkey: no compare-and-set",
        COMMIT,
        "if at[1] ~= token then",
        "if false then",
        f"{CONTRACT}test_of_many_commits_on_one_session_one_is_written[valkey]",
    ),
    Mutant(
        "valkey: no compare-and-set, seen by the model",
        COMMIT,
        "if at[1] ~= token then",
        "if false then",
        f"{PROTOCOL}test_exactly_once_over_valkey",
    ),
    Mutant(
        "memory: compares the position instead of the token",
        MEMORY,
        "if session.token != ran_on:",
        "if session.position != begin:",
        f"{CONTRACT}test_a_commit_does_not_reach_a_session_that_was_made_anew[memory]",
    ),
    Mutant(
        "valkey: compares the position instead of the token",
        COMMIT,
        "if at[1] ~= token then",
        "if at[2] ~= new_begin then",
        f"{CONTRACT}test_a_commit_does_not_reach_a_session_that_was_made_anew[valkey]",
    ),
    Mutant(
        "judge: no replay",
        SESSIONS,
        "return Verdict.REPLAY if digest == last.digest else Verdict.CONFLICT",
        "return Verdict.MISMATCH",
        f"{PROTOCOL}test_exactly_once_over_memory",
    ),
    Mutant(
        "valkey: no replay",
        COMMIT,
        "verdict = 'replay'",
        "verdict = 'mismatch'",
        f"{CONTRACT}test_a_commit_is_refused_where_the_session_has_moved_on[valkey]",
    ),
    Mutant(
        "judge: no digest",
        SESSIONS,
        "return Verdict.REPLAY if digest == last.digest else Verdict.CONFLICT",
        "return Verdict.REPLAY",
        f"{CONTRACT}test_of_many_commits_on_one_session_one_is_written[memory]",
    ),
    Mutant(
        "valkey: no digest",
        COMMIT,
        "elseif digest == at[4] then",
        "elseif true then",
        f"{CONTRACT}test_of_many_commits_on_one_session_one_is_written[valkey]",
    ),
    Mutant(
        "engine: answers before the commit",
        ENGINE,
        "            outcome = await self._store.commit(call.key, commit)\n",
        "            self._early = asyncio.ensure_future(self._store.commit(call.key, commit))\n"
        "            return commit.reply\n",
        f"{PROTOCOL}test_exactly_once_over_memory",
    ),
    Mutant(
        "express: answers before the commit",
        EXPRESS,
        "        self._store.commit_soon(\n            take(",
        "        ran_on = enumerate(take(steps.sessions, rows))\n"
        "        steps._through(rows, [commits.of(at, session).reply for at, session in ran_on])\n"
        "        self._store.commit_soon(\n            take(",
        f"{PROTOCOL}test_exactly_once_over_valkey",
    ),
    Mutant(
        "express: a commit that was refused is answered as if it had been written",
        EXPRESS,
        "                came.append(None)\n",
        "                came.append(one.session.last and one.session.last.reply)\n",
        f"{PROTOCOL}test_exactly_once_over_valkey",
    ),
    Mutant(
        "express: does not look whether a step is the next",
        EXPRESS,
        "if session is not None and key not in held and (position is None or position == session.position)",
        "if session is not None and key not in held",
        f"{PROTOCOL}test_exactly_once_over_memory",
    ),
    Mutant(
        "express: of steps that go together, one gets the state of another",
        EXPRESS,
        "calls.digests.take(places), outputs, states, native)",
        "calls.digests.take(places), outputs, states[::-1], native)",
        f"{PROTOCOL}test_exactly_once_over_memory",
    ),
    Mutant(
        "cohort: is written whatever has become of its sessions",
        MEMORY,
        "if there.get(sessions.keys[0]) is not sessions or sessions.expires <= now:",
        "if sessions.expires <= now:",
        f"{COHORT}test_a_commit_on_what_has_moved_on_is_refused_for_each",
    ),
    Mutant(
        "cohort: is made of sessions that have moved on",
        MEMORY,
        "there.get(session.info.key) is session and session.expires > now for",
        "session.expires > now for",
        f"{COHORT}test_where_one_session_has_moved_on_only_the_others_are_written",
    ),
    Mutant(
        "cohort: one of its sessions is written by itself, and it stays",
        MEMORY,
        "            self._part(session)\n            return self._alone(key)\n",
        "            return session.session(key)\n",
        f"{COHORT}test_cohorts_are_the_sessions_that_they_stand_for",
    ),
    Mutant(
        "cohort: takes the native states of a whole batch for those of a part",
        "service/sessions/cohort.py",
        "return np.array(states), None",
        "return np.array(states), native",
        f"{COHORT}test_a_part_of_a_result_does_not_hold_on_to_the_whole",
    ),
    Mutant(
        "cohort: is stepped again while it is being stepped",
        EXPRESS,
        "if held.isdisjoint(cohort.keys) and _are",
        "if _are",
        f"{COHORTS}test_a_cohort_that_is_being_stepped_is_not_begun_again",
    ),
    Mutant(
        "cohort: does not look whether its steps are the next",
        EXPRESS,
        "    return asked == positions or all(",
        "    return True or all(",
        f"{PROTOCOL}test_exactly_once_over_memory",
    ),
    Mutant(
        "express: what was given up while it ran is committed all the same",
        EXPRESS,
        "        if steps.gone:\n",
        "        if False:\n",
        "tests/service/express_test.py::test_of_steps_that_go_together_one_may_be_given_up_and_one_fail",
    ),
    Mutant(
        "express: steps a session whose turn another step has",
        EXPRESS,
        "if session is not None and key not in held and (position",
        "if session is not None and (position",
        f"{PROTOCOL}test_exactly_once_over_memory",
    ),
    Mutant(
        "single: answers before the commit",
        SINGLE,
        "        self._store.commit_one_soon(",
        "        step._end(reply)\n        self._store.commit_one_soon(",
        "tests/service/unary_step_test.py::test_a_step_is_answered_only_once_its_commit_is_through",
    ),
    Mutant(
        "single: a commit that was refused is answered as if it had been written",
        SINGLE,
        "            self._singles.refused(self, told)\n            came = None\n",
        "            came = told.session.last and told.session.last.reply\n",
        "tests/service/at_once_test.py::test_a_session_that_is_another_one_by_the_commit_is_left_to_the_long_way",
    ),
    Mutant(
        "single: does not look whether a step is the next",
        SINGLE,
        "if session is None or not (call.position is None or call.position == session.position):",
        "if session is None:",
        f"{PROTOCOL}test_exactly_once_over_memory",
    ),
    Mutant(
        "single: steps a session whose turn another step has",
        SINGLE,
        "if call.key in self._held:",
        "if False:",
        f"{PROTOCOL}test_exactly_once_over_memory",
    ),
    Mutant(
        "single: what was given up while it ran is committed all the same",
        SINGLE,
        "        if self.gone:\n",
        "        if False:\n",
        "tests/service/express_test.py::test_what_is_given_up_while_it_runs_is_not_committed",
    ),
    Mutant(
        "columns: results are named from the front, whichever steps they are of",
        ALIKE,
        "names = take(self.names, places)",
        "names = self.names[: len(places)]",
        "tests/service/columns_test.py::test_results_are_rendered_in_blocks_that_fit_a_message",
    ),
    Mutant(
        "columns: a step that goes by itself takes the inputs of the first",
        COLUMNS,
        "self.content[at * each : (at + 1) * each]",
        "self.content[:each]",
        "tests/service/columns_test.py::test_columns_are_read_as_their_requests_are",
    ),
    Mutant(
        "columns: two steps of one session in the same columns run side by side",
        "service/step_stream.py",
        "if len(sessions) == len(columns.session_ids) and not (",
        "if not (",
        "tests/service/columns_test.py::test_the_same_step_twice_among_columns_is_applied_once_and_answered_twice",
    ),
    Mutant(
        "client: columns go to a gateway that has not said that it takes them",
        PIPELINE,
        "columns=stream == self._columns_on",
        "columns=True",
        "tests/service/client/columns_test.py::test_a_gateway_that_does_not_say_so_gets_no_columns_and_a_new_stream_begins_without",
    ),
    Mutant(
        "client: takes a result for a step that ends elsewhere",
        PIPELINE,
        "        if position == end:\n",
        "        if True:\n",
        "tests/service/client/columns_test.py::test_results_that_make_no_sense_fail_their_steps_and_nothing_else",
    ),
    Mutant(
        "client: takes the same result of a block twice",
        "service/client/blocks.py",
        "            and self._answered.find(1, first, last) < 0\n",
        "",
        "tests/service/client/blocks_test.py::test_a_result_that_comes_again_is_taken_once",
    ),
    Mutant(
        "client: sends a block for a session that has a step under way",
        "service/client/blocks.py",
        "if line.active is not None or line.failure is not None or",
        "if line.failure is not None or",
        f"{CLIENT_BLOCKS}test_blocks_and_steps_of_the_same_sessions_are_applied_once_and_in_order",
    ),
    Mutant(
        "client: forgets what was sent as a block on a stream that is lost",
        "service/client/underway.py",
        "        self.break_up_on(stream)\n        lost",
        "        lost",
        "tests/service/client/blocks_test.py::test_what_was_sent_as_a_block_on_a_stream_that_is_lost_is_sent_again",
    ),
    Mutant(
        "client: a block that was given up after its answers came counts as seen",
        PIPELINE,
        "                self.cancel(each)\n",
        "                pass\n",
        f"{CLIENT_BLOCKS}test_a_caller_who_gives_a_block_up_and_repeats_gets_each_sequence_once",
    ),
    Mutant(
        "memory: a commit makes a session that is not there",
        MEMORY,
        "        self._require(key)\n"
        "        session = self._alone(key)\n"
        "        if session is None:\n"
        "            raise _not_found(key)\n",
        "        session = self._sessions.get(key)\n"
        "        if session is None:\n"
        "            info = SessionInfo(key, VersionKey('sums', 1), 'f1', 60.0, b'', 0.0)\n"
        "            session = Session(info, commit.begin, None, None, commit.token, 0.0, 0.0)\n",
        f"{CONTRACT}test_a_commit_never_makes_a_session[memory]",
    ),
    Mutant(
        "valkey: a commit makes a session that is not there",
        COMMIT,
        "  return {'gone', now}\n",
        "  redis.call('HSET', session, 'ver', 'sums/1', 'fp', 'f1', 'ttl', 60000, 'cd', '', 'made', whole(now))\n"
        "  at = {token, position, '', '', whole(now), '60000', 'sums/1'}\n",
        f"{CONTRACT}test_a_commit_never_makes_a_session[valkey]",
    ),
    Mutant(
        "valkey: a commit keeps the old token",
        COMMIT,
        "'tok', new_token,",
        "'tok', token,",
        f"{CONTRACT}test_of_many_commits_on_one_session_one_is_written[valkey]",
    ),
    Mutant(
        "engine: refuses out of a cache",
        ENGINE,
        "        if verdict is not Verdict.RUN:\n"
        "            # What the caller is told must not come out of a cache.\n"
        "            session = await self._store.load(call.key, fresh=True)\n",
        "        if verdict is not Verdict.RUN:\n",
        f"{PROTOCOL}test_exactly_once_over_valkey",
    ),
    Mutant(
        "engine: a step whose history is another is not run again, but committed anyway",
        ENGINE,
        "            verdict, session = outcome.verdict, outcome.session\n",
        "            verdict, session = outcome.verdict, outcome.session\n"
        "            if verdict is Verdict.RUN:\n"
        "                await self._store.commit(call.key, commit._replace(token=session.token))\n"
        "                return commit.reply\n",
        f"{PROTOCOL}test_a_step_that_ran_on_a_lost_history_is_run_again_on_the_real_one[memory]",
    ),
    Mutant(
        "valkey: a commit without an answer is called 'nothing committed'",
        STORE,
        "            raise CommitUnknown(",
        "            raise StoreUnavailable(",
        f"{FAILURES}test_a_commit_that_gets_no_answer_is_unknown_and_not_lost",
    ),
    Mutant(
        "valkey: a cancelled caller tears its command",
        STORE,
        "return await asyncio.shield(task)",
        "return await task",
        f"{REDIS}test_a_cancelled_caller_leaves_no_copy_that_is_out_of_date",
    ),
    Mutant(
        "valkey: a replayed reply does not wait to be durable",
        STORE,
        "self._fresh_reads = self._writes if barrier else self._reads",
        "self._fresh_reads = self._reads",
        f"{DURABILITY}test_a_commit_that_too_few_replicas_have_is_unknown",
    ),
    Mutant(
        "blob: the checksum is not looked at",
        BLOB,
        "    if checksum.of(binding, memoryview(blob)[:end]) != blob[end:]:",
        "    if False:",
        f"{REDIS}test_every_broken_byte_of_a_state_is_refused",
    ),
    Mutant(
        "blob: the checksum does not say whose state it is",
        BLOB,
        "    if checksum.of(binding, memoryview(blob)[:end]) != blob[end:]:",
        "    if False:",
        f"{REDIS}test_another_sessions_state_is_refused",
    ),
)


def main() -> int:
    """Runs every mutant against its test; returns how many were not caught."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="only the mutants whose name has this in it")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="how many at once")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not arguments.only or arguments.only in mutant.name]
    if not check_sound(sorted({mutant.test for mutant in chosen})):
        print("the tests do not pass on the sources as they are: nothing can be said about the mutants")
        return 2
    with ThreadPoolExecutor(arguments.jobs) as pool:
        caught = list(pool.map(is_caught, chosen))
    for mutant, is_so in zip(chosen, caught, strict=True):
        print(f"{'caught  ' if is_so else 'SURVIVED'}  {mutant.name}\n          {mutant.test}")
    print(f"{sum(caught)} of {len(chosen)} mutants caught")
    return 0 if all(caught) else 1


def check_sound(tests: list[str]) -> bool:
    """Whether the tests pass where nothing is broken."""
    with tempfile.TemporaryDirectory(prefix="sound-") as folder:
        return run_tests(copy_sources(Path(folder)), tests, expected=(0,)) == 0


def is_caught(mutant: Mutant) -> bool:
    """Whether the named test fails on the mutant."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        root = copy_sources(Path(folder))
        path = root / mutant.file
        source = path.read_text()
        if source.count(mutant.before) != 1:
            raise SystemExit(
                f"{mutant.file} has this {source.count(mutant.before)} times, not once; the mutant"
                f" {mutant.name!r} has to be brought up to date:\n{mutant.before}"
            )
        path.write_text(source.replace(mutant.before, mutant.after))
        # Exit code 1 is a test that failed; anything else would be a mutant that does not even run.
        return run_tests(root, [mutant.test]) == 1


def copy_sources(folder: Path) -> Path:
    """A copy of what the tests need, without what they left behind."""
    for name in COPIED:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    return folder


def run_tests(root: Path, tests: list[str], *, expected: tuple[int, ...] = (0, 1)) -> int:
    """Pytest's exit code for some tests of a copy, which is imported in place of the installed sources.

    Where it is none of those expected, what pytest said is printed.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "protos")]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(root / ".hypothesis"),
    }
    # Native: pytest's own tracebacks parse the sources, for which a mutant's failure may leave too little of the stack.
    options = ["-q", "-x", "--tb", "native", "-p", "no:cacheprovider", "--timeout", "600"]
    options += ["--hypothesis-profile", "no-shrinking"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in expected:
        print(done.stdout[-2000:], done.stderr[-2000:], sep="\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
