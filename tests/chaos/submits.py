"""Many clients POST at once while services die; each repeats its key until it is acknowledged."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tests.chaos.invariants import lost
from tests.chaos.kills import Blow, thaw
from tests.chaos.world import World, chaos_spec

IN_FLIGHT = 64


@dataclass(frozen=True)
class Submitted:
    violations: list[str]
    seconds: float
    slowest_seconds: float  # from a first POST to its acknowledgement


def submit_many(world: World, count: int, blows: list[Blow]) -> Submitted:
    """`count` jobs, each with its own key; the blows fall in turn while they come in."""
    made: dict[int, str] = {}
    took: list[float] = []
    spec = chaos_spec(max_steps=5, resources={"pool": "nobody", "ranks_per_node": 2})

    def submit(number: int) -> None:
        began = time.monotonic()
        made[number] = world.submit(spec, key=f"key-{number}")
        took.append(time.monotonic() - began)

    began = time.monotonic()
    striker = threading.Thread(target=lambda: _strike(world, blows, made, count))
    striker.start()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        list(pool.map(submit, range(count)))
    striker.join()
    found = lost(world, list(made.values()))
    if len(set(made.values())) != count:
        found.append(f"{count} keys were answered with {len(set(made.values()))} jobs")
    return Submitted(found, time.monotonic() - began, max(took))


def _strike(world: World, blows: list[Blow], made: dict[int, str], count: int) -> None:
    for number, blow in enumerate(blows, 1):
        while len(made) < count * number / (len(blows) + 1):
            time.sleep(0.005)
        process = world.services[blow.target].process
        if process is None:
            continue
        process.send_signal(signal.SIGKILL if blow.action == "kill" else signal.SIGSTOP)
        if blow.action == "freeze":
            time.sleep(blow.seconds)
            thaw(process)
