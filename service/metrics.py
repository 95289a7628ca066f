"""What the gateway counts, for Prometheus: an ``Observer`` whose numbers a scrape reads.

What happens for every step is kept in plain lists on the event loop, a fraction of a microsecond each, and counted many
at a time; no label holds an identity or a session.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from threading import Lock, Thread
from wsgiref.simple_server import WSGIServer

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, Gauge, Info, ProcessCollector, start_http_server
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from service.errors import ServiceError
from service.observing import BatchRun, Observer, reason_of
from service.types import VersionKey

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
_SETTLE_AT = 1024
_VERSION_LABELS = ("model", "version")
# Reasons that alerts look for: they are there from the start with 0, since a rate sees no first step out of nothing.
_ALERTED = (
    "BAD_MODEL_OUTPUT",
    "COMMIT_UNKNOWN",
    "CORRUPT_STATE",
    "DEADLINE_EXCEEDED",
    "EXECUTOR_UNAVAILABLE",
    "FINGERPRINT_MISMATCH",
    "INTERNAL",
    "MODEL_VERSION_UNAVAILABLE",
    "OVERLOADED",
    "STORE_UNAVAILABLE",
    "UNAUTHENTICATED",
)


class Histogram:
    """How often values fell up to each bound. One thread adds, any may read.

    A value that is added is only kept, which is all that the event loop has to pay for at each step; many at a time are
    sorted into their buckets by ``settle``, or by whoever reads.

    Args:
        bounds: Upper bounds, ascending; what is above the last is counted too.
    """

    __slots__ = ("_bounds", "_counts", "_lock", "_names", "_pending", "_total", "add", "extend")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = np.array(bounds, np.float64)
        self._names = [*(str(float(bound)) for bound in bounds), "+Inf"]
        self._counts = np.zeros(len(bounds) + 1, np.int64)
        self._total = 0.0
        self._pending: list[float] = []
        self._lock = Lock()
        self.add = self._pending.append
        self.extend = self._pending.extend

    def settle(self, at_least: int = _SETTLE_AT) -> None:
        """Sorts what was added into its buckets, where it has become so much. For the thread that adds."""
        if len(self._pending) >= at_least:
            with self._lock:
                self._counts, self._total = self._with(self._pending)
                self._pending.clear()

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """Each bound and how many values were up to it, the last of them infinite; and the sum of all values."""
        with self._lock:
            counts, total = self._with(list(self._pending))
        return list(zip(self._names, np.cumsum(counts).tolist(), strict=True)), total

    def count(self) -> int:
        """How many values there were."""
        with self._lock:
            return int(self._counts.sum()) + len(self._pending)

    def _with(self, values: Sequence[float]) -> tuple[npt.NDArray[np.int64], float]:
        found = np.searchsorted(self._bounds, values)
        return self._counts + np.bincount(found, minlength=len(self._counts)), self._total + sum(values)


@dataclass(slots=True)
class _VersionNumbers:
    """What is counted of one model version."""

    step: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    queue: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    executor: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    commit: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    rows: Histogram = field(default_factory=lambda: Histogram(_ROWS))
    occupancy: Histogram = field(default_factory=lambda: Histogram(_RATIOS))
    time_steps: int = 0
    computed: int = 0
    failed_batches: int = 0
    replayed: int = 0
    unsettled: int = 0  # rows since the histograms were settled

    @property
    def histograms(self) -> tuple[Histogram, ...]:
        """All of them."""
        return self.step, self.queue, self.executor, self.commit, self.rows, self.occupancy


_HISTOGRAMS: tuple[tuple[str, str, Callable[[_VersionNumbers], Histogram]], ...] = (
    ("ntm_step_duration_seconds", "From taking a step on to its commit.", lambda n: n.step),
    ("ntm_queue_duration_seconds", "What a chunk waited for its turn in a batch.", lambda n: n.queue),
    ("ntm_executor_duration_seconds", "One call of the executor: a batch.", lambda n: n.executor),
    ("ntm_commit_duration_seconds", "One commit to the session store.", lambda n: n.commit),
    ("ntm_batch_rows", "Sessions in a batch, padding apart.", lambda n: n.rows),
    (
        "ntm_batch_occupancy_ratio",
        "Time steps asked for over those computed: what padding left.",
        lambda n: n.occupancy,
    ),
)
_COUNTERS: tuple[tuple[str, str, Callable[[_VersionNumbers], int]], ...] = (
    ("ntm_steps", "Steps applied.", lambda n: n.step.count()),
    ("ntm_replayed_steps", "Steps sent again and answered with their stored reply.", lambda n: n.replayed),
    ("ntm_time_steps", "Time steps that ran in batches.", lambda n: n.time_steps),
    ("ntm_computed_time_steps", "Time steps that were computed, padding included.", lambda n: n.computed),
    ("ntm_failed_batches", "Executor calls that failed.", lambda n: n.failed_batches),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What is read at each scrape, from another thread than the event loop's.

    Attributes:
        queued: Chunks that wait for a batch, by version.
        steps: Steps taken on and not yet answered.
        nbytes: Bytes of their inputs.
        limits: What the settings allow at the most, by what it is of.
    """

    queued: Callable[[], Mapping[VersionKey, int]]
    steps: Callable[[], int]
    nbytes: Callable[[], int]
    limits: Mapping[str, float]


class Metrics(Observer, Collector):
    """Counts what it hears.

    Args:
        registry: Where it is collected.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._versions: dict[VersionKey, _VersionNumbers] = {}
        self._late = Histogram(_SECONDS)
        self._watched: Watched | None = None
        self._sessions: Mapping[VersionKey, int] = {}
        self._served: Mapping[VersionKey, int] = {}
        # In collections of its own and not in prometheus_client's counters, which tell when each began, too.
        self._errors: Counter[tuple[str, ...]] = Counter()
        self._refused: Counter[tuple[str, ...]] = Counter()
        self._calls: Counter[tuple[str, ...]] = Counter()
        self._call_seconds: dict[str, Histogram] = {}
        self._streams = Gauge("ntm_open_streams", "Streams that are open.", ("rpc",), registry=registry)
        self._open_streams: set[str] = set()
        self._serving = Gauge("ntm_serving", "1 while the gateway takes work, as its health says.", registry=registry)
        self._store_up = Gauge("ntm_store_up", "1 where the store answered when last asked.", registry=registry)
        Info("ntm_build", "The release that runs.", registry=registry).info({"version": _release()})
        ProcessCollector(registry=registry)
        registry.register(self)
        self._errors.update(dict.fromkeys(((reason, "", "") for reason in _ALERTED), 0))

    def watch(self, watched: Watched) -> None:
        """Says what to read at each scrape."""
        self._watched = watched

    def batch_formed(self, key: VersionKey, waits: Sequence[float]) -> None:
        """See ``Observer.batch_formed``."""
        self._of(key).queue.extend(waits)

    def batch_ran(self, run: BatchRun) -> None:
        """See ``Observer.batch_ran``."""
        numbers = self._of(run.key)
        numbers.executor.add(run.seconds)
        numbers.rows.add(run.rows)
        numbers.occupancy.add(run.time_steps / run.computed)
        numbers.time_steps += run.time_steps
        numbers.computed += run.computed
        numbers.failed_batches += run.failed
        numbers.unsettled += run.rows
        if numbers.unsettled >= _SETTLE_AT:
            numbers.unsettled = 0
            for histogram in numbers.histograms:
                histogram.settle(at_least=1)

    def steps_committed(self, key: VersionKey, count: int, seconds: float, commit_seconds: float) -> None:
        """See ``Observer.steps_committed``."""
        numbers = self._of(key)
        numbers.step.extend([seconds] * count)
        numbers.commit.extend([commit_seconds] * count)

    def step_replayed(self, key: VersionKey) -> None:
        """See ``Observer.step_replayed``."""
        self._of(key).replayed += 1

    def commit_refused(self, key: VersionKey, verdict: str) -> None:
        """See ``Observer.commit_refused``."""
        self._refused[verdict, *_labels(key)] += 1

    def call_ended(self, rpc: str, code: str, seconds: float) -> None:
        """See ``Observer.call_ended``. Only calls are timed: a stream lasts as long as its client likes."""
        self._calls[rpc, code] += 1
        if rpc in self._open_streams:
            self._streams.labels(rpc).dec()
            return
        if rpc not in self._call_seconds:
            self._call_seconds[rpc] = Histogram(_SECONDS)
        self._call_seconds[rpc].add(seconds)
        self._call_seconds[rpc].settle()

    def stream_opened(self, rpc: str) -> None:
        """See ``Observer.stream_opened``."""
        self._open_streams.add(rpc)
        self._streams.labels(rpc).inc()

    def failed(self, error: BaseException) -> None:
        """See ``Observer.failed``."""
        key = error.version if isinstance(error, ServiceError) else None
        self._errors[reason_of(error), *(("", "") if key is None else (key[0], str(key[1])))] += 1

    def sessions_counted(self, counts: Mapping[VersionKey, int] | None) -> None:
        """See ``Observer.sessions_counted``. What cannot be known is left out, and not told from yesterday."""
        self._store_up.set(counts is not None)
        self._sessions = counts or {}

    def versions_served(self, keys: Iterable[VersionKey]) -> None:
        """See ``Observer.versions_served``."""
        self._served = dict.fromkeys(keys, 1)
        for key in self._served.keys() - self._versions.keys():
            self._of(key)
            self._errors.update(dict.fromkeys(((reason, *_labels(key)) for reason in _ALERTED), 0))

    def serving(self, *, now: bool) -> None:
        """See ``Observer.serving``."""
        self._serving.set(now)

    def loop_late(self, seconds: float) -> None:
        """See ``Observer.loop_late``."""
        self._late.add(seconds)
        # Values that are kept for long lie among all that was freed since, which cannot be given back for them.
        for numbers in self._versions.values():
            for histogram in numbers.histograms:
                histogram.settle(at_least=1)
        for histogram in (self._late, *self._call_seconds.values()):
            histogram.settle(at_least=1)

    def collect(self) -> Iterable[Metric]:
        """The samples of a scrape."""
        versions = [(_labels(key), numbers) for key, numbers in list(self._versions.items())]
        for name, text, histogram_of in _HISTOGRAMS:
            histograms = HistogramMetricFamily(name, text, labels=_VERSION_LABELS)
            for labels, numbers in versions:
                histograms.add_metric(labels, *histogram_of(numbers).read())
            yield histograms
        for name, text, count_of in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=_VERSION_LABELS)
            for labels, numbers in versions:
                counter.add_metric(labels, count_of(numbers))
            yield counter
        yield _counted("ntm_errors", "Steps and calls refused or failed.", ("reason", *_VERSION_LABELS), self._errors)
        refused = "Commits that the store refused: the session was no longer what the step ran on."
        yield _counted("ntm_commit_refusals", refused, ("verdict", *_VERSION_LABELS), self._refused)
        yield _counted("ntm_rpcs", "Calls and streams that ended.", ("rpc", "code"), self._calls)
        calls = HistogramMetricFamily("ntm_rpc_duration_seconds", "Calls that are no streams.", labels=("rpc",))
        for rpc, seconds in list(self._call_seconds.items()):
            calls.add_metric([rpc], *seconds.read())
        yield calls
        late = HistogramMetricFamily(
            "ntm_event_loop_lag_seconds", "How much later than asked the event loop came.", labels=()
        )
        late.add_metric([], *self._late.read())
        yield late
        yield _by_version("ntm_sessions", "Live sessions: of all gateways, where they share a store.", self._sessions)
        yield _by_version("ntm_model_version_served", "1 for each version that can be stepped.", self._served)
        if self._watched is not None:
            yield from _watched(self._watched)

    def describe(self) -> Iterable[Metric]:
        """Nothing: a registry that asks would be told samples of nothing yet."""
        return ()

    def _of(self, key: VersionKey) -> _VersionNumbers:
        numbers = self._versions.get(key)
        if numbers is None:
            numbers = self._versions[key] = _VersionNumbers()
        return numbers


class MetricsServer:
    """Answers scrapes over HTTP, on a thread of its own, from when it is made.

    Args:
        registry: What is served.
        host: Address to listen on.
        port: Port; 0 takes a free one.

    Raises:
        OSError: it cannot listen there.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        self._server: WSGIServer
        self._thread: Thread
        self._server, self._thread = start_http_server(port, host.strip("[]"), registry)
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Ends it. Safe to call twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _watched(watched: Watched) -> Iterable[Metric]:
    yield _by_version("ntm_queued_chunks", "Chunks that wait for a batch.", watched.queued())
    yield GaugeMetricFamily("ntm_steps_under_way", "Steps taken on and not yet answered.", watched.steps())
    yield GaugeMetricFamily("ntm_bytes_under_way", "Bytes of their inputs.", watched.nbytes())
    for name, value in watched.limits.items():
        yield GaugeMetricFamily(f"ntm_{name}_limit", "What the settings allow at the most.", value)


def _counted(
    name: str, text: str, labels: tuple[str, ...], counts: Mapping[tuple[str, ...], int]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in list(counts.items()):
        family.add_metric(values, count)
    return family


def _by_version(name: str, text: str, values: Mapping[VersionKey, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=_VERSION_LABELS)
    for key, value in values.items():
        family.add_metric(_labels(key), value)
    return family


def _labels(key: VersionKey) -> list[str]:
    return [key.model, str(key.version)]


def _release() -> str:
    try:
        return version("ntm-serving")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
