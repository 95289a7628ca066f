"""The two stores behind one face, with time that a test moves by hand."""

import contextlib
import hashlib

import numpy as np

from service.sessions import Commit, SessionInfo
from service.sessions.memory import MemoryStore
from service.sessions.redis import RedisStore
from service.types import SessionKey, StepReply, VersionKey

# Every time that the store holds, moved into the past: what is left of it is as if so many milliseconds had gone by.
_BACKDATE = """
local moved = tonumber(ARGV[2])
for _, key in ipairs(redis.call('KEYS', ARGV[1] .. 'session:*')) do
  for _, field in ipairs({'made', 'used', 'exp'}) do
    local at = redis.call('HGET', key, field)
    redis.call('HSET', key, field, string.format('%.0f', at - moved))
  end
  redis.call('PEXPIREAT', key, redis.call('HGET', key, 'exp'))
end
local index = ARGV[1] .. 'expiry'
for _, member in ipairs(redis.call('ZRANGE', index, 0, -1)) do
  redis.call('ZINCRBY', index, -moved, member)
end
"""


# What a store is given that is not to give up: a busy machine is not what is tested.
PATIENCE = {"timeout": 30.0, "connect_timeout": 30.0}


class MemoryBench:
    def __init__(self, max_sessions=100):
        self.now = 1000.0
        self.store = MemoryStore(max_sessions=max_sessions, clock=lambda: self.now)

    def other(self):
        """Another gateway's store over the same sessions; in memory there is only the one."""
        return self.store

    def elapse(self, seconds):
        self.now += seconds

    async def close(self):
        await self.store.close()


class RedisBench:
    def __init__(self, valkey, prefix, max_sessions=100, **options):
        self.valkey = valkey
        self.prefix = prefix
        self.options = {"max_sessions": max_sessions, "prefix": prefix, **PATIENCE, **options}
        self.stores = []
        self.store = self.other()

    def other(self, **options):
        self.stores.append(RedisStore(self.valkey.url, **{**self.options, **options}))
        return self.stores[-1]

    def elapse(self, seconds):
        self.valkey.client.eval(_BACKDATE, 0, self.prefix, round(1000 * seconds))
        for store in self.stores:
            for key, session in store._cache._sessions.items():
                store._cache._sessions[key] = session._replace(expires=session.expires - seconds)

    async def close(self):
        for store in self.stores:
            await store.close()


@contextlib.contextmanager
def impatient(store, seconds):
    """The store gives up so soon; only where it has to, so that a busy machine makes no difference elsewhere."""
    links = (store._writes, store._reads)
    patience = [(link._timeout, link._connect_timeout) for link in links]
    for link in links:
        link._timeout = link._connect_timeout = seconds
    yield
    for link, before in zip(links, patience, strict=True):
        link._timeout, link._connect_timeout = before


def key_of(session_id="a", principal="p"):
    return SessionKey(principal, session_id)


def info_of(key=None, *, ttl=60.0, request="create", version=1, fingerprint="f1"):
    return SessionInfo(
        key=key or key_of(),
        version=VersionKey("sums", version),
        fingerprint=fingerprint,
        ttl=ttl,
        create_digest=digest_of(request),
        created=0.0,
    )


def digest_of(text):
    return hashlib.sha256(str(text).encode()).digest()


def commit_on(session, steps=1, inputs="inputs", position="its own", seed=0):
    """A step of ``steps`` time steps that ran on ``session``."""
    random = np.random.default_rng([seed, session.position])
    after = session.position + steps
    return Commit(
        token=session.token,
        position=session.position if position == "its own" else position,
        begin=session.position,
        digest=digest_of(inputs),
        state=random.normal(size=7).astype(np.float32),
        reply=StepReply(after, random.normal(size=(steps, 3)).astype(np.float32)),
    )


def same(one, two):
    """Whether two sessions are of the same commit, arrays and all."""
    facts = [
        (s.info, s.position, s.token, None if s.last is None else (s.last.begin, s.last.digest)) for s in (one, two)
    ]
    return facts[0] == facts[1] and _equal(one.state, two.state) and _equal(_outputs(one), _outputs(two))


def _outputs(session):
    return None if session.last is None else session.last.reply.outputs


def _equal(one, two):
    if one is None or two is None:
        return one is two
    return one.shape == two.shape and one.dtype == two.dtype and np.array_equal(one, two)
