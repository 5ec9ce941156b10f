"""The demo's job queue: one job at a time, visitors in turn, with progress reports and cancellation."""

import asyncio
import contextvars
import gc
import shutil
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

Report = Callable[[float, str], object]
"""(fraction from 0 to 1, message): reports a job's progress."""

Result = TypeVar("Result")

MAX_JOBS = 32
"""Maximum number of waiting jobs in total."""

MAX_JOBS_OF_ADDRESS = 16
"""Maximum number of waiting jobs per network address, which several visitors may share."""

MAX_JOBS_OF_VISITOR = 4
"""Maximum number of waiting jobs per visitor."""

_asides = threading.BoundedSemaphore(3)
"""Held by every call of `Job.aside` until it really ends, so repeated cancelling cannot fill the memory."""


class StoppedError(Exception):
    """Raised inside a job that was cancelled."""


class BusyError(Exception):
    """Too many jobs are waiting. The message is one sentence."""


class Job:
    """
    The context of a job: a folder for its files, progress and cancellation.

    Attributes:
        folder: an empty folder for the results; deleted if the work fails.
        peak_memory_bytes: peak since the plan was made, of the process or on the accelerator.
    """

    folder: Path

    def __init__(self, report: Report):
        self.peak_memory_bytes = 0
        self._report = report
        self._stop = threading.Event()
        self._shares: dict[str, float] = {}
        self._done: dict[str, float] = {}
        self._prefix = ""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Request that the work ends at its next step."""
        self._stop.set()

    def check(self) -> None:
        """Called by the work at every step. Raises StoppedError after `stop`."""
        if self._stop.is_set():
            raise StoppedError
        self.peak_memory_bytes = max(self.peak_memory_bytes, _memory_in_use())

    def aside(self, function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """
        Run `function(*arguments, **options)`, but do not wait for it after `stop`.

        For calls that take seconds and cannot be interrupted, such as opening and saving large images.

        Raises:
            StoppedError: the job was stopped. The result of `function` is discarded.
            Whatever `function` raises.
        """
        outcome: Future = Future()

        def work() -> None:
            try:
                outcome.set_result(function(*arguments, **options))
            except BaseException as error:
                outcome.set_exception(error)
            finally:
                _asides.release()

        while not _asides.acquire(timeout=0.1):
            self.check()
        threading.Thread(target=work, daemon=True).start()
        while not wait([outcome], timeout=0.1).done:
            self.check()
        self.check()
        return outcome.result()

    def plan(self, shares: dict[str, float], *, prefix: str = "") -> None:
        """Start work in stages that take time in proportion to `shares`, in this order."""
        total = sum(shares.values())
        self._shares = {stage: share / total for stage, share in shares.items() if share}
        self._done = dict.fromkeys(self._shares, 0.0)
        self._prefix = prefix
        self._started = time.perf_counter()
        self.peak_memory_bytes = _memory_in_use(reset=True)
        self._tell()

    def advance(self, stage: str, done: float) -> None:
        """Report that a share `done`, from 0 to 1, of a stage is done. Raises StoppedError after `stop`."""
        self.check()
        self._done[stage] = min(max(done, self._done[stage]), 1.0)
        self._tell()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the plan was made."""
        return time.perf_counter() - self._started

    def _tell(self) -> None:
        fraction = sum(share * self._done[stage] for stage, share in self._shares.items())
        left = self.elapsed_s * (1 - fraction) / fraction if 0.02 < fraction < 1 else None
        stage = next((stage for stage, done in self._done.items() if done < 1), "Saving")
        self._report(fraction, f"{self._prefix}{stage}{_time_left(left)}")


@dataclass(eq=False)
class _Entry:
    """A job in the queue, waiting or running."""

    job: Job
    visitor: str
    address: str | None
    report: Report
    turn: asyncio.Future
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    @property
    def names(self) -> tuple[str, str]:
        """Whose turns count: the address, or the visitor where addresses are not told apart, and the visitor."""
        visitor = f"visitor {self.visitor}"
        return (visitor if self.address is None else f"address {self.address}"), visitor


class JobQueue:
    """
    Runs one job at a time, always in the same thread. Use it from one event loop at a time.

    Addresses take turns, and so do the visitors of an address: the next job is that of the address, and within it
    of the visitor, that was served longest ago. A visitor with many jobs, even under many names, delays another by
    one job only.

    Args:
        root: parent of the jobs' folders.
    """

    def __init__(self, root: Path):
        self.root = root
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jobs")
        self._waiting: list[_Entry] = []
        self._working: _Entry | None = None
        self._turns: dict[str, int] = {}  # of visitors and addresses that have jobs: a number that grows every turn
        self._num_turns = 0

    async def run(
        self, work: Callable[[Job], Result], *, visitor: str, report: Report, address: str | None = None
    ) -> Result:
        """
        Wait for the turn of `visitor`, then run `work`.

        Cancelling the task that awaits this stops the work at its next step. Files of a failed or stopped job are
        deleted.

        Args:
            work: called with its [`Job`].
            visitor: owner of the job, see `leave`.
            report: called with the caller's context variables, from the worker thread and while waiting.
            address: network address of the visitor, if jobs per address are limited.
        Raises:
            BusyError: too many jobs are waiting.
            StoppedError: the visitor has left.
            Whatever `work` raises.
        """
        self._check_room(visitor, address)
        loop = asyncio.get_running_loop()
        entry = _Entry(Job(report), visitor, address, report, loop.create_future())
        self._waiting.append(entry)
        self._call_next()
        self._tell_places()
        try:
            await entry.turn
            return await loop.run_in_executor(self._thread, lambda: entry.context.run(self._do, work, entry.job))
        except asyncio.CancelledError:
            entry.job.stop()
            raise
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)
            if entry is self._working:
                self._working = None
            for name in {*entry.names} - {name for other in self._waiting for name in other.names}:
                self._turns.pop(name, None)
            self._call_next()
            self._tell_places()

    def prepare(self, work: Callable[[], object]) -> None:
        """Run `work` before the first job; its errors are ignored here and show when its result is needed."""
        self._thread.submit(work)

    def leave(self, visitor: str | None) -> None:
        """Stop the jobs of a visitor who has left."""
        for entry in (*self._waiting, self._working):
            if entry is not None and entry.visitor == visitor:
                entry.job.stop()

    def close(self) -> None:
        """Stop all jobs and accept no new ones."""
        for entry in (*self._waiting, self._working):
            if entry is not None:
                entry.job.stop()
        self._thread.shutdown(cancel_futures=True)

    def _check_room(self, visitor: str, address: str | None) -> None:
        entries = [*self._waiting, *([self._working] if self._working else [])]
        if sum(entry.visitor == visitor for entry in entries) >= MAX_JOBS_OF_VISITOR:
            raise BusyError(f"{MAX_JOBS_OF_VISITOR} of your jobs are waiting already. Try again when one is done.")
        addresses = Counter(entry.address for entry in entries if entry.address is not None)
        if address is not None and addresses[address] >= MAX_JOBS_OF_ADDRESS:
            raise BusyError("too many jobs from your network are waiting. Try again later.")
        if len(self._waiting) >= MAX_JOBS:
            raise BusyError("too many jobs are waiting. Try again later.")

    def _call_next(self) -> None:
        if self._working is None and self._waiting:
            entry = self._order()[0]
            self._waiting.remove(entry)
            self._working = entry
            self._num_turns += 1
            self._turns |= dict.fromkeys(entry.names, self._num_turns)
            if not entry.turn.done():
                entry.turn.set_result(None)

    def _order(self) -> list[_Entry]:
        """The waiting jobs, the next one first."""
        turns, waiting, order = dict(self._turns), list(self._waiting), []
        for number in range(len(waiting)):
            # The first of those that are equal.
            entry = min(waiting, key=lambda entry: [turns.get(name, 0) for name in entry.names])
            waiting.remove(entry)
            turns |= dict.fromkeys(entry.names, self._num_turns + 1 + number)
            order.append(entry)
        return order

    def _tell_places(self) -> None:
        for place, entry in enumerate(self._order(), 1):
            with suppress(Exception):  # of a visitor who has gone
                entry.context.run(entry.report, 0.0, f"Waiting: {place} before this one")

    def _do(self, work: Callable[[Job], Result], job: Job) -> Result:
        job.folder = Path(tempfile.mkdtemp(dir=self.root))
        try:
            job.check()
            return work(job)
        except BaseException as error:
            shutil.rmtree(job.folder, ignore_errors=True)
            traceback.clear_frames(error.__traceback__)  # whoever keeps the error would keep their tensors
            _free_memory()
            raise


@contextmanager
def stoppable(job: Job, *modules) -> Iterator[None]:
    """Within the block, every layer of `modules` first checks whether `job` was stopped."""
    layers = {layer for module in modules for layer in module.modules()}
    hooks = [layer.register_forward_pre_hook(lambda *_: job.check()) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _time_left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {max(round(seconds), 1)} s left"


def _memory_in_use(*, reset: bool = False) -> int:
    """Peak bytes allocated on the accelerator since `reset`, or bytes in use by the process now."""
    import torch

    if torch.cuda.is_initialized():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
