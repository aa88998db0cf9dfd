"""A round with a run of a million events: whoever reads all of them before the next step takes too long."""

from __future__ import annotations

import time
from contextlib import suppress

import redis

from gptcore.events import Step, parse_event, read_lines
from gptcore.rundir import RunDir
from tests.chaos.invariants import violations
from tests.chaos.kills import Blow, Striker
from tests.chaos.watch import Watch
from tests.chaos.world import World, chaos_spec
from tests.worker.fake_trainer import step_event

EVENTS = 1_000_000
BLOWS = [Blow("kill", "horse", at_step=100)]
NEXT_STEP_SECONDS = 30.0
LONG_ROUND_SECONDS = 300.0  # all events are shipped before the job ends


def run_long(world: World, watch: Watch) -> tuple[list[str], int, float | None]:
    """Kill the launcher of a run of EVENTS events; return violations, attempts, and seconds to the next step.

    Redis has none of the events when the run begins, as if it had been away for days.
    """
    _set_schedulable(world, False)
    job_id = world.submit(chaos_spec())
    run = RunDir(world.settings.runs / job_id)
    _write_history(world, run)
    _set_schedulable(world, True)
    began = time.monotonic()
    striker = Striker(world, job_id)
    striker.deal(BLOWS, lambda: time.monotonic() > began + LONG_ROUND_SECONDS)
    while not _ended(world, job_id) and time.monotonic() < began + LONG_ROUND_SECONDS:
        time.sleep(0.2)
    found = violations(world, job_id, None, watch, ends="succeeded")
    seconds = _first_step(run) - max(striker.settle(), default=float("-inf"))
    if not seconds < NEXT_STEP_SECONDS:
        found.append(f"the next attempt's first step came after {seconds:.1f} s, not within {NEXT_STEP_SECONDS:g} s")
    return found, world.store.get_job(job_id).attempt, seconds


def _write_history(world: World, run: RunDir) -> None:
    """A first attempt of EVENTS steps. Its file lies elsewhere: the runs' own file system may be small."""
    model = step_event(1).model_copy(update={"attempt": 1, "seq": -1, "step": -1}).model_dump_json()
    line = model.replace('"seq":-1', '"seq":{0}').replace('"step":-1', '"step":{0}')
    head, _, line = line.partition("{0}")
    middle, _, tail = line.partition("{0}")
    file = world.path / f"{run.path.name}.jsonl"
    with file.open("w") as events:
        events.writelines(f"{head}{number}{middle}{number}{tail}\n" for number in range(1, EVENTS + 1))
    attempt = run.claim_attempt()
    attempt.events.symlink_to(file)


def _set_schedulable(world: World, schedulable: bool) -> None:
    for node in world.store.list_nodes():
        world.store.set_schedulable(node.id, schedulable)


def _ended(world: World, job_id: str) -> bool:
    with suppress(redis.RedisError):
        return world.store.get_job(job_id).ended
    return False


def _first_step(run: RunDir) -> float:
    """When the newest attempt made its first step (time.time)."""
    events = (parse_event(line) for _, line in read_lines(run.attempts()[-1].events))
    return next((event.time.timestamp() for event in events if isinstance(event, Step)), float("inf"))
