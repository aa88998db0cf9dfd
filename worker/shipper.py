"""Copies a run's events, in order and without a gap, from its files into Redis, and tells the job what they say."""

from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from gptcore.events import Failed, Finished, Stopped, parse_event, read_lines
from gptcore.rundir import RunDir
from worker.job import Status
from worker.progress import Progress
from worker.record import place
from worker.store import Store, Superseded

BATCH_EVENTS = 500


class Shipper:
    """Ships for attempt `holder`, which has the job: first what earlier attempts left, then its own events.

    It starts at the newest event that Redis has: the job's record tells where the line of that event begins. If the
    record does not fit the stream or the file (Redis was restored from a backup), it reads that attempt's file from its
    start, passes over what Redis has, and sends the rest again.
    """

    def __init__(self, store: Store, job_id: str, run_dir: RunDir, holder: int, total_steps: int | None):
        self._store = store
        self._job_id = job_id
        self._run_dir = run_dir
        self._holder = holder
        self._total_steps = total_steps
        self._known = ""  # id of the newest event in Redis; empty: to be asked for
        self._attempt = run_dir.attempt(holder)
        self._offset = 0  # bytes of the attempt's file that were read
        self.progress = Progress(total_steps)
        self.finished = False  # some attempt said so

    @property
    def attempt(self) -> int:
        """The attempt whose events are shipped now: the holder, or an earlier one."""
        return self._attempt.number

    @property
    def outcome(self) -> Finished | Stopped | Failed | None:
        """The holder's last event, once it was shipped."""
        return self.progress.outcome if self.attempt == self._holder else None

    def send(self, status: Status | None = None, who: str = "", **fields: Any) -> int:
        """Ship the next complete lines; return how many there were, at most BATCH_EVENTS. Raises Superseded.

        After an error the same lines are sent again, which changes nothing if they had arrived. A damaged line,
        or one of a later version, is left to those who read the file.
        """
        if not self._known:
            self._begin()
        begins, lines = self._next_lines()
        fresh, number = [], self.attempt
        for end, line in lines:
            begin, begins = begins, end
            try:
                event = parse_event(line)
            except ValueError:
                continue
            changes = self.progress.take(event)
            self.finished |= isinstance(event, Finished)
            if (number, event.seq) > place(self._known):
                fresh.append((f"{number}-{event.seq}", line))
                fields |= {name: value for name, value in changes.items() if value is not None}
                fields["shipped"] = f"{number}-{event.seq} {begin}"
        if fresh:
            newest = self._store.ship(self._job_id, self._holder, self._known, fresh, fields, who=who, status=status)
            if newest is not None:  # Redis came back with an older state
                self._known = ""
                return len(lines)
            self._known = fresh[-1][0]
        self._offset = begins
        return len(lines)

    def _begin(self) -> None:
        known, offset, results = self._store.shipped(self._job_id)
        attempt, seq = place(known)
        if attempt > self._holder:
            raise Superseded(f"attempt {self._holder} of {self._job_id} was given up: {known} is there")
        self._known = known
        self.progress.results = results | self.progress.results
        self._turn_to(max(1, attempt))
        if offset is not None and self._begins_with(offset, seq):
            self._offset = offset  # that event is read once more: how its attempt ended may stand there

    def _turn_to(self, number: int) -> None:
        if number != self.attempt:  # read again, an attempt keeps what was learned from it
            self.progress = Progress(self._total_steps, self.progress.results)
        self._attempt = self._run_dir.attempt(number)
        self._offset = 0

    def _begins_with(self, offset: int, seq: int) -> bool:
        """Whether the line at this offset is the event `seq` of the attempt."""
        try:
            _, line = next(read_lines(self._attempt.events, offset))
            return bool(parse_event(line).seq == seq)
        except (OSError, StopIteration, ValueError):
            return False

    def _next_lines(self) -> tuple[int, list[tuple[int, str]]]:
        """The next unread lines, starting with the oldest attempt that has any, and the offset where they begin."""
        while True:
            file = self._attempt.events
            lines = list(islice(read_lines(file, self._offset), BATCH_EVENTS)) if file.exists() else []
            if lines or self.attempt == self._holder:
                return self._offset, lines
            self._turn_to(self.attempt + 1)


def ship_rest(
    store: Store, runs: Path, job_id: str, attempt: int, *, meanwhile: Callable[[], None] = lambda: None
) -> bool:
    """Ship what the launcher of a lost attempt had not; return whether the run had finished.

    Calls `meanwhile` between two batches. Does nothing if the run directory is not here, or is another job's.
    """
    run_dir = RunDir(runs / job_id)
    if not run_dir.path.exists() or run_dir.owner() not in ("", job_id):
        return False
    shipper = Shipper(store, job_id, run_dir, attempt, None)
    with suppress(Superseded):
        while shipper.send():
            meanwhile()
    return shipper.finished


def end_shipped(store: Store, job_id: str, attempt: int, who: str) -> None:
    """End a lost attempt whose run had finished. Does nothing if it was given up before: the next one does it."""
    with suppress(Superseded):
        store.finish(job_id, attempt, "succeeded", "finished before its launcher was lost", who=who, fields={})
