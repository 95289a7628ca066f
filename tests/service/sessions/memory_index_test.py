"""The index of ids beside the sessions in memory: it follows every way in which sessions come and go."""

import random

from service.sessions import SessionInfo
from service.sessions.memory import MemoryStore
from service.types import SessionKey, VersionKey


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def info(key, ttl):
    return SessionInfo(key=key, version=VersionKey("m", 1), fingerprint="f", ttl=ttl, create_digest=b"", created=0.0)


async def test_lists_are_those_of_a_store_that_looks_at_every_session():
    clock, rng = Clock(), random.Random(0)
    store = MemoryStore(max_sessions=50, clock=clock)
    for _ in range(3000):
        key = SessionKey(rng.choice("pq"), f"{rng.randrange(40):02}")
        match rng.randrange(6):
            case 0 | 1 | 2:
                if len(store._sessions) < 50:
                    await store.create(info(key, rng.uniform(1, 30)))
            case 3:
                await store.delete(key)
            case 4:
                clock.now += rng.random()
            case 5 if rng.random() < 0.2:
                await store.sweep()
        after, limit = f"{rng.randrange(40):02}", rng.randrange(1, 9)
        wanted = sorted(
            name
            for (principal, name), session in store._sessions.items()
            if principal == key.principal and name > after and session.expires > clock.now
        )
        listed = await store.list_sessions(key.principal, after=after, limit=limit)
        assert [summary.info.key.session_id for summary in listed] == wanted[:limit]
    assert {SessionKey(p, name) for p, names in store._ids.items() for name in names} == set(store._sessions)
    clock.now += 100
    await store.sweep()
    assert store._ids == {}
