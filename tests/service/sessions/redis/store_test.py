"""What the shared store does beyond the contract: cost, caches, forms, broken data."""

import asyncio

import numpy as np
import pytest

from service.errors import CorruptState, SessionNotFound, StoreUnavailable
from service.sessions import Committed, Verdict
from service.sessions.redis import RedisStore, redacted
from tests.service.sessions.benches import RedisBench, commit_on, digest_of, info_of, key_of, same

KEY = key_of()


@pytest.fixture
async def bench(valkey, prefix):
    bench = RedisBench(valkey, prefix)
    yield bench
    await bench.close()


def round_trips(store):
    return store._writes.exchanges + store._reads.exchanges


async def step(store, key, seed=0):
    """What the engine does with a session, without the model."""
    session = await store.load(key)
    await store.extend(key, 30)
    outcome = await store.commit(key, commit_on(session, seed=seed))
    assert isinstance(outcome, Committed)


async def test_a_step_is_one_round_trip(bench):
    store = bench.store
    await store.create(info_of())
    await step(store, KEY)
    before = round_trips(store)
    for seed in range(10):
        await step(store, KEY, seed)
    assert round_trips(store) - before == 10


async def test_the_commits_of_a_batch_share_a_round_trip(bench):
    store = bench.store
    keys = [key_of(f"s{number}") for number in range(64)]
    await asyncio.gather(*(store.create(info_of(key)) for key in keys))
    await asyncio.gather(*(step(store, key) for key in keys))
    before = round_trips(store)
    await asyncio.gather(*(step(store, key) for key in keys))
    assert round_trips(store) - before == 1


async def test_the_server_is_asked_to_extend_only_where_the_session_would_expire(bench):
    store = bench.store
    await store.create(info_of(ttl=60))
    await store.extend(key_of("none"), 1)  # a script is sent whole when it is first used
    before = round_trips(store)
    await store.extend(KEY, 30)
    assert round_trips(store) == before
    await store.extend(KEY, 100)
    assert round_trips(store) == before + 1
    bench.elapse(90)
    assert (await store.load(KEY, fresh=True)).position == 0


async def test_a_fresh_read_sends_no_state_that_is_here(bench):
    store = bench.store
    session = await store.create(info_of(), state=np.zeros(100_000, np.float32))
    sent = bench.valkey.client.info("stats")["total_net_output_bytes"]
    assert same(session, await store.load(KEY, fresh=True))
    assert bench.valkey.client.info("stats")["total_net_output_bytes"] - sent < 20_000
    assert same(session, await bench.other().load(KEY, fresh=True))
    assert bench.valkey.client.info("stats")["total_net_output_bytes"] - sent > 400_000


async def test_a_copy_that_is_out_of_date_is_refused_and_replaced(bench):
    one, two = bench.store, bench.other()
    await one.create(info_of())
    mine = await one.load(KEY)
    theirs = (await two.commit(KEY, commit_on(await two.load(KEY)))).session
    assert same(await one.load(KEY), mine)  # the copy
    assert same(await one.load(KEY, fresh=True), theirs)
    assert same(await one.load(KEY), theirs)
    await one.delete(KEY)
    assert same(await two.load(KEY), theirs)  # a copy again: only a commit or a fresh read shows that it is gone
    with pytest.raises(SessionNotFound):
        await two.commit(KEY, commit_on(theirs))
    with pytest.raises(SessionNotFound):
        await two.load(KEY)


async def test_a_cancelled_caller_leaves_no_copy_that_is_out_of_date(bench):
    """The commit goes on without it, and what comes back is kept."""
    store = bench.store
    session = await store.create(info_of())
    exchanges = store._writes.exchanges
    task = asyncio.create_task(store.commit(KEY, commit_on(session)))
    for _ in range(100):
        if store._writes.exchanges == exchanges:  # not sent yet
            await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait(store._under_way)
    assert (await store.load(KEY)).position == 1
    assert same(await store.load(KEY), await bench.other().load(KEY))


async def test_copies_are_bounded_by_bytes(bench):
    store = bench.other(cache_bytes=20_000)
    sessions = {}
    for number in range(10):
        session = await store.create(info_of(key_of(f"s{number}")), state=np.full(1000, number, np.float32))
        sessions[session.info.key] = session
    assert len(store._cache) == 3
    assert store._cache.nbytes <= 20_000
    for key, session in sessions.items():
        assert same(await store.load(key), session)
    for key, session in sessions.items():  # of most, no copy is left when the commit comes
        assert isinstance(await store.commit(key, commit_on(session)), Committed)


async def test_no_copies_at_all_work_too(bench):
    store = bench.other(cache_bytes=0)
    await store.create(info_of())
    for seed in range(3):
        await step(store, KEY, seed)
    assert (await store.load(KEY)).position == 3
    assert store._cache.nbytes == 0


@pytest.mark.parametrize("write_form", [1, 2])
async def test_gateways_of_two_releases_share_a_store(bench, write_form):
    """Each reads both forms; what either writes, the other goes on from."""
    one, two = bench.other(write_form=write_form), bench.other(write_form=3 - write_form)
    session = await one.create(info_of(), state=np.ones(4, np.float32))
    for number in range(4):
        store = (two, one)[number % 2]
        assert same(await store.load(KEY, fresh=True), session)
        session = (await store.commit(KEY, commit_on(session, seed=number))).session
        body = bench.valkey.client.hget(f"{bench.prefix}session:p/a", "body")
        assert body[2] == (3 - write_form, write_form)[number % 2]


# Bodies of one and the same session as both forms have been written since the first release.
STORED = {
    1: (
        "4e5301033f524cdc07a11d7c6220bdb049fe8dd405000000000000000300000000000000000102030405060708090a0b"
        "0c0d0e0f101112131415161718191a1b1c1d1e1f30313233343536373839616263646566040000000200000003000000"
        "000080bfabaaaabeabaaaa3e0000803f000000000000803f0000004000004040000080400000a040b298eabc"
    ),
    2: (
        "4e5302033f524cdc07a11d7c6220bdb049fe8dd405000000000000000300000000000000000102030405060708090a0b"
        "0c0d0e0f101112131415161718191a1b1c1d1e1f30313233343536373839616263646566040000000200000003000000"
        "000080bfabaaaabeabaaaa3e0000803f000000000000803f0000004000004040000080400000a0407138881e99e18a5a"
        "feee398b7ec0b66d"
    ),
}


@pytest.mark.parametrize("form", [1, 2])
async def test_what_an_earlier_release_stored_goes_on(bench, form):
    """Field by field as it lies in a server: names, texts and bytes are what releases that share a store agree on."""
    key = key_of("a", "müller/\u00ad")
    fields = {
        "ver": "sums/1",
        "fp": "f1",
        "ttl": 60000,
        "cd": digest_of("create"),
        "made": 1_700_000_000_000,
        "used": 1_700_000_000_001,
        "exp": 9_000_000_000_000,
        "tok": b"0123456789abcdef",
        "pos": 5,
        "beg": 3,
        "dig": bytes(range(32)),
        "body": bytes.fromhex(STORED[form]),
    }
    bench.valkey.client.hset(f"{bench.prefix}session:müller/\u00ad/a", mapping=fields)
    session = await bench.store.load(key)
    assert (session.position, session.last.begin, session.last.reply.position) == (5, 3, 5)
    np.testing.assert_array_equal(session.state, np.linspace(-1, 1, 4, dtype=np.float32))
    outcome = await bench.store.commit(key, commit_on(session))
    assert same(await bench.other().load(key), outcome.session)
    assert bench.valkey.client.hgetall(f"{bench.prefix}session:müller/\u00ad/a").keys() == {
        name.encode() for name in fields
    }


async def test_the_older_form_is_written_until_told_otherwise(bench):
    await bench.store.create(info_of())
    assert bench.valkey.client.hget(f"{bench.prefix}session:p/a", "body")[2] == 1


@pytest.mark.parametrize("form", [1, 2])
@pytest.mark.parametrize("field", ["body", "tok", "pos", "beg", "dig", "fp", "ver", "ttl", "cd", "made", "used"])
async def test_a_broken_field_is_refused_and_never_run_on(bench, field, form):
    store = bench.other(write_form=form)
    session = await store.create(info_of())
    await store.commit(KEY, commit_on(session))
    name = f"{bench.prefix}session:p/a"
    stored = bench.valkey.client.hget(name, field)
    bench.valkey.client.hset(name, field, b"x" + stored[1:])
    with pytest.raises(CorruptState):
        await bench.other().load(KEY)
    with pytest.raises(CorruptState):
        await bench.other().commit(KEY, commit_on(session))


async def test_every_broken_byte_of_a_state_is_refused(bench):
    session = await bench.store.create(info_of())
    await bench.store.commit(KEY, commit_on(session))
    reader, name = bench.other(), f"{bench.prefix}session:p/a"
    body = bench.valkey.client.hget(name, "body")
    for place in range(3, len(body), 7):
        broken = bytearray(body)
        broken[place] ^= 0x10
        bench.valkey.client.hset(name, "body", bytes(broken))
        with pytest.raises(CorruptState):
            await reader.load(KEY)
    bench.valkey.client.hset(name, "body", body)
    assert (await reader.load(KEY)).position == 1


async def test_a_missing_field_is_refused(bench):
    await bench.store.create(info_of())
    bench.valkey.client.hdel(f"{bench.prefix}session:p/a", "body")
    with pytest.raises(CorruptState, match="11 of 12"):
        await bench.other().load(KEY)


async def test_another_sessions_state_is_refused(bench):
    """A whole record copied over another's: each part of it is sound, the place is wrong."""
    for name in ("a", "b"):
        session = await bench.store.create(info_of(key_of(name)))
        await bench.store.commit(key_of(name), commit_on(session))
    bench.valkey.client.copy(f"{bench.prefix}session:p/b", f"{bench.prefix}session:p/a", replace=True)
    with pytest.raises(CorruptState):
        await bench.other().load(key_of("a"))
    assert (await bench.other().load(key_of("b"))).position == 1


async def test_a_broken_session_does_not_hide_the_others_from_a_list(bench, caplog):
    for name in ("a", "b", "c"):
        await bench.store.create(info_of(key_of(name)))
    bench.valkey.client.hset(f"{bench.prefix}session:p/b", "ver", "?")
    found = await bench.store.list_sessions("p", limit=10)
    assert [summary.info.key.session_id for summary in found] == ["a", "c"]
    assert "left out of a list" in caplog.text


async def test_an_evicted_session_is_gone_and_its_id_is_free(bench):
    session = await bench.store.create(info_of())
    bench.valkey.client.delete(f"{bench.prefix}session:p/a")
    with pytest.raises(SessionNotFound):
        await bench.store.commit(KEY, commit_on(session))
    assert await bench.store.list_sessions("p", limit=5) == []
    anew = await bench.store.create(info_of(request="another"))
    assert anew.token != session.token
    assert await bench.store.counts() == {anew.info.version: 1}
    await bench.store.delete(KEY)
    assert await bench.store.counts() == {}


async def test_nothing_is_left_of_sessions_that_are_over(bench):
    for number in range(30):
        await bench.store.create(info_of(key_of(f"s{number}", f"p{number % 3}"), ttl=10))
    for number in range(15):
        await bench.store.delete(key_of(f"s{number}", f"p{number % 3}"))
    bench.elapse(11)
    await bench.store.sweep()
    assert bench.valkey.client.keys(f"{bench.prefix}*") == []


async def test_a_server_that_forgot_the_scripts_is_told_them_again(bench):
    session = await bench.store.create(info_of())
    bench.valkey.client.script_flush()
    outcome = await bench.store.commit(KEY, commit_on(session))
    assert isinstance(outcome, Committed)
    bench.valkey.client.script_flush()
    assert same(await bench.other().load(KEY), outcome.session)


async def test_a_step_that_two_gateways_run_is_applied_once(bench):
    one, two = bench.store, bench.other()
    opened = await one.create(info_of())
    await two.load(KEY)
    commit = commit_on(opened)
    outcomes = await asyncio.gather(one.commit(KEY, commit), two.commit(KEY, commit))
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Committed", "Refused"]
    refusal = next(outcome for outcome in outcomes if not isinstance(outcome, Committed))
    assert refusal.verdict is Verdict.REPLAY
    np.testing.assert_array_equal(refusal.session.last.reply.outputs, commit.reply.outputs)


async def test_a_store_that_was_closed_says_so(bench):
    await bench.store.create(info_of())
    await bench.store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await bench.store.load(KEY)


@pytest.mark.parametrize("options", [{"durability": "always"}, {"durability": ""}, {"write_form": 3}])
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        RedisStore("redis://127.0.0.1:1/0", max_sessions=1, **options)


@pytest.mark.parametrize("url", ["http://host", "redis+sentinel://host:1", "memory"])
def test_urls_of_nothing_known_are_refused(url):
    with pytest.raises(ValueError, match=r"expected|scheme"):
        RedisStore(url, max_sessions=1)


def test_no_password_is_shown():
    assert redacted("redis://user:se@cret@host:1/0?password=secret") == "redis://***@host:1/0"
    assert redacted("redis+sentinel://:secret@a:1,b:2/name") == "redis+sentinel://***@a:1,b:2/name"
    assert redacted("redis://host:1/0") == "redis://host:1/0"
