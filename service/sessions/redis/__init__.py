"""Sessions in a Valkey or Redis server that any number of gateways share.

``store.py`` is the store, ``scripts/`` what the server runs for it, ``link.py`` the connection, ``endpoint.py`` the
URL, ``durability.py`` what a commit waits for, ``records.py`` the form of a session, ``cache.py`` the local copies.
"""

from service.sessions.redis.endpoint import redacted
from service.sessions.redis.store import RedisStore

__all__ = ["RedisStore", "redacted"]
