"""A round: a job is submitted, blows fall, and once it has ended everything must be as if none had."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import redis

from gptcore.events import EventBase, Step
from gptcore.rundir import RunDir
from tests.chaos.invariants import Outcome, duplicate_tickets, outcome, violations
from tests.chaos.kills import Blow, Striker, arm, plans
from tests.chaos.long_run import BLOWS, EVENTS, run_long
from tests.chaos.watch import Watch
from tests.chaos.world import GRACE_SECONDS, World, chaos_spec
from worker.job import Job
from worker.store import LEASE_SECONDS

LONG_ROUND = 5  # the number of the round with a long run; the last one if there are fewer
ROUND_SECONDS = 120.0  # a job that has not ended by then never will
# a node that is lost with a frozen process in it: another has to notice, and to kill
ORPHAN_SECONDS = LEASE_SECONDS + GRACE_SECONDS + 5


@dataclass(frozen=True)
class Result:
    blows: list[Blow]
    violations: list[str]
    attempts: int
    recovery_seconds: float | None  # from the last blow that fell to the next step; None where none followed
    recovered: bool  # that step is a new attempt's
    seconds: float


def run_round(
    world: World,
    watch: Watch,
    blows: list[Blow],
    undisturbed: Outcome | None,
    *,
    spec: dict[str, Any] | None = None,
    ends: str = "succeeded",
    most_attempts: int | None = None,
    limit_seconds: float = ROUND_SECONDS,
    to_the_end: bool = True,
    during: Callable[[str], None] = lambda job_id: None,
) -> Result:
    """Submit, deal the blows, call `during`, wait for the end, and look at everything.

    Unless `to_the_end`, the first violation that is seen on the way is enough.
    """
    began = time.monotonic()
    for blow in blows:
        if blow.action == "arm":
            arm(world, blow)
    job_id = world.submit(spec or chaos_spec())
    striker = Striker(world, job_id)
    striker.deal(blows, lambda: _ended(world, job_id) is not None)
    during(job_id)
    found: list[str] = []
    while _ended(world, job_id) is None and time.monotonic() < began + limit_seconds:
        with suppress(redis.RedisError):
            found += duplicate_tickets(world) + _too_many(world.store.get_job(job_id), most_attempts)
        if not to_the_end and (found or watch.seen.get(job_id)):
            return Result(blows, [*dict.fromkeys(found), *watch.seen.get(job_id, [])], 0, None, False, 0.0)
        time.sleep(0.05)
    if (job := _ended(world, job_id)) is not None:
        found += violations(world, job_id, undisturbed, watch, ends=ends)
        found += _too_many(job, most_attempts)
    else:
        with suppress(redis.RedisError):
            job = world.store.get_job(job_id)
            found.append(f"the job is {job.status} (attempt {job.attempt}, step {job.step}) after {limit_seconds:g} s")
    struck = striker.settle()
    run = RunDir(world.settings.runs / job_id)
    attempts = world.store.get_job(job_id).attempt
    found = list(dict.fromkeys(found))
    return Result(blows, found, attempts, *_recovery(run, struck), time.monotonic() - began)


def _too_many(job: Job, most_attempts: int | None) -> list[str]:
    if most_attempts is None or job.attempt <= most_attempts:
        return []
    return [f"attempt {job.attempt} was made where {most_attempts} had to do"]


def _ended(world: World, job_id: str) -> Job | None:
    try:
        job = world.store.get_job(job_id)
    except redis.RedisError:
        return None
    return job if job.ended else None


def _recovery(run: RunDir, struck: list[float]) -> tuple[float | None, bool]:
    """Seconds from the last blow to the next step, and whether it took another attempt to get there."""
    if not struck:
        return None, False
    before = [event for event in run.events() if isinstance(event, EventBase) and event.time.timestamp() <= max(struck)]
    attempt = before[-1].attempt if before else 0
    later = [event for event in run.events() if isinstance(event, Step) and event.time.timestamp() > max(struck)]
    newer = [event for event in later if event.attempt > attempt > 0]
    first = (newer or later)[:1]
    return (first[0].time.timestamp() - max(struck) if first else None), bool(newer)


def run_undisturbed(world: World, watch: Watch) -> Outcome:
    """The run that all others must equal, by the same way."""
    job_id = world.submit(chaos_spec())
    deadline = time.monotonic() + ROUND_SECONDS
    while _ended(world, job_id) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    found = violations(world, job_id, None, watch, ends="succeeded")
    assert not found, f"a run that nothing disturbed: {found}"
    return outcome(RunDir(world.settings.runs / job_id))


def _run_long(world: World, watch: Watch) -> Result:
    began = time.monotonic()
    found, attempts, seconds = run_long(world, watch)
    return Result(BLOWS, found, attempts, seconds, True, time.monotonic() - began)


def run_rounds(count: int, seed: int) -> int:
    """Many rounds in one world, a line for each; the number of rounds in which something did not hold."""
    spec = chaos_spec()
    results: list[Result] = []
    with World(disk=True) as world, Watch(ORPHAN_SECONDS) as watch:
        undisturbed = run_undisturbed(world, watch)
        print(f"{'round':>5}  {'next step':>9}  {'attempts':>8}  {'all':>6}  what was done")
        for number, blows in enumerate(plans(count, seed, spec["max_steps"], world.can_fill_disk), 1):
            is_long = number == min(count, LONG_ROUND)
            result = _run_long(world, watch) if is_long else run_round(world, watch, blows, undisturbed)
            results.append(result)
            after = "-" if result.recovery_seconds is None else f"{result.recovery_seconds:.1f} s"
            said = (f"{EVENTS:,} events before: " if is_long else "") + " + ".join(map(str, result.blows))
            print(f"{number:>5}  {after:>9}  {result.attempts:>8}  {result.seconds:>4.0f} s  {said}", flush=True)
            for violation in result.violations:
                print(f"{'':>5}  VIOLATED: {violation}", flush=True)
        print(f"{watch.samples} looks at the process table")
    bad = sum(bool(r.violations) for r in results)
    for recovered, how in ((False, "in the same attempt"), (True, "by a new attempt")):
        seconds = [r.recovery_seconds for r in results if r.recovery_seconds is not None and r.recovered == recovered]
        if seconds:
            median, worst = statistics.median(seconds), max(seconds)
            print(f"next step {how}: {len(seconds)} rounds, median {median:.1f} s, worst {worst:.1f} s")
    print(f"{count - bad} of {count} rounds hold all invariants")
    return bad
