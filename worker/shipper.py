"""Copies an attempt's events, in order, from its file into Redis, and tells the job what they say."""

from __future__ import annotations

from itertools import islice
from typing import Any

from gptcore.events import parse_event, read_lines
from gptcore.rundir import Attempt
from worker.job import Status
from worker.progress import Progress
from worker.store import Store

BATCH_EVENTS = 500


class Shipper:
    """`holder` is the attempt that has the job: it ships its own events and those of earlier ones.

    What `known`, the id of the stream's last event, shows to be there already is read and not sent: its
    news for the job are old.
    """

    def __init__(
        self,
        store: Store,
        job_id: str,
        attempt: Attempt,
        holder: int,
        total_steps: int | None,
        known: tuple[int, int] = (0, 0),
    ):
        self._store = store
        self._job_id = job_id
        self._attempt = attempt
        self._holder = holder
        self._known = known
        self._offset = 0  # behind the last line shipped
        self.progress = Progress(total_steps)

    def send(self, status: Status | None = None, who: str = "", **fields: Any) -> bool:
        """Ship the next complete lines; whether there were any. Raises Superseded.

        After an error the same lines are sent again, which changes nothing where they had arrived.
        """
        if not self._attempt.events.exists():
            return False
        lines = list(islice(read_lines(self._attempt.events, self._offset), BATCH_EVENTS))
        if not lines:
            return False
        fresh = []
        for _, line in lines:
            event = parse_event(line)
            changes = self.progress.take(event)
            if (self._attempt.number, event.seq) > self._known:
                fresh.append((event.seq, line))
                fields |= {name: value for name, value in changes.items() if value is not None}
        if fresh:
            self._store.append_events(self._job_id, self._attempt.number, fresh)
            self._store.report(self._job_id, self._holder, fields, who=who, status=status)
        self._offset = lines[-1][0]
        return True
