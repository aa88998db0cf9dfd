"""The agent of a node: makes it known, keeps a worker process per slot, and schedules.

Any agent may schedule for its pool and give up lost attempts: the store's scripts are atomic. It
holds no job: launchers do, and theirs is the lease that says a job is alive. So its own death harms
none; the next agent of the node takes over the workers that it finds.
"""

import logging
import os
import platform
import signal
import time
from contextlib import closing, suppress
from importlib.metadata import PackageNotFoundError, version
from types import FrameType

import psutil

from gptcore.environment import hub_token
from gptcore.locks import is_held, open_lock, take
from gptcore.procs import python_module
from worker import tasks
from worker.connection import AWAY, connect
from worker.doorbell import Doorbell
from worker.hardware import find_slots
from worker.job import Node
from worker.place import agent_lock, node_id, runs_root_id, slot_lock
from worker.processes import holder_of, kill, lives
from worker.schema import Schema, SchemaTooNew
from worker.settings import Settings
from worker.store import NOT_DUE, PACE_SECONDS, TOO_SOON, Store

TICK_SECONDS = 0.5  # between two looks at the workers, and for an end that is asked for
HEARTBEAT_SECONDS = 2.0  # and of looking for lost attempts, and at the queue; the doorbell makes it less
SWEEP_SECONDS = 5.0  # and of looking for processes that hang; it costs milliseconds
HUNG_SECONDS = 15.0  # over the grace: a lease and a little
RESTART_SECONDS = 1.0  # between two starts of one slot's worker

log = logging.getLogger("trainmaster.worker")


class Agent:
    def __init__(self, settings: Settings):
        """Raises ValueError where the settings do not fit the machine."""
        node = node_id(settings)
        self._settings = settings
        self._store = Store(settings.redis_url)
        self._schema = Schema(settings.redis_url)
        self._rq = connect(settings.redis_url)
        self._node = Node(
            id=node, pool=settings.pool, slots=find_slots(settings, node), runs_root=runs_root_id(settings),
            versions={"python": platform.python_version(), **_versions("trainmaster", "torch", "transformers")},
            publishes_as=list(settings.hf_namespaces if hub_token() else ()),
        )  # fmt: skip
        self._workers: dict[str, psutil.Process] = {}
        self._started_at: dict[str, float] = {}
        self._hung_since: dict[str, float] = {}
        self._rest: psutil.Popen | None = None  # ships what lost attempts left
        self._seen_at = self._swept_at = float("-inf")
        self._doorbell: Doorbell | None = None
        self._look = True  # at the queue
        self._redis_away = False
        self._redis_run: str | None = None  # which life of Redis it was
        self._stopping = False
        self.refused = False  # by a Redis that a newer version has written to

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; then end every process of it, jobs with a checkpoint."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._stop)
        for slot in self._node.slots:
            log.info("slot %s: %d %s", slot.id, slot.hardware.ranks, slot.hardware.device_name)
        self._adopt()
        while not self._stopping:
            self._keep_workers()
            try:
                self._serve()
                self._note_redis(None)
            except AWAY as error:
                self._note_redis(error)
                time.sleep(TICK_SECONDS)
            except SchemaTooNew as error:
                log.error("%s", error)
                self._stopping = self.refused = True
        self._end()  # and of a fault of its own it leaves alone: the next agent takes the workers over

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _note_redis(self, error: Exception | None) -> None:
        """Say once that Redis is away and once that it is back; then be known to it again at once."""
        if (error is not None) != self._redis_away:
            self._redis_away = error is not None
            log.warning("Redis is away: %s", error) if error else log.warning("Redis is back")
        if error is not None:
            if self._doorbell is not None:
                self._doorbell.close()
            self._doorbell, self._seen_at = None, float("-inf")

    def _serve(self) -> None:
        """One look: be known, give up what is lost, place what waits, hand over, wait for a ring."""
        if self._doorbell is None:
            self._schema.bring_up_to_date()
            run = self._store.run_id()
            if self._redis_run not in (None, run):  # it may have forgotten what it said last
                self._store.hold_off()
            self._redis_run = run
            self._doorbell = self._store.doorbell(self._settings.pool)
            for what in self._store.weaknesses():
                log.warning("Redis: %s", what)
        if time.monotonic() - self._seen_at > HEARTBEAT_SECONDS:
            self._store.register_node(self._node)
            for job_id in self._store.lose_expired(self._settings.max_attempts):
                log.warning("%s: its attempt showed no sign of life and is given up", job_id)
            if not (self._rest and lives(self._rest)) and self._has_rest():
                self._rest = self._start("worker.rest")  # never here: a long run takes longer than a lease
            self._seen_at, self._look = time.monotonic(), True
        if time.monotonic() - self._swept_at > SWEEP_SECONDS:
            self._end_hung()
            self._swept_at = time.monotonic()
        placed = self._store.reserve(self._settings.pool, only_if_due=True) if self._look else NOT_DUE
        if placed >= 0:
            for ticket in self._store.outbox():
                # in this order a crash between repeats the ticket, which RQ refuses, and never loses it
                tasks.hand_over(ticket, self._rq)
                self._store.clear_outbox(ticket)
        too_soon = placed == TOO_SOON
        self._look = self._doorbell.wait(PACE_SECONDS if too_soon else TICK_SECONDS) or too_soon

    def _has_rest(self) -> bool:
        root = self._node.runs_root
        return bool(self._store.unshipped(root) or self._store.leftovers(root, 1))

    def _adopt(self) -> None:
        """Take over a former agent's workers, and end those whose slots are no more, with a checkpoint."""
        for slot in self._node.slots:
            if (worker := tasks.serving(self._settings, slot)) is not None:
                log.info("slot %s: its worker %d goes on", slot.id, worker.pid)
                self._workers[slot.id] = worker
        for lock in slot_lock(self._settings, "").parent.glob(f"{self._node.id}-*.lock"):
            pid = lock.read_text().partition("\n")[0]
            ours = lock.stem.rpartition("-")[0] == self._node.id  # and not rig-2's, for rig
            if ours and lock.stem not in self._workers and pid.isdecimal() and is_held(lock):
                log.info("slot %s: its worker %s is of another life and ends", lock.stem, pid)
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(int(pid)).terminate()

    def _keep_workers(self) -> None:
        for slot in self._node.slots:
            worker = self._workers.get(slot.id)
            if worker is not None and lives(worker):
                continue
            if time.monotonic() - self._started_at.get(slot.id, float("-inf")) < RESTART_SECONDS:
                continue
            if worker is not None:
                log.warning("the worker of slot %s ended and is started again", slot.id)
            self._workers[slot.id] = self._start("worker.tasks", slot.model_dump_json())
            self._started_at[slot.id] = time.monotonic()

    def _end_hung(self) -> None:
        """Kill what stands still: a stopped worker, or the launcher of an attempt that was given up.

        Until it is gone its slot serves nobody.
        """
        for slot_id, worker in self._workers.items():
            hung = self._hung(slot_id, worker)
            since = self._hung_since.setdefault(slot_id, time.monotonic())
            if not hung:
                del self._hung_since[slot_id]
            elif time.monotonic() - since > self._settings.grace_seconds + HUNG_SECONDS:
                log.warning("slot %s: process %s hangs and is killed", slot_id, ", ".join(str(p.pid) for p in hung))
                kill(*hung)

    def _hung(self, slot_id: str, worker: psutil.Process) -> list[psutil.Process]:
        ticket = slot_lock(self._settings, slot_id).with_suffix(".ticket")
        with suppress(psutil.NoSuchProcess, FileNotFoundError):
            if worker.status() == psutil.STATUS_STOPPED:
                return [worker]
            holder = ticket.read_text().split()
            launchers = worker.children() if len(holder) == 2 else []  # a full disk may have cut it
            return [] if launchers and self._store.holds(*holder) else launchers
        return []

    def _start(self, module: str, *arguments: str) -> psutil.Popen:
        command = python_module(module, *arguments)
        environment = {**os.environ, **self._settings.to_environment()}
        # in a session of its own: Ctrl-C is for the agent, which then drains in order
        return psutil.Popen(command, env=environment, start_new_session=True)

    def _end(self) -> None:
        """Take no more jobs, let those that run save themselves, and leave no process."""
        try:
            self._store.retire_node(self._node.id)
        except AWAY as error:
            log.warning("Redis is away: %s", error)
        workers = [worker for worker in self._workers.values() if lives(worker)]
        if self._rest and lives(self._rest):
            kill(self._rest)  # any other agent goes on with it
        families = [*workers, *(child for worker in workers for child in worker.children(recursive=True))]
        for worker in workers:
            worker.terminate()
        late = psutil.wait_procs(workers, timeout=self._settings.grace_seconds + 10)[1]
        if late:
            log.warning("%d workers did not end in time and are killed", len(late))
        kill(*late, *psutil.wait_procs(families, timeout=1)[1])
        for client in (self._store, self._schema, self._rq):
            client.close()


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def main(settings: Settings | None = None) -> int:
    """Run an agent; the exit code. Two on one home would share one node's name: the second is refused."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    settings = settings or Settings.from_environment()
    settings.make_home()
    if warning := settings.open_to_others():
        log.warning("%s", warning)
    settings.runs.mkdir(exist_ok=True)
    with open_lock(agent_lock(settings)) as lock:
        if not take(lock.fileno()):
            way_out = "stop it, or set another TRAINMASTER_NODE or TRAINMASTER_HOME"
            who, node = holder_of(agent_lock(settings)), node_id(settings)
            log.error("another worker%s runs on %s as node %s; %s", who, settings.home, node, way_out)
            return 1
        try:
            with closing(Schema(settings.redis_url)) as schema, suppress(*AWAY):  # away: it is asked once it answers
                schema.bring_up_to_date()
            agent = Agent(settings)
        except (SchemaTooNew, ValueError) as error:
            log.error("%s", error)
            return 1
        agent.run()
    return int(agent.refused)


if __name__ == "__main__":
    raise SystemExit(main())
