"""Copies a run's events, in order and without a gap, from its files into Redis, and tells the job what they say."""

from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from gptcore.events import Finished, parse_event, read_lines
from gptcore.rundir import RunDir
from worker.job import Status
from worker.progress import Progress
from worker.record import place
from worker.store import Store, Superseded

BATCH_EVENTS = 500


class Shipper:
    """Ships for attempt `holder`, which has the job: first what earlier attempts left, then its own events.

    It goes on behind the newest event that Redis has. Should Redis come back with older ones (restored
    from a backup), it starts again from there. What Redis knows already is read and not sent: its news
    for the job are old.
    """

    def __init__(self, store: Store, job_id: str, run_dir: RunDir, holder: int, total_steps: int | None):
        self._store = store
        self._job_id = job_id
        self._run_dir = run_dir
        self._holder = holder
        self._total_steps = total_steps
        self._known = ""  # id of the newest event in Redis; empty: to be asked for
        self.finished = False  # some attempt said so
        self._turn_to(holder)

    def _turn_to(self, number: int) -> None:
        self._attempt = self._run_dir.attempt(number)
        self._offset = 0  # behind its last line shipped
        self.progress = Progress(self._total_steps)

    def send(self, status: Status | None = None, who: str = "", **fields: Any) -> int:
        """Ship the next complete lines; how many there were, BATCH_EVENTS at most. Raises Superseded.

        After an error the same lines are sent again, which changes nothing where they had arrived. A damaged line,
        or one of a later version, is left to those who read the file.
        """
        if not self._known:
            self._begin(self._store.last_event(self._job_id))
        lines = self._next_lines()
        fresh, number = [], self._attempt.number
        for _, line in lines:
            try:
                event = parse_event(line)
            except ValueError:
                continue
            changes = self.progress.take(event)
            self.finished |= isinstance(event, Finished)
            if (number, event.seq) > place(self._known):
                fresh.append((f"{number}-{event.seq}", line))
                fields |= {name: value for name, value in changes.items() if value is not None}
        if fresh:
            newest = self._store.ship(self._job_id, self._holder, self._known, fresh, fields, who=who, status=status)
            if newest is not None:
                self._begin(newest)
                return len(lines)
            self._known = fresh[-1][0]
        if lines:
            self._offset = lines[-1][0]
        return len(lines)

    def _begin(self, known: str) -> None:
        if place(known)[0] > self._holder:
            raise Superseded(f"attempt {self._holder} of {self._job_id} was given up: {known} is there")
        self._known = known
        self._turn_to(max(1, place(known)[0]))

    def _next_lines(self) -> list[tuple[int, str]]:
        """Of the first attempt that has any more."""
        while True:
            file = self._attempt.events
            lines = list(islice(read_lines(file, self._offset), BATCH_EVENTS)) if file.exists() else []
            if lines or self._attempt.number == self._holder:
                return lines
            self._turn_to(self._attempt.number + 1)


def ship_rest(store: Store, runs: Path, job_id: str, attempt: int) -> None:
    """Ship what a launcher that is no more had not, before its attempt is given up: no other may follow.

    Nothing where the run directory is not here.
    """
    run_dir = RunDir(runs / job_id)
    if run_dir.path.exists():
        shipper = Shipper(store, job_id, run_dir, attempt, None)
        with suppress(Superseded):
            while shipper.send():
                pass
