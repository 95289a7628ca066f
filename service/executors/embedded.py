"""Runs models in this process, on TensorFlow: every version of every model in a directory."""

import asyncio
import functools
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np

from service.errors import ExecutorUnavailable, ModelLoadError, ModelVersionUnavailable, ServiceError
from service.executors.brief import BriefRuns, Load
from service.executors.compiler import Compiler
from service.executors.idle_poll import IdlePoll
from service.executors.model_directory import Found, find_versions
from service.executors.runners import Runners
from service.executors.saved_model import SavedModel
from service.types import ModelVersion, StepBatch, StepBatchResult, VersionKey, VersionState, VersionStatus

_log = logging.getLogger(__name__)

# The rows of one run: past that the states of a batch leave the core's cache, and a step costs more.
_RUN_ROWS = 64
# A batch of less than that, in rows x time steps, is not worth a second thread.
_SPLIT_CELLS = 1024
_LEAST_ROWS = 16
# Batches of that many rows x time steps may run on the event loop's own thread; larger ones are not brief.
_BRIEF_CELLS = 64
# Below the thread that answers: it has a little to do for each step, these have a lot to do for many.
_NICENESS = 5
# How long closing waits for a step that is under way; it cannot be interrupted.
_PATIENCE_S = 5.0

_AVAILABLE = VersionStatus(VersionState.AVAILABLE)
_DRAINING = VersionStatus(VersionState.DRAINING, "its directory is gone; the sessions that it has go on")

_P = ParamSpec("_P")
_T = TypeVar("_T")


class EmbeddedExecutor:
    """Loads every version under a directory, and goes on looking for new ones.

    Steps are served from the plain graph at once. Batch shapes are compiled with XLA in the background; each batch runs
    compiled as soon as its shape is. Rows are padded to a power of two, time steps to ``max_steps``: the time loop ends
    with the longest row, so padding in time costs next to nothing and one compile serves every length.

    Args:
        model_dir: Holds ``MODEL/VERSION/saved_model.pb``.
        max_batch_size: The most rows of a batch, for the shapes that are compiled ahead.
        max_steps: The most time steps of a batch, likewise. A longer one is padded to a power of two times that.
        compile: Whether to compile at all.
        poll_interval: Seconds between two looks at the directory.
        threads: Runs side by side, each on a core; None for one for each core that this process may use.
        idle_poll: Seconds for which the event loop looks for the next step of a caller who was that quick before.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        max_batch_size: int = 64,
        max_steps: int = 16,
        compile: bool = True,  # noqa: A002 - as Keras calls it
        poll_interval: float = 1.0,
        threads: int | None = None,
        idle_poll: float = 0.0,
    ) -> None:
        self._model_dir = model_dir
        self._max_batch_size = max_batch_size
        self._max_steps = max_steps
        self._poll_interval = poll_interval
        self._threads = threads or available_cores()
        self._compiler = Compiler() if compile else None
        self._models: dict[VersionKey, SavedModel] = {}
        self._versions: dict[VersionKey, ModelVersion] = {}
        self._statuses: dict[VersionKey, VersionStatus] = {}
        self._stamps: dict[VersionKey, Found] = {}
        self._runners: dict[VersionKey, Runners[StepBatchResult]] = {}
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._watcher: asyncio.Task[None] | None = None
        self._closed = False
        self._runs = 0  # under way in threads, or waiting for one
        self._small_runs = 0  # those of them that might have run on the event loop's own
        self._brief = BriefRuns()
        self._idle_poll = IdlePoll(idle_poll)
        self._load_here = Load(cpu=self._idle_poll.worked)  # of the event loop's thread

    @property
    def max_in_flight(self) -> int:
        """Two: while one batch runs, the next is gathered and handed over."""
        return 2

    @property
    def ahead(self) -> int:
        """Two: one for each thread, which then begins the next run without the event loop."""
        return 2

    @property
    def max_rows(self) -> int | None:
        """As many as one run takes: more of them are better off in the next batch, beside this one."""
        return _RUN_ROWS

    async def start(self) -> None:
        """Loads every version, and begins to watch the directory.

        Raises:
            ModelLoadError: there is no model, or one of which no version can be loaded.
        """
        found = await self._in_loader(find_versions, self._model_dir)
        if not found:
            raise ModelLoadError(f"no model in {self._model_dir}: expected MODEL/VERSION/saved_model.pb in it")
        errors = {key: error for key in found if (error := await self._load(key, found[key])) is not None}
        served = {key.model for key in self._versions}
        broken = [str(error) for key, error in errors.items() if key.model not in served]
        if broken:
            raise ModelLoadError("; ".join(broken))
        self._watcher = asyncio.create_task(self._watch(), name="watch models")

    def versions(self) -> Mapping[VersionKey, ModelVersion]:
        """The versions that are loaded."""
        return self._versions

    def newest(self, model: str) -> VersionKey | None:
        """The highest version that is loaded and whose directory is there."""
        available = [key for key in self._versions if key.model == model and self._statuses[key] == _AVAILABLE]
        return max(available, default=None)

    def statuses(self) -> Mapping[VersionKey, VersionStatus]:
        """Of every version that is loaded, is being loaded, or could not be."""
        return self._statuses

    async def release(self, key: VersionKey) -> None:
        """Unloads a version whose directory is gone."""
        if self._statuses.get(key) != _DRAINING:
            return
        self._versions = {other: version for other, version in self._versions.items() if other != key}
        del self._models[key], self._stamps[key], self._statuses[key]
        if (runners := self._runners.pop(key, None)) is not None:
            runners.close()
        if self._compiler is not None:
            self._compiler.forget(key)
        _log.info("unloaded", extra={"version": str(key)})

    def bucket(self, rows: int, steps: int) -> tuple[int, int]:
        """The next shape that is compiled ahead or on demand; the batch as it is where nothing is compiled."""
        if self._compiler is None:
            return rows, steps
        full, rest = divmod(rows, _RUN_ROWS)
        time = self._max_steps
        while time < steps:
            time *= 2
        return full * _RUN_ROWS + (_power_of_two(rest) if rest else 0), time

    async def step(self, key: VersionKey, batch: StepBatch) -> StepBatchResult:
        """Runs one batch; in several pieces side by side where it is large.

        Raises:
            ModelVersionUnavailable: no such version is loaded.
            ExecutorUnavailable: closed, or no memory.
            BadModelOutput: the graph failed on this batch.
        """
        return await self.begin(key, batch)

    def begin(self, key: VersionKey, batch: StepBatch, *, company: bool = False) -> asyncio.Future[StepBatchResult]:
        """See ``Eager.begin``. Raises what ``step`` raises, at once or in the future."""
        self._idle_poll.end()
        model = self._models.get(key)
        if self._closed:
            raise ExecutorUnavailable("the executor is closed")
        if model is None:
            raise ModelVersionUnavailable(f"model version {key} is not loaded", model=key.model, version=key.version)
        steps = max(batch.lengths.tolist(), default=0)
        if not self._small_runs and self._may_run_here(model, batch, steps, company=company):
            return self._run_here(model, batch, steps)
        # Cut up only over the threads that are free: a batch in one piece costs less.
        free = max(1, self._threads - self._runs)
        pieces = split_rows(len(batch.lengths), steps, free, compiled=self._compiler is not None)
        runners = self._runners_of(key)
        if len(pieces) == 1:
            return self._start_run(runners, model, batch, steps)
        runs = [self._start_run(runners, model, _cut(batch, piece), steps) for piece in pieces]
        return asyncio.ensure_future(_joined(runs))

    def _may_run_here(self, model: SavedModel, batch: StepBatch, steps: int, *, company: bool) -> bool:
        """Whether a batch is over sooner than a thread would have begun it, and little else has to be done meanwhile.

        Only what is compiled, for this processor: it has no operation that could wait for anything, so it cannot hold
        up the event loop.
        """
        rows, most = batch.inputs.shape[:2]
        if rows * steps > _BRIEF_CELLS or not (model.on_cpu and model.is_compiled(rows, most)):
            return False
        return self._load_here.leaves_time(rows, beside=self._runs > 0, company=company) and self._brief.expected(
            (model.key, rows, steps)
        )

    def _run_here(self, model: SavedModel, batch: StepBatch, steps: int) -> asyncio.Future[StepBatchResult]:
        run: asyncio.Future[StepBatchResult] = asyncio.get_running_loop().create_future()
        began = time.thread_time()
        try:
            run.set_result(self._timed_run(model, batch, steps))
        except ServiceError as error:
            run.set_exception(error)
        self._load_here.ran(time.thread_time() - began)
        if len(batch.lengths) == 1 and not self._runs:
            self._idle_poll.begin()  # before it is answered, which takes less than the next step takes to come
        return run

    def _start_run(
        self, runners: Runners[StepBatchResult], model: SavedModel, batch: StepBatch, steps: int
    ) -> asyncio.Future[StepBatchResult]:
        run = runners.run(functools.partial(self._run, model, batch, steps))
        small = len(batch.lengths) * steps <= _BRIEF_CELLS
        self._runs += 1
        self._small_runs += small
        if small:
            self._load_here.left(self._brief.seconds((model.key, len(batch.lengths), steps)))
        run.add_done_callback(functools.partial(self._ended, small))
        return run

    def _ended(self, small: bool, run: asyncio.Future[StepBatchResult]) -> None:
        self._runs -= 1
        self._small_runs -= small

    async def wait_compiled(self, limit: float) -> bool:
        """Waits until every shape that was asked for or foreseen is compiled; returns whether that took less."""
        if self._compiler is None:
            return True
        return await asyncio.to_thread(self._compiler.wait_idle, limit)

    async def close(self) -> None:
        """Waits a while for what runs, stops compiling, and lets go of the models."""
        self._closed = True
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        for runners in self._runners.values():
            runners.close()
        for runners in self._runners.values():
            await asyncio.to_thread(runners.join, _PATIENCE_S)
        # A load cannot be interrupted; nothing waits for one that nobody needs any more.
        self._loader.shutdown(wait=False, cancel_futures=True)
        if self._compiler is not None:
            await asyncio.to_thread(self._compiler.close)
        self._models.clear()
        self._versions = {}

    def _runners_of(self, key: VersionKey) -> Runners[StepBatchResult]:
        """A version's own threads: a model that is slow, or hangs, takes none from another."""
        if key not in self._runners:
            # Two at the least, so that short chunks never wait for long ones that run.
            self._runners[key] = Runners(max(2, self._threads), "runner", _NICENESS)
        return self._runners[key]

    def _run(self, model: SavedModel, batch: StepBatch, steps: int) -> StepBatchResult:
        rows, most = batch.inputs.shape[:2]
        if self._compiler is not None:
            self._compiler.ask(model, rows, most)
            if model.is_compiled(rows, most) and rows * steps <= _BRIEF_CELLS:
                return self._timed_run(model, batch, steps)
        return model.run(batch)

    def _timed_run(self, model: SavedModel, batch: StepBatch, steps: int) -> StepBatchResult:
        began = time.thread_time()  # what it waits for other threads does not count
        result = model.run(batch)
        self._brief.note((model.key, len(batch.lengths), steps), time.thread_time() - began)
        return result

    async def _load(self, key: VersionKey, found: Found) -> ModelLoadError | None:
        """Loads one version; returns why it could not be, where it could not."""
        self._stamps[key] = found
        self._statuses[key] = VersionStatus(VersionState.LOADING)
        try:
            model = await self._in_loader(SavedModel, key, found.path)
        except ModelLoadError as error:
            _log.error("%s", error)
            self._statuses[key] = VersionStatus(VersionState.FAILED, str(error))
            return error
        self._models[key] = model
        self._statuses[key] = _AVAILABLE
        self._versions = {**self._versions, key: model.version}
        _log.info("loaded", extra={"version": str(key), "fingerprint": model.version.fingerprint})
        if self._compiler is not None:
            rows, (_, steps) = 1, self.bucket(1, 1)
            while rows <= min(_RUN_ROWS, _power_of_two(self._max_batch_size)):
                self._compiler.foresee(model, rows, steps)
                rows *= 2
        return None

    async def _watch(self) -> None:
        """Loads versions as they appear; those that vanish take no new sessions from then on."""
        before: Mapping[VersionKey, Found] = dict(self._stamps)
        while True:
            await asyncio.sleep(self._poll_interval)
            now = await self._in_loader(find_versions, self._model_dir)
            for key in now:
                # What is still being written changes from one look to the next.
                if now[key] == before.get(key) and now[key] != self._stamps.get(key):
                    await self._take_up(key, now[key])
            # What was there a moment ago may be there again: it has to be missed twice.
            self._drain_all_but(now.keys() | before.keys())
            before = now

    def _drain_all_but(self, there: Collection[VersionKey]) -> None:
        """Versions whose directory is gone drain, except for the last one of a model: that is served on."""
        for key in [key for key in self._statuses if key not in self._models and key not in there]:
            del self._statuses[key], self._stamps[key]
        for model in {key.model for key in self._models}:
            loaded = [key for key in self._models if key.model == model]
            staying = [key for key in loaded if key in there] or [max(loaded)]
            for key in loaded:
                status = _AVAILABLE if key in staying else _DRAINING
                if self._statuses[key] != status:
                    _log.warning("%s is %s: %s", key, status.state.value, status.message or "its directory is back")
                self._statuses[key] = status

    async def _take_up(self, key: VersionKey, found: Found) -> None:
        if key in self._models:
            self._stamps[key] = found
            _log.error("%s has changed on disk; what was loaded is served on. Publish it as a new version", key)
        else:
            await self._load(key, found)

    async def _in_loader(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._loader, call)


async def _joined(runs: Sequence[asyncio.Future[StepBatchResult]]) -> StepBatchResult:
    results = await asyncio.gather(*runs)
    return StepBatchResult(
        np.concatenate([result.outputs for result in results]),
        np.concatenate([result.state for result in results]),
        finite=all(result.finite for result in results),
    )


def split_rows(rows: int, steps: int, threads: int, *, compiled: bool) -> list[slice]:
    """Cuts a batch into runs: small enough for the cache, and where it is worth it enough of them for the threads.

    Args:
        rows: Rows of the batch.
        steps: Time steps of the longest of them.
        threads: Runs side by side.
        compiled: Runs must be of shapes that are compiled, powers of two.
    """
    most = _RUN_ROWS
    if rows * steps >= _SPLIT_CELLS:
        most = min(most, max(_LEAST_ROWS, _power_of_two(-(-rows // threads))))
    pieces, start = [], 0
    while start < rows:
        left = rows - start
        size = min(most, 1 << (left.bit_length() - 1) if compiled else left)
        pieces.append(slice(start, start + size))
        start += size
    return pieces


def available_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cut(batch: StepBatch, rows: slice) -> StepBatch:
    return StepBatch(batch.inputs[rows], batch.lengths[rows], batch.reset[rows], batch.state[rows])


def _power_of_two(number: int) -> int:
    """The least that is not below ``number``."""
    return 1 << (number - 1).bit_length()
