"""Notices what changes about the logs that clients watch: one poll for all of them, however many watch."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from starlette.concurrency import run_in_threadpool

from gptcore.rundir import RunDir
from worker.connection import AWAY
from worker.job import TRANSITIONS, Status
from worker.store import Store

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class LogState:
    """A job's status, and the size and the time of change of each attempt's log. A deleted job is "deleted"."""

    status: str
    logs: Mapping[int, tuple[int, int]]

    @property
    def ended(self) -> bool:
        """Whether no other status can follow."""
        return not TRANSITIONS.get(cast(Status, self.status))


class WatchedLog:
    """What is known of one job's log. `closed`: nobody polls any more, so whoever watches must stop."""

    def __init__(self, state: LogState):
        self.state = state
        self.watchers = 0
        self.closed = False
        self._news = asyncio.Event()

    async def changed(self, seen: LogState, seconds: float) -> bool:
        """Wait until the state is another than `seen`, or nobody polls; return False after so many seconds."""
        if self.state == seen and not self.closed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._news.wait()
        return self.state != seen or self.closed

    def update(self, state: LogState) -> None:
        if state != self.state:
            self.state = state
            self._wake()

    def close(self) -> None:
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        """Wake those who wait now; who waits next waits for the next change."""
        self._news.set()
        self._news = asyncio.Event()


class LogPoller:
    """Runs in the server's event loop, and polls in a thread as long as anyone watches."""

    def __init__(self, store: Store, runs: Path):
        self._store = store
        self._runs = runs
        self._watched: dict[str, WatchedLog] = {}  # by job id
        self._polling: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def watch(self, job_id: str) -> AsyncGenerator[WatchedLog]:
        """Share one WatchedLog among all who watch this job's log. May raise AWAY."""
        if job_id not in self._watched:
            states = await run_in_threadpool(self._states, [job_id])
            self._watched.setdefault(job_id, WatchedLog(states[job_id]))
        log = self._watched[job_id]
        log.watchers += 1
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll())
        try:
            yield log
        finally:
            log.watchers -= 1
            if not log.watchers and self._watched.get(job_id) is log:
                del self._watched[job_id]

    def close(self) -> None:
        """End every stream of a log."""
        for log in self._watched.values():
            log.close()
        self._watched.clear()

    async def _poll(self) -> None:
        try:
            while self._watched:
                await asyncio.sleep(POLL_SECONDS)
                for job_id, state in (await run_in_threadpool(self._states, [*self._watched])).items():
                    if log := self._watched.get(job_id):
                        log.update(state)
        except AWAY:
            pass  # clients come back, and so does Redis
        finally:
            self.close()

    def _states(self, job_ids: list[str]) -> dict[str, LogState]:
        # statuses first: what a job printed before it ended is in its log by then
        statuses = self._store.statuses(job_ids)
        return {
            job_id: LogState(statuses.get(job_id, "deleted"), _sizes(RunDir(self._runs / job_id))) for job_id in job_ids
        }


def _sizes(run: RunDir) -> dict[int, tuple[int, int]]:
    """Return (bytes, time of change in ns) of each attempt's log."""
    sizes = {}
    with contextlib.suppress(OSError):  # deleted meanwhile
        for attempt in run.attempts():
            if attempt.log.exists():
                found = attempt.log.stat()
                sizes[attempt.number] = found.st_size, found.st_mtime_ns
    return sizes
