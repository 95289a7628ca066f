"""The replicas behind an address, and what they serve between them."""

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import grpc

from service.executors.serving_replica import Endpoint, Replica
from service.types import ModelVersion, VersionKey, VersionState, VersionStatus

_log = logging.getLogger(__name__)

_DNS = "dns:///"
# Of what replicas say of a version that none of them serves, what tells the most.
_TELLING = (VersionState.LOADING, VersionState.DRAINING, VersionState.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class PollPolicy:
    """How replicas are looked after.

    Attributes:
        interval: Seconds between two questions to a replica for what it serves.
        timeout: Seconds after which one that has not answered counts as unresponsive.
        resolve_interval: Seconds between two look-ups of a ``dns:///`` name.
        hold: Seconds that a version number which came to stand for another model is held back. Whatever was queued for
            the old model is refused meanwhile, so that none of it can run on the new one.
    """

    interval: float
    timeout: float
    resolve_interval: float
    hold: float


class ReplicaSet:
    """Finds replicas, joins what they serve, and tells which of them can run a version.

    Args:
        targets: ``HOST:PORT`` each, or ``dns:///HOST:PORT`` for all of its addresses.
        models: The names of the models to ask for.
        credentials: For TLS; None for none.
        policy: How they are looked after.
    """

    def __init__(
        self,
        targets: Sequence[str],
        models: Sequence[str],
        *,
        credentials: grpc.ChannelCredentials | None,
        policy: PollPolicy,
    ) -> None:
        self._targets = targets
        self._models = models
        self._credentials = credentials
        self._policy = policy
        self._replicas: dict[Endpoint, Replica] = {}
        self._versions: dict[VersionKey, ModelVersion] = {}
        self._fingerprints: dict[VersionKey, str] = {}
        self._held: dict[VersionKey, float] = {}
        self._changed = asyncio.Event()
        self._resolver: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Looks the targets up and begins to ask."""
        await self._resolve()
        self._resolver = asyncio.create_task(self._resolve_for_ever(), name="resolve model servers")

    async def close(self) -> None:
        """Closes every channel; calls under way fail."""
        if self._resolver is not None:
            self._resolver.cancel()
            await asyncio.gather(self._resolver, return_exceptions=True)
        replicas, self._replicas = list(self._replicas.values()), {}
        await asyncio.gather(*(replica.close() for replica in replicas))
        self._versions = {}

    def versions(self) -> Mapping[VersionKey, ModelVersion]:
        """What at least one replica serves; while one of them is away, also what it served last."""
        return self._versions

    def statuses(self) -> dict[VersionKey, VersionStatus]:
        """Of every version that a replica knows of."""
        told: dict[VersionKey, list[VersionStatus]] = {}
        for replica in self._replicas.values():
            for key, status in replica.statuses.items():
                told.setdefault(key, []).append(status)
        served = {key: self._status_of_served(key) for key in self._versions}
        rest = {key: min(all_, key=lambda status: _TELLING.index(status.state)) for key, all_ in told.items()}
        return rest | served

    def _status_of_served(self, key: VersionKey) -> VersionStatus:
        serving, count = len(self.candidates(key, self._fingerprints[key])), len(self._replicas)
        message = "" if serving == count else f"on {serving} of {count} model servers"
        return VersionStatus(VersionState.AVAILABLE, message)

    def fingerprint(self, key: VersionKey) -> str | None:
        """The model that a version number stands for, also while no replica is there to serve it."""
        return self._fingerprints.get(key)

    def newest(self, model: str) -> VersionKey | None:
        """The newest version that every replica serves which is there at all; else the newest that any serves."""
        served = [replica.versions.keys() for replica in self._replicas.values() if replica.versions]
        everywhere = set(served[0]).intersection(*served[1:]) if served else set()
        for keys in (everywhere & self._versions.keys(), self._versions.keys()):
            candidates = [key for key in keys if key.model == model]
            if candidates:
                return max(candidates)
        return None

    def candidates(self, key: VersionKey, fingerprint: str) -> list[Replica]:
        """The replicas that serve a version; those that do not answer only where no other does."""
        serving = [
            replica
            for replica in self._replicas.values()
            if (version := replica.versions.get(key)) is not None and version.fingerprint == fingerprint
        ]
        return [replica for replica in serving if replica.responsive] or serving

    def settled(self) -> bool:
        """Whether it is known of every replica what it serves. What none serves then is gone, and not just away."""
        return bool(self._replicas) and all(replica.known for replica in self._replicas.values())

    async def wait_changed(self, limit: float) -> None:
        """Returns once something has changed, or after ``limit`` seconds."""
        changed = self._changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await changed.wait()

    def report(self) -> str:
        """What is known of each replica, for the operator."""
        if not self._replicas:
            return f"no address was found for {', '.join(self._targets)}"
        return "; ".join(
            f"{endpoint.target}: " + (", ".join(filter(None, _problems(replica))) or "no answer yet")
            for endpoint, replica in self._replicas.items()
        )

    def _update(self) -> None:
        now = asyncio.get_running_loop().time()
        versions: dict[VersionKey, ModelVersion] = {}
        for replica in self._replicas.values():
            for key, version in replica.versions.items():
                known = versions.setdefault(key, version)
                if known.fingerprint == version.fingerprint:
                    continue
                _log.error("%s is another model on %s than elsewhere", key, replica.endpoint.target)
                if version.fingerprint == self._fingerprints.get(key):
                    versions[key] = version
        if not self.settled():
            # A model server that restarts takes no version with it: its sessions are to wait, not to fail for good.
            versions = self._versions | versions
        self._versions = {key: version for key, version in versions.items() if self._accept(version, now)}
        self._changed.set()
        self._changed = asyncio.Event()

    def _accept(self, version: ModelVersion, now: float) -> bool:
        """Whether a version may be listed: one whose number stood for another model has to wait."""
        key = version.key
        known = self._fingerprints.get(key)
        if known is not None and known != version.fingerprint:
            if key not in self._held:
                _log.warning("%s has become another model: fingerprint %s, was %s", key, version.fingerprint, known)
                self._held[key] = now + self._policy.hold
                asyncio.get_running_loop().call_at(self._held[key], self._update)
            if now < self._held[key]:
                return False
        self._held.pop(key, None)
        if known != version.fingerprint:
            _log.info("model server serves %s, fingerprint %s", key, version.fingerprint)
        self._fingerprints[key] = version.fingerprint
        return True

    async def _resolve_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._policy.resolve_interval if self._replicas else self._policy.interval)
            await self._resolve()

    async def _resolve(self) -> None:
        """Opens replicas for new addresses, and closes those whose address is gone."""
        endpoints: dict[Endpoint, None] = {}
        for target in self._targets:
            try:
                endpoints.update(dict.fromkeys(await resolve(target)))
            except OSError as error:
                _log.warning("cannot resolve %s: %s", target, error)
                # A name server that is away must not take the replicas with it.
                endpoints.update(dict.fromkeys(self._replicas))
        for endpoint in endpoints.keys() - self._replicas.keys():
            self._replicas[endpoint] = self._open(endpoint, self._update)
        gone = [self._replicas.pop(endpoint) for endpoint in self._replicas.keys() - endpoints.keys()]
        if gone:
            self._update()
            await asyncio.gather(*(replica.close() for replica in gone))

    def _open(self, endpoint: Endpoint, changed: Callable[[], None]) -> Replica:
        return Replica(
            endpoint,
            self._models,
            credentials=self._credentials,
            interval=self._policy.interval,
            timeout=self._policy.timeout,
            changed=changed,
        )


def parse_targets(text: str) -> list[str]:
    """The targets in a list joined by commas.

    Raises:
        ValueError: there is none, or one has no port.
    """
    targets = [part.strip() for part in text.split(",") if part.strip()]
    for target in targets:
        host, _, port = target.removeprefix(_DNS).rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"expected HOST:PORT or {_DNS}HOST:PORT; got {target!r}")
    if not targets:
        raise ValueError(f"expected an address of a model server; got {text!r}")
    return targets


async def resolve(target: str) -> list[Endpoint]:
    """The replicas behind a target: every address of a ``dns:///`` name; anything else is one, and gRPC's to resolve.

    Raises:
        OSError: the name cannot be resolved.
    """
    if not target.startswith(_DNS):
        return [Endpoint(target)]
    name = target.removeprefix(_DNS)
    host, _, port = name.rpartition(":")
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host.strip("[]"))
        return [Endpoint(name)]
    found = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    addresses = dict.fromkeys(str(address[0]) for *_, address in found)
    return [Endpoint(f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}", server_name=host) for ip in addresses]


def _problems(replica: Replica) -> list[str]:
    return [f"{what}: {problem}" if what else problem for what, problem in replica.problems.items()]
