"""The truth about jobs and nodes, in Redis. What must happen as a whole is one Lua script (`worker/lua/`).

Nothing here retries: a command that timed out may have run, and redis-py's own retries would run it
twice. Every method may raise `redis.ConnectionError` or `redis.TimeoutError`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Self, cast

import redis
import redis.asyncio
from pydantic import BaseModel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from gptcore.plan import Hardware, Plan
from gptcore.spec import PrepareSpec, TrainSpec
from worker.job import (
    TERMINAL_STATUSES,
    Job,
    JobError,
    JobPage,
    Node,
    Status,
    StatusChange,
    Ticket,
    new_job_id,
)
from worker.keys import KEYS, script

LEASE_SECONDS = 12.0  # of an attempt and of a node
CLAIM_SECONDS = 10.0  # a ticket not started by then is replaced by the next attempt
FREEZE_SECONDS = 600.0  # a job that has waited this long lets no smaller one pass
EVENTS_KEPT = 100_000  # newest of a run in Redis; all of them are in the run directory
FORGET_NODE_SECONDS = 3600.0

# fields of the job's hash that hold JSON; the others are plain text, which Pydantic reads
_JSON_FIELDS = ("labels", "nodes", "spec", "plan", "best_checkpoint", "published", "error")


class JobNotFound(LookupError):
    def __init__(self, job_id: str):
        self.job_id = job_id
        super().__init__(f"no job {job_id!r}")


class IdempotencyConflict(ValueError):
    """The same Idempotency-Key came with another body."""


class BadCursor(ValueError):
    """`after` is no cursor that a page gave as its `next`."""


class Superseded(RuntimeError):
    """Another attempt has the job, or none: whoever asked must stop and write nothing."""


class Store:
    def __init__(self, client: redis.Redis, url: str):
        self._redis: Any = client  # typed as bytes or text or a future; here every answer is text
        self._url = url
        names = ("create", "cancel", "reserve", "claim", "renew", "report", "finish", "lose")
        self._scripts = {name: client.register_script(script(name)) for name in names}

    @classmethod
    def connect(cls, url: str, socket_timeout: float = 5.0) -> Self:
        """`url` as redis-py takes it: redis://, rediss://, unix://."""
        client = redis.Redis.from_url(
            url,
            decode_responses=True,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=socket_timeout,
            socket_connect_timeout=socket_timeout,
            health_check_interval=0,
        )
        return cls(client, url)

    def close(self) -> None:
        self._redis.close()

    def ping(self) -> None:
        self._redis.ping()

    def _run(self, name: str, *args: str | float) -> Any:
        return self._scripts[name](args=list(args))

    # ---- jobs

    def create_job(
        self,
        spec: TrainSpec | PrepareSpec,
        plan: Plan | None,
        *,
        idempotency_key: str | None = None,
        body_sha256: str = "",
    ) -> tuple[Job, bool]:
        """Queue a resolved spec, or find the job that this key made in the last 24 h.

        Returns the job and whether it is new. Raises IdempotencyConflict.
        """
        asked = spec.resources
        fields = {
            "kind": spec.kind,
            "name": spec.name,
            "labels": spec.labels,
            "spec": spec.model_dump(mode="json"),
            "plan": plan,
            "total_steps": spec.max_steps if isinstance(spec, TrainSpec) else None,
            "pool": asked.pool,
            "priority": asked.priority,
            # text becomes shards on one core of one node, whatever the spec asks for
            "wanted_nodes": asked.nodes if isinstance(spec, TrainSpec) else 1,
            "wanted_ranks": asked.ranks_per_node if isinstance(spec, TrainSpec) else 1,
            "wanted_device": asked.device if isinstance(spec, TrainSpec) else "auto",
        }
        while True:
            outcome, job_id = self._run("create", new_job_id(), idempotency_key or "", body_sha256, *_flat(fields))
            if outcome == "conflict":
                raise IdempotencyConflict(
                    f"Idempotency-Key {idempotency_key!r} was used for {job_id} with another body; use a new key"
                )
            if outcome != "taken":
                return self.get_job(job_id), outcome == "created"

    def replayed_job(self, idempotency_key: str, body_sha256: str) -> Job | None:
        """The job that this key and body made in the last 24 h. Another body is left to `create_job` to refuse."""
        held, body = self._redis.hmget(KEYS["idempotency"] + idempotency_key, "job", "sha256")
        found = self._get_jobs([held]) if held and body == body_sha256 else []
        return found[0] if found else None

    def get_job(self, job_id: str) -> Job:
        """Raises JobNotFound."""
        jobs = self._get_jobs([job_id])
        if not jobs:
            raise JobNotFound(job_id)
        return jobs[0]

    def _get_jobs(self, job_ids: list[str]) -> list[Job]:
        """Those that exist, in the order asked for."""
        pipeline = self._redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipeline.hgetall(KEYS["job"] + job_id)
        found = [fields for fields in pipeline.execute() if fields]
        for fields in found:
            pipeline.zrank(KEYS["queue"] + fields["pool"], fields["id"])
        return [_job(fields, rank) for fields, rank in zip(found, pipeline.execute(), strict=True)]

    def list_jobs(
        self,
        *,
        status: str | None = None,
        kind: str | None = None,
        label: str | None = None,
        limit: int = 20,
        after: str | None = None,
    ) -> JobPage:
        """Newest first. `label` is "key" or "key=value"; `after` a page's `next`. Raises BadCursor."""
        if after is not None and not after.isdecimal():
            raise BadCursor(f"after {after!r} is no cursor; use the `next` of the page before")
        below = "+inf" if after is None else f"({after}"
        matching: list[tuple[str, str]] = []  # job id, its number
        while len(matching) <= limit:
            batch = self._redis.zrevrangebyscore(KEYS["jobs"], below, "-inf", 0, 500, withscores=True)
            numbered = [(job_id, str(int(number))) for job_id, number in batch]
            matching += self._matching(numbered, status, kind, label)
            if len(batch) < 500:
                break
            below = f"({numbered[-1][1]}"
        has_more = len(matching) > limit
        page = matching[:limit]
        return JobPage(
            data=self._get_jobs([job_id for job_id, _ in page]),
            has_more=has_more,
            next=page[-1][1] if has_more else None,
        )

    def _matching(
        self, numbered: list[tuple[str, str]], status: str | None, kind: str | None, label: str | None
    ) -> list[tuple[str, str]]:
        if status is None and kind is None and label is None:
            return numbered
        pipeline = self._redis.pipeline(transaction=False)
        for job_id, _ in numbered:
            pipeline.hmget(KEYS["job"] + job_id, ["status", "kind", "labels"])
        key, has_value, value = (label or "").partition("=")
        found = []
        for entry, (its_status, its_kind, text) in zip(numbered, pipeline.execute(), strict=True):
            labels = json.loads(text or "{}")
            labelled = label is None or (key in labels and (not has_value or labels[key] == value))
            if labelled and status in (None, its_status) and kind in (None, its_kind):
                found.append(entry)
        return found

    def request_cancel(self, job_id: str, who: str = "api") -> Job:
        """Wish a job's end; again and again does no more than once. Raises JobNotFound."""
        if self._run("cancel", job_id, who) is None:
            raise JobNotFound(job_id)
        return self.get_job(job_id)

    def status_changes(self, job_id: str) -> list[StatusChange]:
        """Oldest first; none for a job that does not exist."""
        return [
            StatusChange(
                id=entry_id,
                time=cast(datetime, fields["time"]),  # text, which Pydantic reads
                from_status=fields["from"],
                to_status=fields["to"],
                who=fields["who"],
                why=fields["why"],
            )
            for entry_id, fields in self._redis.xrange(KEYS["changes"] + job_id)
        ]

    # ---- the launcher's side: all of it asks first whether the attempt still has the job

    def claim(self, ticket: Ticket, boot: str) -> bool:
        """Start a ticket: true once, and never for a job that is to stop. `boot` names the claimer."""
        args = (ticket.job_id, str(ticket.attempt), str(ticket.node_rank), boot, LEASE_SECONDS)
        return bool(self._run("claim", *args) == "claimed")

    def renew(self, job_id: str, attempt: int) -> str:
        """Hold the attempt's lease; "", or how the job is to end ("cancel", "pause"). Raises Superseded."""
        desired = self._run("renew", job_id, str(attempt), LEASE_SECONDS)
        if desired is None:
            raise Superseded(f"attempt {attempt} of {job_id} was given up")
        return str(desired)

    def report(
        self, job_id: str, attempt: int, fields: Mapping[str, Any], *, who: str = "", status: Status | None = None
    ) -> None:
        """Set fields of the job, and its status where that may follow. Raises Superseded."""
        if not self._run("report", job_id, str(attempt), who, status or "", "", *_flat(fields)):
            raise Superseded(f"attempt {attempt} of {job_id} was given up")

    def finish(
        self, job_id: str, attempt: int, status: Status, why: str, *, who: str, fields: Mapping[str, Any]
    ) -> str:
        """End an attempt and free its slots; the status it came to. Raises Superseded."""
        came_to = self._run("finish", job_id, str(attempt), who, status, why, *_flat(fields))
        if came_to is None:
            raise Superseded(f"attempt {attempt} of {job_id} was given up")
        return str(came_to)

    def internal(self, job_id: str, field: str) -> str | None:
        """A field of the job system's own that `Job` does not show."""
        value: str | None = self._redis.hget(KEYS["job"] + job_id, field)
        return value

    # ---- events

    def append_events(self, job_id: str, attempt: int, lines: Iterable[tuple[int, str]]) -> None:
        """Add (seq, JSON) events under ids {attempt}-{seq}; what is there already, or newer, stays."""
        pipeline = self._redis.pipeline(transaction=False)
        for seq, line in lines:
            pipeline.xadd(
                KEYS["events"] + job_id, {"event": line}, id=f"{attempt}-{seq}", maxlen=EVENTS_KEPT, approximate=True
            )
        for outcome in pipeline.execute(raise_on_error=False):
            # "equal or smaller": sent before, or late from an older attempt
            if isinstance(outcome, redis.RedisError) and "equal or smaller" not in str(outcome):
                raise outcome

    def read_events(self, job_id: str, after: str = "0-0", count: int = 1000) -> list[tuple[str, str]]:
        """(id, JSON) of the events behind `after`, oldest first."""
        entries = self._redis.xrange(KEYS["events"] + job_id, f"({after}", "+", count)
        return [(entry_id, fields["event"]) for entry_id, fields in entries]

    def last_event(self, job_id: str) -> tuple[int, int]:
        """Attempt and seq of the newest event there is; (0, 0) where there is none."""
        for entry_id, _ in self._redis.xrevrange(KEYS["events"] + job_id, count=1):
            attempt, seq = entry_id.split("-")
            return int(attempt), int(seq)
        return 0, 0

    async def follow_events(
        self, job_id: str, after: str = "0-0", quiet_seconds: float = 10.0
    ) -> AsyncIterator[tuple[str, str] | None]:
        """(id, JSON) of events behind `after` as they come; None after each quiet time.

        Ends once the job has ended and all was given, or when the job is deleted. Raises JobNotFound.
        """
        events, changes = KEYS["events"] + job_id, KEYS["changes"] + job_id
        cursors: dict[str, str] = {events: after, changes: "0-0"}
        client = redis.asyncio.Redis.from_url(
            self._url,
            decode_responses=True,
            retry=AsyncRetry(NoBackoff(), 0),
            socket_timeout=quiet_seconds + 10,
        )
        async with _closed_after(client):
            if not await client.exists(KEYS["job"] + job_id):
                raise JobNotFound(job_id)
            ended = False
            while True:
                block = None if ended else int(quiet_seconds * 1000)
                news = await client.xread(cast(Any, cursors), count=1000, block=block)
                streams = cast("dict[str, Any] | list[Any]", news)
                for key, entries in _by_stream(streams):
                    for entry_id, fields in entries:
                        cursors[key] = entry_id
                        if key == events:
                            yield entry_id, fields["event"]
                        elif fields["to"] in TERMINAL_STATUSES:
                            ended = True  # its last event is in the stream by now: read once more
                if not news:
                    if ended or not await client.exists(KEYS["job"] + job_id):
                        return
                    yield None

    # ---- nodes and slots

    def register_node(self, node: Node) -> None:
        """Make a node known and live; also how its record changes."""
        record = node.model_dump_json(exclude={"lease_until": True, "live": True, "slots": {"__all__": {"job_id"}}})
        self._redis.hset(KEYS["nodes"], node.id, record)
        self.heartbeat(node.id)

    def heartbeat(self, node_id: str) -> None:
        """Hold a node's lease: what makes the scheduler use it."""
        self._redis.zadd(KEYS["node_leases"], {node_id: self._now() + LEASE_SECONDS})

    def retire_node(self, node_id: str) -> None:
        """End a node's lease now: nothing new is placed on it."""
        self._redis.zadd(KEYS["node_leases"], {node_id: self._now()}, xx=True)

    def list_nodes(self) -> list[Node]:
        """Every node known, live or not, by id. One not seen for an hour is forgotten."""
        now = self._now()
        leases = dict(self._redis.zrange(KEYS["node_leases"], 0, -1, withscores=True))
        records, owners = self._redis.hgetall(KEYS["nodes"]), self._redis.hgetall(KEYS["owners"])
        nodes = []
        for node_id, until in sorted(leases.items()):
            if until < now - FORGET_NODE_SECONDS:
                self._redis.zrem(KEYS["node_leases"], node_id)
                self._redis.hdel(KEYS["nodes"], node_id)
                continue
            node = json.loads(records[node_id])
            node["slots"] = [slot | {"job_id": owners.get(slot["id"])} for slot in node["slots"]]
            nodes.append(Node.model_validate(node | {"lease_until": until, "live": until > now}))
        return nodes

    def pool_hardware(self, pool: str, device: str = "auto") -> Hardware | None:
        """The largest slot of a pool's live nodes, GPUs before cores; None where no node is live.

        A `device` other than "auto" is preferred, where the pool has it.
        """
        slots = [slot.hardware for node in self.list_nodes() if node.live and node.pool == pool for slot in node.slots]
        slots = [hardware for hardware in slots if hardware.device == device] or slots
        return max(slots, key=lambda hardware: (hardware.device == "cuda", hardware.ranks), default=None)

    def _now(self) -> float:
        seconds, microseconds = self._redis.time()
        return float(seconds) + float(microseconds) / 1e6

    # ---- scheduling

    def reserve(self, pool: str) -> int:
        """Give slots to waiting jobs, all that a job needs or none; how many jobs were placed."""
        return int(self._run("reserve", pool, CLAIM_SECONDS, FREEZE_SECONDS))

    def outbox(self) -> list[Ticket]:
        """Tickets reserved and not yet handed on, oldest first."""
        return [Ticket.model_validate_json(text) for text in self._redis.lrange(KEYS["outbox"], 0, -1)]

    def clear_outbox(self, ticket: Ticket) -> None:
        for text in self._redis.lrange(KEYS["outbox"], 0, -1):
            if Ticket.model_validate_json(text) == ticket:
                self._redis.lrem(KEYS["outbox"], 0, text)

    def lose_expired(self, max_attempts: int) -> list[str]:
        """Give up every attempt whose lease ran out; the jobs' ids."""
        error = JobError(reason="lost", message="its worker was lost")
        return list(self._run("lose", LEASE_SECONDS, max_attempts, "scheduler", error.model_dump_json(), "", ""))

    def lose(self, job_id: str, attempt: int, max_attempts: int, error: JobError, *, who: str) -> None:
        """Give up an attempt known to be dead: another one follows, or the job fails with `error`.

        It fails once `max_attempts` were lost in a row without a new checkpoint.
        """
        self._run("lose", LEASE_SECONDS, max_attempts, who, error.model_dump_json(), job_id, str(attempt))

    def doorbell(self) -> Doorbell:
        return Doorbell(self._redis.pubsub(ignore_subscribe_messages=True))


class Doorbell:
    """Rings when there may be something to schedule. A ring can be lost: look now and then anyway."""

    def __init__(self, pubsub: Any):
        self._pubsub = pubsub
        pubsub.subscribe(KEYS["doorbell"])

    def wait(self, seconds: float) -> bool:
        """Whether it rang within `seconds`."""
        rang = self._pubsub.get_message(timeout=seconds) is not None
        while rang and self._pubsub.get_message(timeout=0) is not None:
            pass  # several rings are one
        return rang

    def close(self) -> None:
        self._pubsub.close()


@asynccontextmanager
async def _closed_after(client: redis.asyncio.Redis) -> AsyncIterator[None]:
    try:
        yield
    finally:
        # whoever stops following cancels every await in here; the connection is to be closed all the same
        await asyncio.shield(client.aclose())


def _by_stream(news: dict[str, Any] | list[Any]) -> list[tuple[str, list[tuple[str, dict[str, str]]]]]:
    """XREAD's answer by stream: RESP3 gives a map with nested lists, RESP2 pairs."""
    if isinstance(news, dict):
        return [(key, [entry for part in parts for entry in part]) for key, parts in news.items()]
    return [(key, entries) for key, entries in news]


def _flat(fields: Mapping[str, Any]) -> list[str]:
    """Field, value, field, value for HSET; those that are None are left as they were."""
    return [text for field, value in fields.items() if value is not None for text in (field, _text(value))]


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, BaseModel):
        return value.model_dump_json()
    return json.dumps(value)


def _job(fields: dict[str, str], rank: int | None) -> Job:
    decoded: dict[str, Any] = {
        name: json.loads(text) if name in _JSON_FIELDS else text for name, text in fields.items()
    }
    return Job.model_validate(decoded | {"queue_position": None if rank is None else rank + 1})
