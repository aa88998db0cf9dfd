"""What must hold after every round, whatever was done to the processes."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from dataclasses import dataclass
from itertools import pairwise

from gptcore.checkpoint import list_checkpoints
from gptcore.events import Evaluated, Step, read_lines
from gptcore.locks import is_held
from gptcore.rundir import RunDir
from tests.chaos.watch import Watch
from tests.chaos.world import World
from tests.conftest import status_changes
from tests.worker.conftest import living
from worker.job import TRANSITIONS
from worker.keys import KEYS
from worker.store import EVENTS_KEPT

SETTLE_SECONDS = 3.0  # in which a launcher that has said how its attempt ended leaves


@dataclass(frozen=True)
class Outcome:
    """What a run came to: its last weights, and its numbers step by step."""

    weights_sha256: str
    train_loss: dict[int, float]
    val_loss: dict[int, float]


def outcome(run: RunDir) -> Outcome:
    """As the run directory has it. For a step logged twice the greatest id wins."""
    train_loss, val_loss = {}, {}
    for event in run.events():
        if isinstance(event, Step):
            train_loss[event.step] = event.train_loss
        elif isinstance(event, Evaluated):
            val_loss[event.step] = event.val_loss
    newest = list_checkpoints(run)[-1].path / "model.safetensors"
    return Outcome(hashlib.sha256(newest.read_bytes()).hexdigest(), train_loss, val_loss)


def violations(world: World, job_id: str, undisturbed: Outcome | None, watch: Watch, *, ends: str) -> list[str]:
    """Sentences on what does not hold; none where all is well. Call it as soon as the job has ended.

    `ends`: the status that the job must have come to. Without `undisturbed` the numbers are not compared.
    """
    job, run = world.store.get_job(job_id), RunDir(world.settings.runs / job_id)
    alive = [f"{process.pid} {' '.join(process.cmdline())[:80]}" for process in living(job_id)]
    shipped, written = _shipped(world, job_id), _written(run)
    found = []
    if job.status != ends:
        why = f"{job.error.reason}: {job.error.message}" if job.error else job.status_reason
        found.append(f"the job came to {job.status} ({why}), not {ends}")
    if alive:
        found.append(f"processes were left: {alive}")
    found += _compare_streams(shipped, written)
    found += watch.seen.get(job_id, [])
    found += _left_over(world, job_id, run)
    found += _illegal_moves(world, job_id)
    if undisturbed is not None and job.status == ends:
        found += _compare(outcome(run), undisturbed)
    return found


def duplicate_tickets(world: World) -> list[str]:
    """Tickets that stand in RQ's queues more than once, or again once they were claimed."""
    found = []
    for key in world.redis.scan_iter("rq:queue:*", _type="list"):
        tickets = world.redis.lrange(key, 0, -1)
        claimed = [ticket for ticket in set(tickets) if _claimed(world, ticket)]
        # still there after it was seen to be claimed: not just taken between two looks
        again = set(world.redis.lrange(key, 0, -1)) & set(claimed) if claimed else set()
        twice = {ticket for ticket in tickets if tickets.count(ticket) > 1} | again
        found += [f"RQ got ticket {ticket} twice" for ticket in sorted(twice)]
    return found


def _claimed(world: World, ticket: str) -> bool:
    job_id, attempt, rank = ticket.rsplit("-", 2)
    return bool(world.redis.hexists(KEYS["job"] + job_id, f"claim:{attempt[1:]}:{rank[1:]}"))


def lost(world: World, acknowledged: list[str]) -> list[str]:
    """Jobs that were acknowledged and are not there, or there more than once."""
    listed, after = [], None
    while True:
        page = world.store.list_jobs(limit=100, after=after)
        listed += [job.id for job in page.data]
        after = page.next
        if after is None:
            break
    missing = sorted(set(acknowledged) - set(listed))
    unknown = sorted(set(listed) - set(acknowledged))
    return [
        *([f"{len(missing)} acknowledged jobs are lost, {missing[0]} first"] if missing else []),
        *([f"{len(unknown)} jobs are there that nobody was told of, {unknown[0]} first"] if unknown else []),
        *(["a job is listed twice"] if len(set(listed)) < len(listed) else []),
    ]


def _shipped(world: World, job_id: str) -> list[str]:
    return [line for _, line in world.store.read_events(job_id, count=1_000_000)][-EVENTS_KEPT:]


def _written(run: RunDir) -> list[str]:
    """As many of the newest lines as Redis keeps."""
    attempts = [attempt for attempt in run.attempts() if attempt.events.exists()]
    return [*deque((line for attempt in attempts for _, line in read_lines(attempt.events)), maxlen=EVENTS_KEPT)]


def _compare_streams(shipped: list[str], written: list[str]) -> list[str]:
    if shipped == written:
        return []
    first = next((n for n, (a, b) in enumerate(zip(shipped, written, strict=False)) if a != b),
                 min(len(shipped), len(written)))  # fmt: skip
    return [f"the stream has {len(shipped)} events, the files {len(written)}; they differ from number {first + 1} on"]


def _compare(ours: Outcome, theirs: Outcome) -> list[str]:
    found = []
    if ours.weights_sha256 != theirs.weights_sha256:
        found.append("the weights differ from the undisturbed run's")
    for name in ("train_loss", "val_loss"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        wrong = sorted(step for step in mine.keys() | other.keys() if mine.get(step) != other.get(step))
        if wrong:
            found.append(f"{name} differs at {len(wrong)} steps, {wrong[0]} first")
    return found


def _left_over(world: World, job_id: str, run: RunDir) -> list[str]:
    """Locks, leases, slots, tickets: all are given back soon after the end."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        owners = world.redis.hgetall(KEYS["owners"])
        left = [
            *(f"attempt {a.number}'s lock is held" for a in run.attempts() if a.lock.exists() and is_held(a.lock)),
            *(["its lease is left"] if world.redis.zscore(KEYS["leases"], job_id) is not None else []),
            *(f"slot {slot} is still its own" for slot, owner in owners.items() if owner == job_id),
            *(["a ticket is left in the outbox"] if any(t.job_id == job_id for t in world.store.outbox()) else []),
            *(f"member {member} is left" for member in world.store.members_left(job_id)),
            *(["it still waits in a queue"] if world.redis.zscore(KEYS["queue"] + "default", job_id) else []),
        ]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def _illegal_moves(world: World, job_id: str) -> list[str]:
    changes = status_changes(world.store, job_id)
    moves = [(before.to_status, after.to_status) for before, after in pairwise(changes)]
    return [f"status went from {a} to {b}" for a, b in moves if b not in TRANSITIONS[a]]  # type: ignore[index]
