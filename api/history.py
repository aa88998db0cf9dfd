"""What happened to a job, in order: events, also those that Redis keeps no longer, and changes of its status."""

from __future__ import annotations

from itertools import islice, takewhile
from pathlib import Path

from gptcore.rundir import RunDir
from worker.record import place
from worker.store import Store


def read_history(store: Store, runs: Path, job_id: str, after: str = "0-0", count: int = 1000) -> list[tuple[str, str]]:
    """(id, JSON) of what stands behind `after`, oldest first. Older events come from the run directory, where it is."""
    attempt, seq, *_ = place(after)
    kept, changes = store.read_stream(job_id, f"{attempt}-{seq}", count)
    first = place(kept[0][0]) if kept else (1 << 60,)  # behind every event
    if first != (attempt, seq + 1) and (kept or store.last_event(job_id) == "0-0"):
        lines = RunDir(runs / job_id).lines_behind(attempt, seq)
        kept = [*islice(takewhile(lambda one: place(one[0]) < first, lines), count), *kept]
    fresh = [one for one in changes if place(one[0]) > place(after)]
    return sorted(kept + fresh, key=lambda one: place(one[0]))[:count]
