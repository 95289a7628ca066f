"""What every session store does: each test runs over both."""

import asyncio

import numpy as np
import pytest

from service.errors import SessionExists, SessionLimit, SessionNotFound
from service.sessions import Committed, Refused, SessionStore, Verdict, judge
from service.types import VersionKey
from tests.service.sessions.benches import MemoryBench, RedisBench, commit_on, digest_of, info_of, key_of, same

KEY = key_of()


@pytest.fixture(params=["memory", "valkey"])
def make_bench(request, prefix):
    def make(**options):
        if request.param == "memory":
            return MemoryBench(**options)
        return RedisBench(request.getfixturevalue("valkey"), prefix, **options)

    return make


@pytest.fixture
async def bench(make_bench):
    bench = make_bench()
    yield bench
    await bench.close()


@pytest.fixture
def store(bench) -> SessionStore:
    return bench.store


@pytest.fixture
async def opened(store):
    return await store.create(info_of())


async def committed(store, commit, key=KEY):
    outcome = await store.commit(key, commit)
    assert isinstance(outcome, Committed), outcome
    return outcome.session


async def refused(store, commit, key=KEY):
    outcome = await store.commit(key, commit)
    assert isinstance(outcome, Refused), outcome
    return outcome


async def test_a_new_session_stands_at_the_start(store):
    session = await store.create(info_of(ttl=60))
    assert (session.position, session.state, session.last) == (0, None, None)
    assert len(session.token) == 16
    assert session.info == info_of(ttl=60)._replace(created=session.info.created)
    assert session.expires == pytest.approx(session.info.created + 60)
    assert same(session, await store.load(KEY))
    assert same(session, await store.load(KEY, fresh=True))


async def test_the_same_create_finds_its_session_as_it_is_now(store, bench, opened):
    stepped = await committed(store, commit_on(opened))
    assert same(stepped, await bench.other().create(info_of()))
    assert same(stepped, await store.create(info_of()))


async def test_another_create_of_a_taken_id_is_refused_and_changes_nothing(store, bench, opened):
    for other in (bench.other(), store):
        with pytest.raises(SessionExists):
            await other.create(info_of(request="another"))
    assert same(opened, await store.load(KEY, fresh=True))


async def test_a_session_can_begin_with_a_state(store, bench):
    state = np.arange(7, dtype=np.float32)
    session = await store.create(info_of(), state=state, position=40)
    for found in (session, await bench.other().load(KEY, fresh=True)):
        assert found.position == 40
        assert found.last is None
        np.testing.assert_array_equal(found.state, state)


async def test_a_commit_is_what_everybody_reads_next(store, bench, opened):
    commit = commit_on(opened, steps=3)
    session = await committed(store, commit)
    assert session.token not in (opened.token, b"")
    assert session.position == 3
    for found in (session, await store.load(KEY), await bench.other().load(KEY, fresh=True)):
        assert same(session, found)
        np.testing.assert_array_equal(found.state, commit.state)
        np.testing.assert_array_equal(found.last.reply.outputs, commit.reply.outputs)
        assert found.last.reply.position == 3
        assert (found.last.begin, found.last.digest) == (0, commit.digest)


async def test_a_chain_of_commits_goes_on_from_gateway_to_gateway(store, bench, opened):
    stores, session = [store, bench.other()], opened
    for number in range(10):
        held = await stores[number % 2].load(KEY, fresh=True)
        assert same(held, session)
        session = await committed(stores[number % 2], commit_on(held, steps=number + 1))
    assert session.position == 55


async def test_a_commit_is_refused_where_the_session_has_moved_on(store, bench, opened):
    session = await committed(store, commit_on(opened, steps=2, inputs="first"))
    cases = [
        (0, "first", Verdict.REPLAY),
        (0, "second", Verdict.CONFLICT),
        (1, "first", Verdict.MISMATCH),
        (2, "first", Verdict.RUN),
        (None, "first", Verdict.RUN),
        (3, "first", Verdict.MISMATCH),
    ]
    for at in (store, bench.other()):
        for position, inputs, verdict in cases:
            outcome = await refused(at, commit_on(opened, inputs=inputs, position=position))
            assert outcome.verdict is verdict, (position, inputs)
            assert same(outcome.session, session)
    assert same(session, await store.load(KEY, fresh=True))


async def test_the_verdict_of_a_refusal_is_that_of_judge(store, opened):
    session = opened
    for steps in (1, 3):
        session = await committed(store, commit_on(session, steps=steps, inputs=steps))
        for position in (None, *range(6)):
            for inputs in (1, 3):
                outcome = await refused(store, commit_on(opened, inputs=inputs, position=position))
                assert outcome.verdict is judge(session, position, digest_of(inputs))


async def test_positions_differ_to_the_last_bit(store):
    """The whole of int64 counts: a double would take these two for the same."""
    begin = 2**53
    opened = await store.create(info_of(), state=np.zeros(7, np.float32), position=begin)
    session = await committed(store, commit_on(opened))
    assert session.position == begin + 1
    assert (await refused(store, commit_on(opened, position=begin + 1))).verdict is Verdict.RUN
    assert (await refused(store, commit_on(opened, position=begin))).verdict is Verdict.REPLAY
    assert (await store.load(KEY, fresh=True)).position == begin + 1


async def test_of_many_commits_on_one_session_one_is_written(store, bench, opened):
    stores = [store, bench.other()]
    commits = [commit_on(opened, inputs=number, seed=number) for number in range(20)]
    outcomes = await asyncio.gather(*(stores[n % 2].commit(KEY, commit) for n, commit in enumerate(commits)))
    written = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, Committed)]
    assert len(written) == 1
    np.testing.assert_array_equal((await store.load(KEY, fresh=True)).state, commits[written[0]].state)
    assert {outcome.verdict for outcome in outcomes if isinstance(outcome, Refused)} == {Verdict.CONFLICT}


async def test_a_commit_never_makes_a_session(store, bench, opened):
    await bench.other().delete(KEY)
    for at in (store, bench.other()):
        with pytest.raises(SessionNotFound):
            await at.commit(KEY, commit_on(opened))
    with pytest.raises(SessionNotFound):
        await store.load(KEY, fresh=True)
    assert await store.counts() == {}
    assert await store.list_sessions("p", limit=10) == []


async def test_a_commit_does_not_reach_a_session_that_was_made_anew(store, bench, opened):
    """The same id at the same position: only the token tells that it is another history."""
    await bench.other().delete(KEY)
    anew = await bench.other().create(info_of(request="anew"))
    outcome = await refused(store, commit_on(opened))
    assert outcome.verdict is Verdict.RUN
    assert same(outcome.session, anew)
    assert same(anew, await store.load(KEY, fresh=True))


async def test_a_commit_does_not_reach_a_session_that_expired_and_was_made_anew(store, bench):
    opened = await store.create(info_of(ttl=10))
    bench.elapse(11)
    anew = await store.create(info_of(ttl=10))
    assert anew.token != opened.token
    assert (await refused(store, commit_on(opened))).verdict is Verdict.RUN
    assert same(anew, await store.load(KEY, fresh=True))


async def test_unknown_sessions_are_not_found(store):
    for fresh in (False, True):
        with pytest.raises(SessionNotFound):
            await store.load(KEY, fresh=fresh)
    await store.delete(KEY)
    await store.extend(KEY, 5)


async def test_owners_never_meet(store, bench):
    first = await store.create(info_of(key_of("a", "p")))
    second = await store.create(info_of(key_of("a", "p/q"), request="second"))
    third = await store.create(info_of(key_of("a", "müller & söhne\n"), request="third"))
    await store.delete(first.info.key)
    for session in (second, third):
        assert same(session, await bench.other().load(session.info.key, fresh=True))
        found = await store.list_sessions(session.info.key.principal, limit=5)
        assert [summary.info for summary in found] == [session.info]
    assert await store.list_sessions("p", limit=5) == []


async def test_a_session_expires(store, bench):
    await store.create(info_of(ttl=10))
    bench.elapse(9)
    assert (await store.load(KEY, fresh=True)).position == 0
    bench.elapse(2)
    for at, fresh in ((store, False), (store, True), (bench.other(), False)):
        with pytest.raises(SessionNotFound):
            await at.load(KEY, fresh=fresh)
    assert await store.counts() == {}


async def test_a_commit_renews_a_session_and_a_read_does_not(store, bench):
    session = await store.create(info_of(ttl=10))
    bench.elapse(6)
    session = await committed(store, commit_on(session))
    bench.elapse(6)
    await store.load(KEY, fresh=True)
    await bench.other().load(KEY, fresh=True)
    await store.list_sessions("p", limit=1)
    bench.elapse(6)
    with pytest.raises(SessionNotFound):
        await store.commit(KEY, commit_on(session))


async def test_a_session_that_is_checked_out_outlives_its_ttl(store, bench):
    session = await store.create(info_of(ttl=2))
    await store.extend(KEY, 30)
    await store.extend(KEY, 5)
    bench.elapse(20)
    session = await committed(store, commit_on(session))
    assert session.expires == pytest.approx(session.last_used + 2)
    bench.elapse(3)
    with pytest.raises(SessionNotFound):
        await store.load(KEY)


async def test_there_are_no_more_sessions_than_the_limit(make_bench):
    bench = make_bench(max_sessions=3)
    store = bench.store
    try:
        for number in range(3):
            await store.create(info_of(key_of(f"s{number}"), ttl=10 if number else 100))
        with pytest.raises(SessionLimit):
            await bench.other().create(info_of(key_of("more")))
        await store.create(info_of(key_of("s0"), ttl=100))  # the same create again is no new session
        await store.delete(key_of("s0"))
        await store.create(info_of(key_of("more"), ttl=100))
        bench.elapse(11)  # the other two have expired
        for number in range(2):
            await bench.other().create(info_of(key_of(f"after{number}")))
        with pytest.raises(SessionLimit):
            await store.create(info_of(key_of("again")))
        assert await store.counts() == {VersionKey("sums", 1): 3}
    finally:
        await bench.close()


async def test_one_owner_s_sessions_are_no_more_than_its_limit_however_many_are_made_at_once(store, bench):
    def create(name, principal="p", ttl=100):
        return bench.other().create(info_of(key_of(name, principal), ttl=ttl), owner_limit=3)

    first = (await create("s0")).info.key
    outcomes = await asyncio.gather(*(create(f"s{number}", ttl=10) for number in range(1, 12)), return_exceptions=True)
    made = [first, *(outcome.info.key for outcome in outcomes if not isinstance(outcome, Exception))]
    assert len(made) == 3
    assert all(isinstance(outcome, SessionLimit) for outcome in outcomes if isinstance(outcome, Exception))
    assert {session.info.key for session in await store.list_sessions("p", limit=20)} == set(made)
    await create("s0")  # the same create again is no new session
    await create("s0", "another")
    await store.delete(first)
    await create("more")
    with pytest.raises(SessionLimit, match="at most 3 sessions"):
        await create("again")
    bench.elapse(11)  # two of the first have expired
    for number in range(2):
        await create(f"after{number}")
    with pytest.raises(SessionLimit):
        await create("again")


async def test_counts_are_of_live_sessions_by_version(store, bench):
    await store.create(info_of(key_of("a"), ttl=10))
    await store.create(info_of(key_of("b"), ttl=100))
    stays = await store.create(info_of(key_of("c", "another"), version=2))
    assert await store.counts() == {VersionKey("sums", 1): 2, VersionKey("sums", 2): 1}
    bench.elapse(11)
    assert await bench.other().counts() == {VersionKey("sums", 1): 1, VersionKey("sums", 2): 1}
    await store.delete(key_of("b"))
    await store.delete(key_of("b"))
    await committed(store, commit_on(stays), stays.info.key)
    assert await store.counts() == {VersionKey("sums", 2): 1}


async def test_sweeping_leaves_the_living(store, bench):
    await store.create(info_of(key_of("a"), ttl=10))
    stays = await store.create(info_of(key_of("b"), ttl=100))
    bench.elapse(11)
    assert set(await store.sweep()) <= {key_of("a")}
    assert same(stays, await store.load(key_of("b"), fresh=True))
    assert await store.counts() == {VersionKey("sums", 1): 1}


async def test_lists_are_in_order_and_in_pages(store, bench):
    names = [f"s{number:02}" for number in range(7)]
    for name in reversed(names):
        await store.create(info_of(key_of(name)))
    await store.create(info_of(key_of("s00", "another")))
    await committed(store, commit_on(await store.load(key_of("s03")), steps=4), key_of("s03"))
    pages, after = [], ""
    while page := await bench.other().list_sessions("p", after=after, limit=3):
        pages.append([summary.info.key.session_id for summary in page])
        after = pages[-1][-1]
    assert pages == [names[:3], names[3:6], names[6:]]
    third = (await store.list_sessions("p", after="s02", limit=1))[0]
    session = await store.load(key_of("s03"), fresh=True)
    assert third == (session.info, 4, session.last_used, session.expires)


async def test_lists_leave_out_the_expired_and_the_deleted(store, bench):
    for name, ttl in (("a", 10), ("b", 100), ("c", 10), ("d", 100), ("e", 100)):
        await store.create(info_of(key_of(name), ttl=ttl))
    await store.delete(key_of("d"))
    bench.elapse(11)
    assert [s.info.key.session_id for s in await store.list_sessions("p", limit=2)] == ["b", "e"]


async def test_a_cancelled_commit_is_applied_whole_or_not_at_all(store, bench, opened):
    session = opened
    for turns in range(12):
        commit = commit_on(session, seed=turns, inputs=turns)
        task = asyncio.create_task(store.commit(KEY, commit))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        # Whatever became of it, the same step again ends in the same place.
        outcome = await store.commit(KEY, commit)
        session = outcome.session
        assert isinstance(outcome, Committed) or outcome.verdict is Verdict.REPLAY
        np.testing.assert_array_equal(session.state, commit.state)
        assert same(session, await bench.other().load(KEY, fresh=True))


async def test_closing_twice_is_safe(store, opened):
    await store.close()
    await store.close()
