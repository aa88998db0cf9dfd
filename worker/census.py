"""All jobs counted, by Redis itself: what monitoring asks for, in two round trips however many jobs there are."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Self

from worker.connection import connect_redis
from worker.keys import KEYS, script

RECENT_EVENTS = 50  # among which a running job's last step is looked for


@dataclass
class Running:
    tokens_per_second: float | None
    mfu: float | None
    train_loss: float | None
    recovery_seconds: float | None  # from the loss of an attempt until the next one ran, the last time


@dataclass
class Census:
    statuses: dict[str, int]
    started: int
    queue_seconds: float  # from submission to start, summed over all that started
    oldest_waiting_seconds: dict[str, float]  # by pool
    running: dict[str, Running] = field(default_factory=dict)  # by job id


class Counting:
    """Every method may raise `redis.ConnectionError` or `redis.TimeoutError`."""

    def __init__(self, client: Any):
        self._redis = client
        self._count = client.register_script(script("census"))

    @classmethod
    def connect(cls, url: str) -> Self:
        return cls(connect_redis(url))

    def close(self) -> None:
        self._redis.close()

    def census(self) -> Census:
        counted = json.loads(self._count())
        running = list(counted.pop("running"))  # an empty table is {} in Lua's JSON
        found = Census(**counted)
        pipeline = self._redis.pipeline(transaction=False)
        for job_id in running:
            pipeline.hmget(KEYS["job"] + job_id, "tokens_per_second", "mfu")
            pipeline.xrevrange(KEYS["events"] + job_id, count=RECENT_EVENTS)
            pipeline.xrange(KEYS["changes"] + job_id)
        answers = iter(pipeline.execute())
        for job_id, (speed, mfu), events, changes in zip(running, answers, answers, answers, strict=True):
            found.running[job_id] = Running(
                tokens_per_second=_number(speed),
                mfu=_number(mfu),
                train_loss=_last_loss(events),
                recovery_seconds=_last_recovery(changes),
            )
        return found


def _number(text: str | None) -> float | None:
    return float(text) if text else None


def _last_loss(newest_first: list[Any]) -> float | None:
    for _, fields in newest_first:
        event = json.loads(fields["event"])
        if event["type"] == "step":
            return float(event["train_loss"])
    return None


def _last_recovery(changes: list[Any]) -> float | None:
    began, took = None, None
    for _, fields in changes:
        if fields["to"] == "recovering":
            began = float(fields["time"])
        elif fields["to"] == "running" and began is not None:
            took, began = float(fields["time"]) - began, None
    return took
