"""Redis is away in mid-run: training must not notice, and nothing may be missing afterwards."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass

import httpx2

from gptcore.events import RolledBack, Skipped, Step
from gptcore.rundir import RunDir
from tests.chaos.invariants import violations
from tests.chaos.kills import newest_step, thaw
from tests.chaos.watch import Watch
from tests.chaos.world import World, chaos_spec
from tests.conftest import wait_until

USUAL_SECONDS = 5.0  # before and after the outage: how fast it is otherwise


@dataclass(frozen=True)
class Outage:
    violations: list[str]
    seconds: float
    steps: int  # whose times lie in the outage
    usual_steps: float  # in as many seconds, by the slower of the times before and after

    def __str__(self) -> str:
        share = 100 * self.steps / self.usual_steps
        return f"Redis away for {self.seconds:.0f} s: {self.steps} steps, {share:.0f} % of {self.usual_steps:.0f}"


def outage(world: World, watch: Watch, frozen_seconds: float, gone_seconds: float) -> Outage:
    """One run through a frozen Redis and then, once it answered again, a killed one; then it is cancelled."""
    job_id = world.submit(chaos_spec(max_steps=100_000))
    run = RunDir(world.settings.runs / job_id)
    wait_until(lambda: newest_step(run) > 0, 60)
    windows, steps, seconds = [_usual()], 0, 0.0
    for action, length in (("freeze", frozen_seconds), ("kill", gone_seconds)):
        if not length:
            continue
        process = world.services["redis"].process
        assert process is not None
        began = time.time()
        if action == "freeze":
            process.suspend()
            time.sleep(length)
            thaw(process)
        else:
            world.hold("redis", length)
            process.kill()
            process.wait(5)
            time.sleep(length)
        ended = time.time()
        steps, seconds = steps + len(_steps(run, began, ended)), seconds + ended - began
        windows.append(_usual())
    rates = [len(_steps(run, start, end)) / (end - start) for start, end in windows]
    _cancel(world, job_id)
    wait_until(lambda: world.store.get_job(job_id).ended, 60)
    found = violations(world, job_id, None, watch, ends="cancelled")
    found += _out_of_order(run)
    if steps < 0.9 * min(rates) * seconds:
        found.append(f"{steps} steps in {seconds:.0f} s of outage where {min(rates) * seconds:.0f} are usual")
    if world.store.get_job(job_id).attempt != 1:
        found.append("the outage cost an attempt")
    return Outage(found, seconds, steps, min(rates) * seconds)


def _out_of_order(run: RunDir) -> list[str]:
    """Steps that are missing or came twice; a run that went back begins again there."""
    last = 0
    for event in run.events():
        if isinstance(event, RolledBack):
            last = event.to_step
        elif isinstance(event, Step | Skipped):
            if event.step != last + 1:
                return [f"step {event.step} came behind step {last}"]
            last = event.step
    return []


def _usual() -> tuple[float, float]:
    began = time.time()
    time.sleep(USUAL_SECONDS)
    return began, time.time()


def _steps(run: RunDir, start: float, end: float) -> list[Step]:
    return [e for e in run.events() if isinstance(e, Step) and start <= e.time.timestamp() < end]


def _cancel(world: World, job_id: str) -> None:
    def asked() -> bool:
        with suppress(httpx2.HTTPError):
            return bool(world.http.post(f"/jobs/{job_id}/cancel").is_success)
        return False

    wait_until(asked, 30)
