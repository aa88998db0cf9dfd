"""All jobs counted, by Redis itself: what monitoring asks for, in two round trips however many jobs there are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from worker.keys import KEYS
from worker.store import Store

RECENT_EVENTS = 50  # among which a running job's last step is looked for


@dataclass
class Census:
    statuses: dict[str, int]
    started: int
    queue_seconds: float  # from submission to start, summed over all that started
    oldest_waiting_seconds: dict[str, float]  # by pool
    running: dict[str, dict[str, float]]  # by job id: what is known of tokens_per_second, mfu, train_loss and
    # recovery_seconds, from the loss of an attempt until the next one ran, the last time


class Counting(Store):
    """A store that also counts."""

    def census(self) -> Census:
        counted = json.loads(self._run("census"))
        running = list(counted.pop("running"))  # an empty table is {} in Lua's JSON
        pipeline = self._redis.pipeline(transaction=False)
        for job_id in running:
            pipeline.hmget(KEYS["job"] + job_id, "tokens_per_second", "mfu")
            pipeline.xrevrange(KEYS["events"] + job_id, count=RECENT_EVENTS)
            pipeline.xrange(KEYS["changes"] + job_id)
        answers = iter(pipeline.execute())
        found = {}
        for job_id, (speed, mfu), events, changes in zip(running, answers, answers, answers, strict=True):
            known = {"tokens_per_second": speed, "mfu": mfu, "train_loss": _last_loss(events)}
            known["recovery_seconds"] = _last_recovery(changes)
            found[job_id] = {name: float(value) for name, value in known.items() if value is not None}
        return Census(**counted, running=found)


def _last_loss(newest_first: list[Any]) -> float | None:
    events = (json.loads(fields["event"]) for _, fields in newest_first)
    return next((float(event["train_loss"]) for event in events if event["type"] == "step"), None)


def _last_recovery(changes: list[Any]) -> float | None:
    began, took = None, None
    for _, fields in changes:
        if fields["to"] == "recovering":
            began = float(fields["time"])
        elif fields["to"] == "running" and began is not None:
            took, began = float(fields["time"]) - began, None
    return took
