"""What watches a gateway: its metrics, the port where Prometheus finds them, and what has to be asked now and then.

Without ``--metrics-listen`` there is none of it, and nothing of it is imported.
"""

import asyncio
import time
from typing import TYPE_CHECKING, NoReturn

from service.admission import Admission
from service.batcher import Batcher
from service.config import Settings
from service.engine import Engine
from service.errors import ServiceError
from service.observing import Observer

if TYPE_CHECKING:
    from service.metrics import Metrics, MetricsServer

_COUNT_EVERY_S = 10.0
_LOOP_CHECK_EVERY_S = 0.5


class Monitor:
    """Watches one gateway.

    Args:
        settings: Of the gateway.

    Attributes:
        observer: To be told of what happens.
        port: Where metrics are answered; None where they are not.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._metrics = _make_metrics(settings)
        self._server: MetricsServer | None = None
        self._tasks: list[asyncio.Task[NoReturn]] = []
        self.observer: Observer = self._metrics or Observer()
        self.port: int | None = None

    def watch(self, admission: Admission, batcher: Batcher) -> None:
        """Has each scrape look at what is under way and what waits."""
        if self._metrics is None:
            return
        from service.metrics import Watched

        limits = {
            "steps_under_way": self._settings.max_queued_steps,
            "bytes_under_way": self._settings.max_queued_bytes,
            "sessions": self._settings.max_sessions,
            "batch_rows": self._settings.max_batch_size,
        }
        self._metrics.watch(
            Watched(
                queued=batcher.queued,
                steps=lambda: admission.steps,
                nbytes=lambda: admission.nbytes,
                limits=limits,
            )
        )

    def listen(self) -> None:
        """Answers scrapes from now on.

        Raises:
            OSError: it cannot listen there.
        """
        if self._metrics is None or self._settings.metrics_listen is None:
            return
        from service.metrics import MetricsServer

        host, _, port = self._settings.metrics_listen.rpartition(":")
        self._server = MetricsServer(self._metrics.registry, host, int(port))
        self.port = self._server.port

    def start(self, engine: Engine) -> None:
        """Begins to ask the store and the event loop how they are. The models are there by now."""
        if self._metrics is not None:
            self._tasks = [
                asyncio.create_task(_count_forever(engine, self.observer)),
                asyncio.create_task(_feel_forever(self.observer)),
            ]

    def stop(self) -> None:
        """Asks no more; scrapes are still answered."""
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Ends it all. Safe to call twice."""
        self.stop()
        server, self._server = self._server, None
        if server is not None:
            await asyncio.to_thread(server.close)


def _make_metrics(settings: Settings) -> "Metrics | None":
    if settings.metrics_listen is None:
        return None
    from prometheus_client import CollectorRegistry

    from service.metrics import Metrics

    return Metrics(CollectorRegistry())


async def _count_forever(engine: Engine, observer: Observer) -> NoReturn:
    while True:
        observer.versions_served(engine.catalog.served())
        try:
            observer.sessions_counted(await engine.session_counts())
        except ServiceError:
            observer.sessions_counted(None)
        await asyncio.sleep(_COUNT_EVERY_S)


async def _feel_forever(observer: Observer) -> NoReturn:
    while True:
        due = time.perf_counter() + _LOOP_CHECK_EVERY_S
        await asyncio.sleep(_LOOP_CHECK_EVERY_S)
        observer.loop_late(max(0.0, time.perf_counter() - due))
