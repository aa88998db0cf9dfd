"""Jobs of one and of two nodes compete for four: all run, and no reservation is ever half held."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import dataclass

from tests.chaos.invariants import lost, violations
from tests.chaos.rounds import ORPHAN_SECONDS
from tests.chaos.watch import Watch
from tests.chaos.world import FAKE_TRAINER, World, chaos_spec
from worker.keys import KEYS

NODES = ("n1", "n2", "n3", "n4")
WIDE, NARROW = 4, 20


@dataclass(frozen=True)
class Gang:
    violations: list[str]
    seconds: float
    samples: int
    statuses: Counter[str]


def gang(*, real: bool) -> Gang:
    """With `real`, torchrun and the trainer; without, a trainer that pretends."""
    trainer = "" if real else f"{sys.executable} {FAKE_TRAINER}"
    with World(agents=NODES, slots="0", trainer=trainer) as world, Watch(ORPHAN_SECONDS) as watch:
        return _run(world, watch)


def _run(world: World, watch: Watch) -> Gang:
    began, samples = time.monotonic(), 0
    every = (WIDE + NARROW) // WIDE
    jobs = [
        world.submit(chaos_spec(max_steps=20, resources={"nodes": 2 if number % every == 0 else 1}))
        for number in range(WIDE + NARROW)
    ]
    found: list[str] = []
    while time.monotonic() < began + 600 and not all(world.store.get_job(job_id).ended for job_id in jobs):
        found += [what for what in half_held(world, jobs) if what not in found]
        samples += 1
        time.sleep(0.02)
    for job_id in jobs:
        if world.store.get_job(job_id).ended:
            found += violations(world, job_id, None, watch, ends="succeeded")
        else:
            found.append(f"{job_id} is {world.store.get_job(job_id).status}")
    found += lost(world, jobs)
    return Gang(found, time.monotonic() - began, samples, Counter(world.store.get_job(j).status for j in jobs))


def half_held(world: World, jobs: list[str]) -> list[str]:
    """Jobs that have some of their slots now, read in one transaction."""
    pipeline = world.redis.pipeline(transaction=True)
    pipeline.hgetall(KEYS["owners"])
    for job_id in jobs:
        pipeline.hmget(KEYS["job"] + job_id, "nodes", "wanted_nodes")
    owners, *records = pipeline.execute()
    found = []
    for job_id, (nodes, wanted) in zip(jobs, records, strict=True):
        held = {slot for slot, owner in owners.items() if owner == job_id}
        given = {allocation["slot"] for allocation in json.loads(nodes or "[]")}
        if held and (held != given or len(held) != int(wanted)):
            found.append(f"{job_id} holds {sorted(held)} of {sorted(given)}, and wants {wanted} nodes")
    return found
