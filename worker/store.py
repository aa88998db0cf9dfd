"""The truth about jobs and nodes, in Redis. What must happen as a whole is one Lua script (`worker/lua/`).

Every method may raise `worker.connection.AWAY`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from redis.exceptions import NoPermissionError

from gptcore.plan import Hardware, Plan
from gptcore.spec import AnySpec
from worker.archive import Archive, ArchivedJob
from worker.connection import Connected
from worker.doorbell import Doorbell
from worker.job import Census, Job, JobError, JobPage, Node, Status, Ticket, new_job_id
from worker.keys import KEYS, scripts
from worker.record import change_entry, changes_of, flat, job_of, new_record, place

LEASE_SECONDS = 12.0  # of an attempt and of a node
CLAIM_SECONDS = 10.0  # a ticket not started by then is replaced by the next attempt
FREEZE_SECONDS = 600.0  # a job that has waited this long lets no smaller one pass
EVENTS_KEPT = 100_000  # newest of a run in Redis; all of them are in the run directory
FORGET_NODE_SECONDS = 3600.0
LOOKED_AT = 10_000  # jobs, for a page of a list
LOOKED_AT_ONCE = 500  # by one script: one or two milliseconds in which Redis answers nobody else
LOCAL = "local"  # owner of the jobs that came without a key
NOT_DUE, TOO_SOON = -1, -2  # answers of `reserve`
PACE_SECONDS = 0.1  # after TOO_SOON


class JobNotFound(LookupError):
    """There is no job of this id."""


class NodeNotFound(LookupError):
    """There is no node of this id."""


class IdempotencyConflict(ValueError):
    """The same Idempotency-Key came with another body."""


class BadCursor(ValueError):
    """`after` is no cursor that a page gave as its `next`."""


class Superseded(RuntimeError):
    """Another attempt has the job, or none: whoever asked must stop and write nothing."""


class NotPossible(RuntimeError):
    """What was asked of a job does not go with its status."""


class Store(Connected):
    def __init__(self, url: str, socket_timeout: float = 5.0, archive: Archive | None = None):
        """`archive`: where jobs are read that Redis has no longer."""
        super().__init__(url, socket_timeout)
        self.url = url
        self._archive = archive
        self._scripts = {name: self._redis.register_script(text) for name, text in scripts().items()}

    def _run(self, name: str, *args: str | float) -> Any:
        return self._scripts[name](args=list(args))

    # ---- jobs

    def create_job(
        self, spec: AnySpec, plan: Plan | None, *, idempotency_key: str | None = None, body_sha256: str = "",
        parent_job_id: str | None = None, children: Sequence[AnySpec] = (), device: str | None = None,
        owner: str = LOCAL, who: str = "anyone",
    ) -> tuple[Job, bool]:  # fmt: skip
        """Queue a resolved spec, or find the job that this key made in the last 24 h.

        With a parent it waits for that job to succeed, and is cancelled if it does not. `children` are
        created in the same script and run in their order: a child's `source` "parent" becomes the new job's id.
        All of them run on `device` ("cpu", "cuda") if their specs say "auto"; None: on the first that suffices.
        All of them belong to `owner`; `who` is named in their first change of status.
        Returns the job and whether it is new. Raises IdempotencyConflict.
        """
        while True:
            job_id = new_job_id()
            made = [new_record(job_id, parent_job_id, spec, plan, device, owner)]
            for child in children:
                if getattr(child, "source", None) == "parent":
                    child = child.model_copy(update={"source": job_id})
                record = new_record(new_job_id(), job_id, child, None, device, owner)
                # one after the other, also where an earlier one fails: the model card shows evaluations
                record["fields"] += ["follows", made[-1]["id"]] if made[1:] else []
                made.append(record)
            outcome, job_id = self._run("create", idempotency_key or "", body_sha256, who, *map(json.dumps, made))
            if why := {"conflict": " with another body", "deleted": ", which was deleted"}.get(outcome):
                raise IdempotencyConflict(
                    f"Idempotency-Key {idempotency_key!r} was used for {job_id}{why}; use a new key"
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
        if jobs:
            return jobs[0]
        if archived := self._archived(job_id):
            return job_of(archived.record, None).model_copy(update={"archived": True})
        raise JobNotFound(job_id)

    def _archived(self, job_id: str) -> ArchivedJob | None:
        return self._archive.read(job_id) if self._archive else None

    def exists(self, job_id: str) -> bool:
        """Return whether Redis has the job's record."""
        return bool(self._redis.exists(KEYS["job"] + job_id))

    def revision(self) -> str:
        """Return another text once a job may have changed: its record, its place in a queue, or that it exists."""
        return self._redis.get(KEYS["revision"]) or ""

    def require_job(self, job_id: str) -> None:
        """Raises JobNotFound. Reads less than `get_job`."""
        if not self.exists(job_id) and not self._archived(job_id):
            raise JobNotFound(job_id)

    def statuses(self, job_ids: Sequence[str]) -> dict[str, str]:
        """Return the status of each of these jobs that exists, without the rest of its record."""
        pipeline = self._redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipeline.hget(KEYS["job"] + job_id, "status")
        found = dict(zip(job_ids, pipeline.execute(), strict=True))
        for job_id, status in found.items():
            if status is None and (archived := self._archived(job_id)):
                found[job_id] = archived.record.get("status")
        return {job_id: status for job_id, status in found.items() if status}

    def _get_jobs(self, job_ids: list[str]) -> list[Job]:
        """Those that exist, in the order asked for."""
        pipeline = self._redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipeline.hgetall(KEYS["job"] + job_id)
        records = zip(job_ids, pipeline.execute(), strict=True)
        found = [{"id": job_id} | fields for job_id, fields in records if fields]
        for fields in found:
            pipeline.zrank(KEYS["queue"] + fields.get("pool", ""), fields["id"])
            pipeline.hget(KEYS["waits"] + fields.get("pool", ""), fields.get("line", ""))
        answers = pipeline.execute()
        for fields, rank, why in zip(found, answers[::2], answers[1::2], strict=True):
            if rank is not None and why is not None:
                fields["status_reason"] = why  # said once for all jobs that need the same
        return [job_of(fields, rank) for fields, rank in zip(found, answers[::2], strict=True)]

    def list_jobs(
        self, *, status: str | None = None, kind: str | None = None, label: str | None = None,
        name: str | None = None, owner: str | None = None, parent_job_id: str | None = None,
        limit: int = 20, after: str | None = None,
    ) -> JobPage:  # fmt: skip
        """Return a page of jobs, newest first. `label` is "key" or "key=value"; `after` is a page's `next`.

        Filters that rarely match together may give a page with fewer than `limit` jobs, or none, that has more:
        one call looks at LOOKED_AT jobs at most, and the next page continues there. Raises BadCursor.
        """
        if after is not None and not (after.isascii() and after.isdecimal()):
            raise BadCursor(f"after {after!r} is no cursor; use the `next` of the page before")
        asked = {"status": status, "kind": kind, "name": name, "owner": owner, "parent_job_id": parent_job_id}
        asked |= {"label": label}
        indexes = [f"{field}:{value}" for field, value in asked.items() if value is not None]
        below, found = "+inf" if after is None else f"({after}", list[tuple[str, str]]()
        for _ in range(LOOKED_AT // LOOKED_AT_ONCE):
            some, down_to = self._run("list", below, limit + 1 - len(found), LOOKED_AT_ONCE, *indexes)
            found += some
            if len(found) > limit or not down_to:
                break
            below = f"({down_to}"
        page = found[:limit]
        if len(found) > limit:
            down_to = page[-1][1]
        data = self._get_jobs([job_id for job_id, _ in page])
        return JobPage(data=data, has_more=bool(down_to), next=down_to or None)

    def jobs_alike(self, likeness: str, count: int) -> list[str]:
        """Return the ids of the newest runs of this likeness that succeeded in their first attempt."""
        return list(self._redis.zrevrange(KEYS["alike"] + likeness, 0, count - 1))

    def census(self) -> Census:
        """Return the counts that the scripts keep; the cost does not grow with the number of jobs."""
        return Census.model_validate_json(self._run("census"))

    def request_cancel(self, job_id: str, who: str = "api") -> Job:
        """Wish a job's end; again and again does no more than once. Raises JobNotFound."""
        return self._ask("stop", job_id, who, "cancel")

    def request_pause(self, job_id: str, who: str = "api") -> Job:
        """Wish that a job saves a checkpoint and waits for `resume`. Raises JobNotFound, NotPossible."""
        job = self._ask("stop", job_id, who, "pause")
        if job.status not in ("pausing", "paused"):
            raise NotPossible(f"{job_id} is {job.status}; only a job that waits or runs can be paused")
        return job

    def resume(self, job_id: str, who: str = "api") -> Job:
        """Queue a paused job again; one that waits or runs stays as it is. Raises JobNotFound, NotPossible."""
        job = self._ask("resume", job_id, who)
        if job.ended or job.status in ("pausing", "cancelling"):
            way_out = "resume it once it is paused" if job.status == "pausing" else "submit it as a new job"
            if job.status in ("failed", "cancelled") and job.kind == "train":
                more = json.dumps({"from": job_id, "overrides": {"init_from": {"source": job_id, "optimizer": True}}})
                way_out = f"a new job goes on from its last checkpoint: trainmaster continue {job_id}, or submit {more}"
            raise NotPossible(f"{job_id} is {job.status}; {way_out}")
        return job

    def delete_job(self, job_id: str, look: bool = False, archived: bool = False, root: str = "") -> None:
        """Forget an ended job's record and streams. Raises JobNotFound, NotPossible.

        `look`: only check whether it may be deleted. `archived`: Redis may have no record of it. `root`: the runs
        root where the caller deletes the files; files in another root are noted as leftovers of that one.
        """
        why = self._run("delete", job_id, "look" if look else "", "archived" if archived else "", root)
        if why is None:
            raise JobNotFound(job_id)
        if why:
            way_out = f"{why} reads its files" if why.startswith("job-") else f"it is {why}: cancel it"
            raise NotPossible(f"{job_id} cannot be deleted yet; {way_out}")

    def _ask(self, script_name: str, job_id: str, *args: str) -> Job:
        self._run(script_name, job_id, *args)  # on an archived job it changes nothing, as on any that has ended
        return self.get_job(job_id)

    # ---- what deletions leave in other runs roots

    def leftovers(self, root: str, count: int) -> list[str]:
        """Return ids of deleted jobs whose run directories in this runs root are to be removed now."""
        return list(self._redis.zrangebyscore(KEYS["leftovers"] + root, "-inf", self._now(), start=0, num=count))

    def forget_leftover(self, root: str, job_id: str) -> None:
        self._redis.zrem(KEYS["leftovers"] + root, job_id)

    def postpone_leftover(self, root: str, job_id: str, seconds: float) -> None:
        self._redis.zadd(KEYS["leftovers"] + root, {job_id: self._now() + seconds}, xx=True)

    # ---- retention

    def take_sweep(self, seconds: float) -> bool:
        """Return whether no process has taken the sweep in the last `seconds`."""
        return bool(self._redis.set(KEYS["sweep"], "", nx=True, px=int(seconds * 1000)))

    def ended_before(self, seconds: float, count: int) -> list[str]:
        """Return ids of jobs that ended more than `seconds` ago, the oldest first, at most `count`."""
        return list(self._redis.zrangebyscore(KEYS["ended"], "-inf", self._now() - seconds, start=0, num=count))

    def postpone_archiving(self, job_id: str, seconds: float) -> None:
        """Leave a job out of `ended_before(seconds)` for a day."""
        self._redis.zadd(KEYS["ended"], {job_id: self._now() - seconds + 86400}, xx=True)

    def whole_job(self, job_id: str) -> ArchivedJob:
        """Return all that is to be archived of a job."""
        pipeline = self._redis.pipeline()
        pipeline.hgetall(KEYS["job"] + job_id)
        pipeline.xrange(KEYS["changes"] + job_id)
        record, changes = pipeline.execute()
        return ArchivedJob(record=record, changes=changes)

    def kept_by(self, job_id: str) -> str:
        """Return what keeps a job in Redis: its status, a job that reads it, missing events; "" if nothing does."""
        return str(self._run("archive", job_id, "look"))

    def archive(self, job_id: str, job: ArchivedJob) -> bool:
        """Remove an archived job from Redis; return False if something keeps it, or it has changed since."""
        fields = [text for field in job.record.items() for text in field]
        return bool(self._run("archive", job_id, *fields) == "")

    # ---- the launcher's side: all of it asks first whether the attempt still has the job

    def claim(self, ticket: Ticket, boot: str, runs_root: str = "") -> bool:
        """Start a ticket: once, and never for a job that is to stop. `boot` names the claimer, who may ask again."""
        args = (ticket.job_id, str(ticket.attempt), str(ticket.node_rank), boot, runs_root, LEASE_SECONDS)
        return bool(self._run("claim", *args) == "claimed")

    def renew(self, job_id: str, attempt: int, node_rank: int = 0) -> str:
        """Hold the lease of an attempt, or of a member's part in it. Raises Superseded.

        Returns "", or what is desired ("cancel", "pause"), "broken: why" where a member's part broke; to a
        member where the ranks meet, and "over" once the first node's part has ended.
        """
        return str(self._held("renew", job_id, attempt, str(node_rank), LEASE_SECONDS))

    def leave(self, job_id: str, attempt: int, node_rank: int, broke: str = "") -> None:
        """A member's part has ended and nothing of it lives; `broke`: why the attempt cannot go on without it."""
        self._run("leave", job_id, str(attempt), str(node_rank), broke)

    def members_left(self, job_id: str) -> list[str]:
        """Those members, as "job/node rank", that have not left the attempt under way and whose leases hold."""
        live = self._redis.zrangebyscore(KEYS["leases"], self._now(), "+inf")
        return [member for member in live if member.startswith(f"{job_id}/")]

    def report(
        self, job_id: str, attempt: int, fields: Mapping[str, Any], *, who: str = "", status: Status | None = None
    ) -> None:
        """Set fields of the job, and its status where that may follow. Raises Superseded."""
        self.ship(job_id, attempt, "0-0", [], fields, who=who, status=status)

    def ship(
        self, job_id: str, attempt: int, before: str, events: Sequence[tuple[str, str]], fields: Mapping[str, Any],
        *, who: str = "", status: Status | None = None,
    ) -> str | None:  # fmt: skip
        """Add (id, JSON) events behind the one with id `before`, and `report`; those there already stay alone.

        Returns None; or, where the stream ends before `before`, the id of its newest event: an older state
        was restored, and all behind that id is to be shipped again. Raises Superseded.
        """
        lines = [text for event in events for text in event]
        said: tuple[str | float, ...] = (who, status or "", before, EVENTS_KEPT, len(events), *lines, *flat(fields))
        newest = self._held("ship", job_id, attempt, *said)
        return None if newest == "shipped" else str(newest)

    def finish(
        self, job_id: str, attempt: int, status: Status, why: str, *, who: str, fields: Mapping[str, Any]
    ) -> str:
        """End an attempt and free its slots; the status it came to. Raises Superseded."""
        return str(self._held("finish", job_id, attempt, who, status, why, *flat(fields)))

    def _held(self, script_name: str, job_id: str, attempt: int, *args: str | float) -> Any:
        answer = self._run(script_name, job_id, str(attempt), *args)
        if answer is None:
            raise Superseded(f"attempt {attempt} of {job_id} was given up")
        return answer

    def holds(self, job_id: str, attempt: str) -> bool:
        """Whether this attempt has the job now."""
        leased = self._redis.zscore(KEYS["leases"], job_id) is not None
        return leased and bool(self._redis.hget(KEYS["job"] + job_id, "attempt") == attempt)

    def record(self, job_id: str) -> dict[str, str]:
        """All fields of a job as they are stored, the job system's own among them."""
        record: dict[str, str] = self._redis.hgetall(KEYS["job"] + job_id)
        return record

    def reassert(self, attempt: int, record: Mapping[str, str], *, who: str) -> bool:
        """Take the job back for an attempt that Redis, restored to an older state, does not know.

        `record` is the job's as the attempt found it. False where another attempt has the job, or it ended.
        """
        fields = [text for field in record.items() for text in field]
        return bool(self._run("reassert", record["id"], str(attempt), who, LEASE_SECONDS, *fields))

    # ---- events

    def read_events(self, job_id: str, after: str = "0-0", count: int = 1000) -> list[tuple[str, str]]:
        """(id, JSON) of the events behind `after`, oldest first."""
        return self.read_stream(job_id, after, count)[0]

    def read_stream(self, job_id: str, after: str, count: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Return (id, JSON) of the events and of the status changes after `after`, at most `count` of each.

        Both are read in one transaction, so that none comes between them.
        """
        pipeline = self._redis.pipeline()
        pipeline.xrange(KEYS["events"] + job_id, f"({after.partition('.')[0]}", "+", count)
        pipeline.xrange(KEYS["changes"] + job_id, f"({change_entry(after)}", "+", count)
        events, changes = pipeline.execute()
        if not changes and not self.exists(job_id) and (archived := self._archived(job_id)):
            entry = place(change_entry(after))
            changes = [one for one in archived.changes if place(one[0]) > entry][:count]
        return (
            [(entry_id, fields["event"]) for entry_id, fields in events],
            [(change.id, change.model_dump_json()) for change in changes_of(changes)],
        )

    def shipped(self, job_id: str) -> tuple[str, int | None, dict[str, float]]:
        """Return the id of the newest event, where its line begins in its file, and the job's results so far.

        The offset (bytes) is None if the job's record does not tell it for this very event.
        """
        cursor, results = self._redis.hmget(KEYS["job"] + job_id, "shipped", "results")
        newest = self.last_event(job_id)
        event, _, offset = (cursor or "").partition(" ")
        return newest, int(offset) if event == newest else None, json.loads(results or "{}")

    def newest(self, job_id: str) -> str:
        """Return the id of the newest event or status change; "0-0" if there is none."""
        changes = changes_of(self._redis.xrevrange(KEYS["changes"] + job_id, count=1))
        return max([self.last_event(job_id), *(change.id for change in changes)], key=place)

    def last_event(self, job_id: str) -> str:
        """The id of the newest event there is; "0-0" where there is none."""
        newest = self._redis.xrevrange(KEYS["events"] + job_id, count=1)
        return newest[0][0] if newest else "0-0"

    # ---- nodes and slots

    def register_node(self, node: Node) -> None:
        """Write a node's record and renew its lease. Forget the nodes that were not seen for an hour."""
        slots = sorted(node.slots, key=lambda slot: slot.hardware.ranks)
        offer = [node.runs_root, [(slot.id, slot.hardware.ranks, slot.hardware.device) for slot in slots]]
        args = (node.model_dump_json(), node.pool, json.dumps(offer), LEASE_SECONDS, FORGET_NODE_SECONDS)
        self._run("register", node.id, *args)

    def retire_node(self, node_id: str) -> None:
        """End a node's lease now: nothing new is placed on it."""
        self._run("retire", node_id)

    def set_schedulable(self, node_id: str, schedulable: bool) -> Node:
        """Whether new jobs are placed on a node; those it runs go on. Raises NodeNotFound."""
        (self._redis.srem if schedulable else self._redis.sadd)(KEYS["drained"], node_id)
        for node in self.list_nodes():
            if node.id == node_id:
                return node
        self._redis.srem(KEYS["drained"], node_id)
        raise NodeNotFound(node_id)

    def list_nodes(self) -> list[Node]:
        """Return every node seen in the last hour, live or not, by id. Only reads."""
        now = self._now()
        leases = dict(self._redis.zrange(KEYS["node_leases"], 0, -1, withscores=True))
        records, owners = self._redis.hgetall(KEYS["nodes"]), self._redis.hgetall(KEYS["owners"])
        drained = self._redis.smembers(KEYS["drained"])
        nodes = []
        for node_id, until in sorted(leases.items()):
            # a record may be missing, as where Redis evicts keys; its agent writes it again
            if until < now - FORGET_NODE_SECONDS or node_id not in records:
                continue
            node = json.loads(records[node_id])
            node["slots"] = [slot | {"job_id": owners.get(slot["id"])} for slot in node["slots"]]
            node |= {"schedulable": node_id not in drained, "lease_until": until, "live": until > now}
            nodes.append(Node.model_validate(node))
        return nodes

    def pool_hardware(self, pool: str, device: str = "auto", ranks: int = 1) -> Hardware | None:
        """Return the slot that a job of `ranks` a node gets in a pool where nothing runs; None if no node is live.

        It is the smallest slot with enough ranks, else the largest. A `device` other than "auto" is preferred if the
        pool has it; with "auto" GPUs come before CPU cores.
        """
        slots = [slot.hardware for node in self.live_nodes(pool) for slot in node.slots]
        devices = {hardware.device for hardware in slots}
        if device not in devices:
            device = "cuda" if "cuda" in devices else "cpu"
        slots = [hardware for hardware in slots if hardware.device == device]
        sufficient = [hardware for hardware in slots if hardware.ranks >= ranks]
        if sufficient:
            return min(sufficient, key=lambda hardware: hardware.ranks)
        return max(slots, key=lambda hardware: hardware.ranks, default=None)

    def live_nodes(self, pool: str) -> list[Node]:
        return [node for node in self.list_nodes() if node.live and node.pool == pool]

    def _now(self) -> float:
        seconds, microseconds = self._redis.time()
        return float(seconds) + float(microseconds) / 1e6

    # ---- scheduling

    def reserve(self, pool: str, only_if_due: bool = False) -> int:
        """Give slots to waiting jobs, all that a job needs or none; return how many jobs were placed.

        With `only_if_due` the many agents of a pool share the work. Returns NOT_DUE, having done nothing, if the last
        pass is recent and nothing has changed since; TOO_SOON, if something has: ask again after PACE_SECONDS.
        """
        due = "due" if only_if_due else ""
        return int(self._run("reserve", pool, CLAIM_SECONDS, FREEZE_SECONDS, LEASE_SECONDS, due))

    def run_id(self) -> str:
        """Another one for each start of a Redis; empty where INFO is not permitted."""
        try:
            return str(self._redis.info("server")["run_id"])
        except NoPermissionError:
            return ""

    def hold_off(self) -> None:
        """Place nothing and give nothing up until who runs has had time to say so."""
        self._redis.set(KEYS["hold"], self._now() + LEASE_SECONDS)

    def outbox(self) -> list[Ticket]:
        """Tickets reserved and not yet handed on, oldest first."""
        return [Ticket.model_validate_json(text) for text in self._redis.lrange(KEYS["outbox"], 0, -1)]

    def clear_outbox(self, ticket: Ticket) -> None:
        if self._redis.lrem(KEYS["outbox"], 1, ticket.model_dump_json()):
            return
        for text in self._redis.lrange(KEYS["outbox"], 0, -1):  # an older version wrote it in another order
            if Ticket.model_validate_json(text) == ticket:
                self._redis.lrem(KEYS["outbox"], 0, text)

    def lose_expired(self, max_attempts: int) -> list[str]:
        """Give up every attempt that lost a lease, if another one follows it at once; return the jobs' ids.

        The others stay in `unshipped` until `lose_shipped`.
        """
        return list(self._run("lose", LEASE_SECONDS, max_attempts, "scheduler", "", "", "", ""))

    def lose(
        self, job_id: str, attempt: int, max_attempts: int, error: JobError, *, who: str, shipped: bool = True
    ) -> bool:
        """Give up an attempt known to be dead: another one follows, or the job fails with `error`.

        It fails once `max_attempts` were lost in a row without a new checkpoint; with 0 this one does not count.
        Returns False, without a change of status, for an attempt that no other one follows and whose events were not
        all `shipped`.
        """
        why = error.model_dump_json()
        said = (max_attempts, who, why, job_id, str(attempt), "shipped" if shipped else "")
        return bool(self._run("lose", LEASE_SECONDS, *said))

    def lose_shipped(self, job_id: str, attempt: int, max_attempts: int) -> bool:
        """Note that all events of a lost attempt were shipped, and give it up if that was not done yet."""
        said = (max_attempts, "scheduler", "", job_id, str(attempt), "shipped")
        return bool(self._run("lose", LEASE_SECONDS, *said))

    def unshipped(self, runs_root: str) -> list[tuple[str, int]]:
        """Return job and attempt of each lost attempt whose last events may not be in Redis yet.

        Only of runs that lie in `runs_root`, or in a root that no live node has. A job that runs again is left out: its
        launcher ships what earlier attempts left.
        """
        job_ids = self._redis.smembers(KEYS["unshipped"])
        if not job_ids:
            return []
        now, found = self._now(), []
        other_roots = {node.runs_root for node in self.list_nodes() if node.live} - {runs_root}
        for job_id in sorted(job_ids):
            attempt, root = self._redis.hmget(KEYS["job"] + job_id, "attempt", "root")
            if attempt is None:  # the job was deleted
                self._redis.srem(KEYS["unshipped"], job_id)
            elif root not in other_roots and not self._is_leased(job_id, now):
                found.append((job_id, int(attempt)))
        return found

    def _is_leased(self, job_id: str, now: float) -> bool:
        """Whether an attempt runs and none of its leases ran out."""
        ends = self._redis.zscore(KEYS["leases"], job_id)
        ran_out = {who.partition("/")[0] for who in self._redis.zrangebyscore(KEYS["leases"], "-inf", now)}
        return ends is not None and job_id not in ran_out

    def weaknesses(self) -> list[str]:
        """What in this Redis's settings may cost jobs that were acknowledged, and the way out."""
        try:
            info = self._redis.info()
        except NoPermissionError:
            return ["INFO is not permitted, so nobody knows whether it keeps jobs; permit it"]
        evicts = info.get("maxmemory") and info.get("maxmemory_policy") != "noeviction"
        found = {
            "appendonly is off, so a crash may cost jobs; set it to yes": info.get("aof_enabled") == 0,
            "it evicts jobs where its memory is full; set maxmemory-policy to noeviction": evicts,
        }
        return [what for what, is_so in found.items() if is_so]

    def doorbell(self, pool: str) -> Doorbell:
        return Doorbell(self._redis.pubsub(ignore_subscribe_messages=True), pool)
