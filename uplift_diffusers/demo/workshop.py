"""One job at a time: told how far it is, stopped when nobody waits for it, and followed by an empty bench."""

import asyncio
import contextvars
import gc
import shutil
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psutil

Report = Callable[[float, str], None]
"""(fraction from 0 to 1, sentence): how a job says how far it is."""

Result = TypeVar("Result")


class StoppedError(Exception):
    """Raised inside a job that nobody waits for any more."""


class Job:
    """
    What a piece of work is given: a folder for its files, and the way to its visitor.

    Attributes:
        folder: empty, for what the visitor gets; it goes away if the work fails.
        peak_memory_bytes: at most in use since the plan was made, by all of the process, or on the accelerator.
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
        """Let the work end at its next step."""
        self._stop.set()

    def check(self) -> None:
        """Called again and again by the work. Raises StoppedError after `stop`."""
        if self._stop.is_set():
            raise StoppedError
        self.peak_memory_bytes = max(self.peak_memory_bytes, _memory_in_use())

    def plan(self, shares: dict[str, float], *, prefix: str = "") -> None:
        """Begin a piece of work whose stages take the time of `shares`, in this order."""
        total = sum(shares.values())
        self._shares = {stage: share / total for stage, share in shares.items() if share}
        self._done = dict.fromkeys(self._shares, 0.0)
        self._prefix = prefix
        self._started = time.perf_counter()
        self.peak_memory_bytes = _memory_in_use(reset=True)
        self._tell()

    def advance(self, stage: str, done: float) -> None:
        """A stage of the plan is done to the share `done`, from 0 to 1. Raises StoppedError after `stop`."""
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


class Workshop:
    """
    Does one job after the other, all of them in the same thread.

    Args:
        root: folder below which every job has its own.
    """

    def __init__(self, root: Path):
        self.root = root
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="workshop")
        self._jobs: dict[str, set[Job]] = defaultdict(set)

    async def run(self, work: Callable[[Job], Result], *, visitor: str, report: Report) -> Result:
        """
        Wait for the jobs before, then do `work`.

        Cancelling the task that awaits this stops the work at its next step. What a failed or stopped job wrote is
        deleted.

        Args:
            work: given its [`Job`].
            visitor: whose job it is, see `leave`.
            report: called in the thread of the work, with the caller's context variables.
        Raises:
            StoppedError: the visitor has left.
            Whatever `work` raises.
        """
        job = Job(report)
        self._jobs[visitor].add(job)
        context = contextvars.copy_context()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, context.run, self._do, work, job)
        except asyncio.CancelledError:
            job.stop()
            raise
        finally:
            self._jobs[visitor].discard(job)
            if not self._jobs[visitor]:
                del self._jobs[visitor]

    def begin(self, work: Callable[[], object]) -> None:
        """Do `work` before the first job, and let whoever needs its outcome find out how it went."""
        self._thread.submit(work)

    def leave(self, visitor: str) -> None:
        """Stop the jobs of a visitor who has gone."""
        for job in list(self._jobs.get(visitor, ())):
            job.stop()

    def close(self) -> None:
        """Stop every job and take no other one."""
        for visitor in list(self._jobs):
            self.leave(visitor)
        self._thread.shutdown(cancel_futures=True)

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
    """Within the block, every layer of `modules` asks `job` first whether to go on."""
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
    """Bytes: what was allocated on the accelerator at most since `reset`, or what the process holds now."""
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
