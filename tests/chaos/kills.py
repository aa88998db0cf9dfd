"""What is done to a world: blows at processes and disks, when, and the random plans of rounds."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import redis

from gptcore.events import Step, parse_event, read_lines
from gptcore.rundir import RunDir
from tests.chaos.world import World
from tests.worker.conftest import living

TARGETS = ("rank0", "rank1", "torchrun", "horse", "worker", "agent", "api", "redis")
POINTS = {  # name: how often a run passes it, about
    "after-reserve": 1,
    "after-enqueue": 1,
    "after-pop": 1,
    "after-claim": 1,
    "after-rename": 8,
    "after-last-event": 1,
    "after-ship": 20,
}
FOR_GOOD = float("inf")


@dataclass(frozen=True)
class Blow:
    """`action`: kill (a service stays away for `seconds`), freeze, fill (the disk), or arm (a crash point).

    It falls at a step of the run, or `after` seconds: behind the blow before it, or the submission.
    """

    action: str
    target: str
    at_step: int | None = None
    after: float = 0.0
    seconds: float = 0.0
    passes: int = 0  # of an armed point that do nothing

    def __str__(self) -> str:
        for_seconds = {0.0: "", FOR_GOOD: " for good"}.get(self.seconds, f" for {self.seconds:.1f} s")
        when = f" at step {self.at_step}" if self.at_step is not None else f" after {self.after:.1f} s"
        if self.action == "arm":
            return f"kill {self.target}" + (f" #{self.passes + 1}" if self.passes else "")
        return f"{self.action} {self.target}{for_seconds}{when}"


class Striker:
    """Deals a round's blows to one job."""

    def __init__(self, world: World, job_id: str):
        self._world, self._job_id = world, job_id
        self._run = RunDir(world.settings.runs / job_id)
        self._thaws: list[threading.Timer] = []
        self.struck: list[float] = []  # when the blows fell (time.time)

    def deal(self, blows: list[Blow], over: Callable[[], bool]) -> None:
        """All blows in their order; those that find no target before `over` are left out."""
        for blow in blows:
            if blow.action == "arm":
                continue
            began = time.monotonic()
            while blow.at_step is not None and newest_step(self._run) < blow.at_step and not over():
                time.sleep(0.01)
            time.sleep(blow.after)
            while not over() and time.monotonic() < began + 60 and not self._strike(blow):
                time.sleep(0.02)

    def _strike(self, blow: Blow) -> bool:
        if blow.action == "fill":
            self.struck.append(time.time())
            self._world.fill_disk()
            self._later(blow.seconds, self._world.free_disk)
            return True
        process = find(self._world, self._job_id, blow.target)
        if process is None:
            return False
        try:
            self.struck.append(time.time())
            process.send_signal(signal.SIGKILL if blow.action == "kill" else signal.SIGSTOP)
        except psutil.NoSuchProcess:
            return False
        if blow.action == "kill" and blow.seconds:
            self._world.hold(_agent(self._world, self._job_id) if blow.target == "agent" else blow.target, blow.seconds)
        if blow.action == "freeze" and blow.seconds != FOR_GOOD:
            self._later(blow.seconds, lambda: thaw(process))
        return True

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, call)
        timer.start()
        self._thaws.append(timer)

    def settle(self) -> list[float]:
        """Wait until all that was to be thawed is → when the blows fell, those of crash points among them."""
        for timer in self._thaws:
            timer.join()
        for path in (self._world.path / "fired").glob("*"):
            self.struck.append(float(path.read_text().split()[0]))
            path.unlink()
        for path in (self._world.path / "armed").glob("*"):
            path.unlink()
        return self.struck


def arm(world: World, blow: Blow, freezes: int | None = None) -> None:
    """Have the process that reaches the point kill itself, or freeze the one with the pid `freezes`."""
    folder = world.path / "armed"
    folder.mkdir(exist_ok=True)
    for number in range(blow.passes):
        (folder / f"{blow.target}.{number:03d}.skip").touch()
    if freezes is None:
        (folder / f"{blow.target}.{blow.passes:03d}.kill").touch()
    else:
        (folder / f"{blow.target}.{blow.passes:03d}.freeze").write_text(str(freezes))


def thaw(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGCONT)
    except psutil.NoSuchProcess:
        return


def newest_step(run: RunDir) -> int:
    """The last step in the newest attempt's file; 0 where there is none."""
    attempts = [attempt for attempt in run.attempts() if attempt.events.exists()]
    return last_step(attempts[-1].events) if attempts else 0


def last_step(path: Path) -> int:
    events = (parse_event(line) for _, line in read_lines(path))
    steps = [event.step for event in events if isinstance(event, Step)]
    return steps[-1] if steps else 0


def find(world: World, job_id: str, target: str) -> psutil.Process | None:
    """The living process that plays this part for the job now."""
    try:
        if target == "agent":
            return world.services[_agent(world, job_id)].process
        if target in world.services:
            return world.services[target].process
        trainers = [process for process in living(job_id) if "--attempt" in process.cmdline()]
        if target in ("horse", "worker"):
            return _worker(world, trainers, horse=target == "horse")
        for process in trainers:
            rank = process.environ().get("RANK")
            if target == (f"rank{rank}" if rank else "torchrun"):
                return process
    except psutil.Error:
        pass  # gone while we looked
    return None


def _agent(world: World, job_id: str) -> str:
    """The service that is the agent of the job's first node, or the only one."""
    agents = [name for name in world.services if name.startswith("agent")]
    if len(agents) == 1:
        return agents[0]
    with suppress(redis.RedisError):
        return f"agent{world.store.get_job(job_id).nodes[0].node}"
    return agents[0]


def _worker(world: World, trainers: list[psutil.Process], horse: bool) -> psutil.Process | None:
    """The launcher of these trainers or the slot's worker above it; where there is none above, any."""
    above = [parent for trainer in trainers for parent in trainer.parents()]
    for process in (*above, *world.processes()):
        if "worker.tasks" in process.cmdline():
            parent = process.parent()
            forked = parent is not None and "worker.tasks" in parent.cmdline()
            if forked == horse:
                return process
    return None


# ---- plans


def plans(rounds: int, seed: int, max_steps: int, disk: bool) -> list[list[Blow]]:
    """The blows of each round: every kind in turn, in an order and at moments that the seed decides."""
    chance = random.Random(seed)
    deck = _deck(disk)
    chance.shuffle(deck)
    return [[_placed(blow, number, max_steps, chance) for number, blow in enumerate(deck[index % len(deck)])]
            for index in range(rounds)]  # fmt: skip


def _deck(disk: bool) -> list[list[Blow]]:
    stuck = [("rank0", "horse"), ("rank1", "worker"), ("torchrun", "horse"), ("horse", "worker")]
    pairs = [("redis", "horse"), ("agent", "redis"), ("rank0", "redis"), ("worker", "api"), ("torchrun", "agent")]
    return [
        *([Blow("kill", target)] for target in TARGETS),
        *([Blow("freeze", target, seconds=1.0)] for target in TARGETS),
        *([Blow("arm", point)] for point in POINTS),
        *([Blow("freeze", first, seconds=FOR_GOOD), Blow("kill", second)] for first, second in stuck),
        *([Blow("kill", first), Blow("kill", second)] for first, second in pairs),
        *([[Blow("fill", "disk", seconds=1.0)]] if disk else []),
    ]


def _placed(blow: Blow, number: int, max_steps: int, chance: random.Random) -> Blow:
    if blow.action == "arm":
        return replace(blow, passes=chance.randrange(POINTS[blow.target]))
    if blow.seconds == 1.0:
        blow = replace(blow, seconds=chance.uniform(1.0, 6.0))
    if number > 0:
        return replace(blow, after=chance.uniform(0.0, 1.0))
    if blow.seconds == FOR_GOOD or chance.random() < 0.75:
        return replace(blow, at_step=chance.randrange(1, max_steps * 9 // 10))
    return replace(blow, after=chance.uniform(0.0, 8.0))
