"""Guards, and for each a script of blows that only it withstands: without it, something turns red.

`python -m tests.chaos --guards` switches each off in turn (`points/guards_off.py` says how) and prints
what broke; `--without GUARD` does one; `--guards --intact` runs the same scripts with all guards on.

| guard             | its script                                           | what breaks without it              |
|-------------------|------------------------------------------------------|-------------------------------------|
| locks             | a rank frozen, its node's job system killed          | two attempts alive at once          |
| death-signals     | launcher, worker and agent killed, none started      | trainers live on without a launcher |
| fencing           | a launcher thaws when another node has its job       | an attempt too many                 |
| event-ids         | Redis frozen for longer than a launcher waits        | events twice in the stream          |
| unique-tickets    | an agent dies after RQ took a ticket                 | the ticket stands twice in RQ       |
| no-retries        | Redis frozen under a POST                            | two jobs from one POST              |
| last-event-first  | Redis away while the trainer ends                    | a job ended, its stream did not     |
| whole-checkpoints | a rank dies while it writes a checkpoint             | the next attempt cannot load it     |
| outbox-order      | an agent dies with a ticket in hand                  | the ticket is lost: a new attempt   |
| kill-after-grace  | a rank frozen, the job cancelled                     | the job is cancelling for ever      |
| lease-gap         | Redis away for longer than a lease, the launcher too | an attempt that lives is given up   |
| reship            | a launcher killed in mid-run                         | the stream lacks its last events    |
| patience          | Redis away for seconds                               | the launcher dies: a new attempt    |
| worker-patience   | Redis away at the worker's heartbeat                 | the worker dies: a new attempt      |
| idempotency       | Redis frozen under a POST that is repeated           | two jobs from one key               |
| append-only       | Redis killed after it acknowledged                   | jobs are lost                       |
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx2

from tests.chaos.invariants import lost
from tests.chaos.kills import FOR_GOOD, Blow, arm, thaw
from tests.chaos.rounds import ORPHAN_SECONDS, run_round
from tests.chaos.watch import Watch
from tests.chaos.world import GRACE_SECONDS, World, chaos_spec

Script = Callable[[World, Watch], list[str]]


@dataclass(frozen=True)
class Guard:
    does: str
    script: Script
    agents: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class Round:
    """A script that is one round: its blows, what it must come to, and in how many attempts."""

    blows: list[Blow]
    most_attempts: int | None = None
    ends: str = "succeeded"
    limit_seconds: float = 90.0
    cancel: bool = False
    spec: dict[str, Any] = field(default_factory=dict)

    def __call__(self, world: World, watch: Watch) -> list[str]:
        def during(job_id: str) -> None:
            if self.cancel:
                world.http.post(f"/jobs/{job_id}/cancel")

        result = run_round(
            world, watch, self.blows, None, spec=chaos_spec(**self.spec), ends=self.ends,
            most_attempts=self.most_attempts, limit_seconds=self.limit_seconds, during=during, to_the_end=False,
        )  # fmt: skip
        return result.violations


def post_while_redis_freezes(*, repeated: bool) -> Script:
    """Redis freezes for 7 s just before a POST's job is made, longer than the API waits for it.

    `repeated`: the POST has a key and is sent until it is acknowledged, else once and without a key.
    """

    def script(world: World, watch: Watch) -> list[str]:
        first = world.submit(NEVER_RUN)  # with it Redis knows the script
        frozen = world.services["redis"].process
        assert frozen is not None
        arm(world, Blow("arm", "before-create"), freezes=frozen.pid)
        thawing = threading.Timer(7.0, thaw, [frozen])
        thawing.start()
        if repeated:
            world.submit(NEVER_RUN)
        else:
            with suppress(httpx2.HTTPError):
                world.http.post("/jobs", json=NEVER_RUN, timeout=7.0)
        thawing.join()
        time.sleep(3.0)
        made = len([job for job in world.store.list_jobs().data if job.id != first])
        return [f"one POST made {made} jobs"] if made > 1 else []

    return script


def submits_then_kill(world: World, watch: Watch) -> list[str]:
    """Jobs are acknowledged, a second passes, Redis is killed."""
    made = [world.submit(NEVER_RUN) for _ in range(3)]
    time.sleep(1.5)
    process = world.services["redis"].process
    assert process is not None
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(3.0)
    return lost(world, made)


LONG = {"max_steps": 1500}
NEVER_RUN = chaos_spec(resources={"pool": "nobody", "ranks_per_node": 2})

GUARDS: dict[str, Guard] = {
    "locks": Guard(
        "a launcher waits until no process of an earlier attempt lives",
        Round(
            # its node is lost with all of the job system's, so that another node takes the job over
            [Blow("freeze", "rank0", at_step=60, seconds=FOR_GOOD), Blow("kill", "agent", seconds=60.0),
             Blow("freeze", "worker", seconds=FOR_GOOD), Blow("kill", "horse")],
        ),
        agents=("n1", "n2"),
    ),
    "death-signals": Guard(
        "a trainer ends with its launcher, also where nobody starts another",
        Round(
            [Blow("kill", "agent", at_step=60, seconds=ORPHAN_SECONDS + 8), Blow("kill", "horse"),
             Blow("kill", "worker")],
            spec={"max_steps": 2000}, limit_seconds=120.0,
        ),
    ),
    "fencing": Guard(
        "an attempt that was given up writes nothing",
        Round(
            # on a node that seems lost; by the time its launcher thaws another node has the job
            [Blow("kill", "agent", at_step=30, seconds=90.0), Blow("freeze", "horse", after=4.0, seconds=22.0)],
            most_attempts=2, spec={"max_steps": 2000}, limit_seconds=120.0,
        ),
        agents=("n1", "n2"),
    ),
    "event-ids": Guard(
        "an event sent twice is one event",
        Round([Blow("freeze", "redis", at_step=100, seconds=5.0)]),
    ),
    "unique-tickets": Guard(
        "RQ takes a ticket once",
        Round([Blow("arm", "after-enqueue")]),
    ),
    "no-retries": Guard(
        "a command that may have run is not sent again",
        post_while_redis_freezes(repeated=False),
    ),
    "last-event-first": Guard(
        "a job ends in Redis only once its last event is there",
        Round([Blow("kill", "redis", at_step=370, seconds=8.0)]),
    ),
    "whole-checkpoints": Guard(
        "a checkpoint is complete or not there",
        Round([Blow("arm", "mid-checkpoint", passes=6)], limit_seconds=60.0),
    ),
    "outbox-order": Guard(
        "a ticket leaves the outbox once RQ has it",
        Round([Blow("arm", "after-reserve")], most_attempts=1),
    ),
    "kill-after-grace": Guard(
        "what does not end within its grace is killed",
        Round(
            [Blow("freeze", "rank0", at_step=60, seconds=FOR_GOOD)],
            cancel=True, ends="cancelled", limit_seconds=GRACE_SECONDS + 30,
        ),
    ),
    "lease-gap": Guard(
        "after a gap every launcher gets a full period to renew",
        Round(
            [Blow("freeze", "horse", at_step=30, seconds=21.0), Blow("kill", "redis", seconds=14.0)],
            most_attempts=1,
        ),
    ),
    "reship": Guard(
        "a launcher ships what earlier ones could not any more",
        Round([Blow("kill", "horse", at_step=60)]),
    ),
    "patience": Guard(
        "a launcher outlasts an absent Redis",
        Round([Blow("kill", "redis", at_step=60, seconds=3.0)], most_attempts=1),
    ),
    "worker-patience": Guard(
        "a slot's worker outlasts an absent Redis",
        Round([Blow("kill", "redis", at_step=60, seconds=12.0)], most_attempts=1, spec=LONG),
    ),
    "idempotency": Guard(
        "a POST that is repeated makes one job",
        post_while_redis_freezes(repeated=True),
    ),
    "append-only": Guard(
        "what Redis acknowledged outlives its process",
        submits_then_kill,
    ),
}  # fmt: skip


def run_guard(name: str, *, intact: bool = False) -> list[str]:
    """The violations of a guard's script without that guard, or with all of them."""
    with World(without="" if intact else name, agents=GUARDS[name].agents) as world, Watch(ORPHAN_SECONDS) as watch:
        return GUARDS[name].script(world, watch)


def run_guards(names: list[str], *, intact: bool) -> int:
    """A line for each; how many did not turn out as they should."""
    wrong = 0
    for name in names:
        began = time.monotonic()
        found = run_guard(name, intact=intact)
        wrong += bool(found) == intact
        colour = "red  " if found else "green"
        print(f"{colour}  {time.monotonic() - began:>3.0f} s  {name:<17} {GUARDS[name].does}", flush=True)
        for violation in found:
            print(f"{'':>14}{violation}", flush=True)
    expected = "hold with all guards on" if intact else "turn red when it is off"
    print(f"{len(names) - wrong} of {len(names)} scripts {expected}")
    return wrong
