"""All jobs counted: what monitoring asks for, in two round trips to Redis however many jobs there are."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self

from worker.connection import connect_redis
from worker.job import TERMINAL_STATUSES
from worker.keys import KEYS

FIELDS = ("status", "kind", "pool", "created_at", "started_at", "tokens_per_second", "mfu", "attempt")
RECENT_EVENTS = 50  # among which a running job's last step is looked for


@dataclass
class Running:
    kind: str
    tokens_per_second: float | None
    mfu: float | None
    train_loss: float | None
    recovery_seconds: float | None  # from the loss of an attempt until the next one ran, the last time


@dataclass
class Census:
    statuses: Counter[str] = field(default_factory=Counter)
    queue_seconds: list[float] = field(default_factory=list)  # from submission to start, of all that started
    oldest_waiting_seconds: dict[str, float] = field(default_factory=dict)  # by pool
    running: dict[str, Running] = field(default_factory=dict)  # by job id


class Counting:
    """Every method may raise `redis.ConnectionError` or `redis.TimeoutError`."""

    def __init__(self, client: Any):
        self._redis = client

    @classmethod
    def connect(cls, url: str) -> Self:
        return cls(connect_redis(url))

    def close(self) -> None:
        self._redis.close()

    def census(self) -> Census:
        found = Census()
        pipeline = self._redis.pipeline(transaction=False)
        job_ids = self._redis.zrange(KEYS["jobs"], 0, -1)
        for job_id in job_ids:
            pipeline.hmget(KEYS["job"] + job_id, FIELDS)
        seconds, microseconds = self._redis.time()
        now = float(seconds) + float(microseconds) / 1e6
        live = []
        for job_id, values in zip(job_ids, pipeline.execute(), strict=True):
            job = dict(zip(FIELDS, values, strict=True))
            if job["status"] is None:  # deleted meanwhile
                continue
            found.statuses[job["status"]] += 1
            if job["started_at"]:
                found.queue_seconds.append(float(job["started_at"]) - float(job["created_at"]))
            elif job["status"] not in TERMINAL_STATUSES:
                oldest = found.oldest_waiting_seconds.get(job["pool"], 0.0)
                found.oldest_waiting_seconds[job["pool"]] = max(oldest, now - float(job["created_at"]))
            if job["status"] == "running":
                live.append((job_id, job))
        for job_id, _ in live:
            pipeline.xrevrange(KEYS["events"] + job_id, count=RECENT_EVENTS)
            pipeline.xrange(KEYS["changes"] + job_id)
        answers = iter(pipeline.execute())
        for (job_id, job), events, changes in zip(live, answers, answers, strict=True):
            found.running[job_id] = Running(
                kind=job["kind"],
                tokens_per_second=_number(job["tokens_per_second"]),
                mfu=_number(job["mfu"]),
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
