"""The agent of a node: makes it known, keeps a worker process per slot, and schedules.

Any agent may schedule for its pool and give up lost attempts: the store's scripts are atomic. It
holds no job: launchers do, and theirs is the lease that says a job is alive.
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import psutil
import redis

from worker import tasks
from worker.hardware import find_slots, node_id
from worker.job import Node, Slot
from worker.settings import Settings
from worker.store import Doorbell, Store

TICK_SECONDS = 0.3  # at most between two looks; the doorbell makes it less
HEARTBEAT_SECONDS = 2.0  # and of looking for lost attempts
RESTART_SECONDS = 1.0  # between two starts of one slot's worker
AWAY = (redis.ConnectionError, redis.TimeoutError)

log = logging.getLogger("trainmaster.worker")


class Agent:
    def __init__(self, settings: Settings):
        """Raises ValueError where the settings do not fit the machine."""
        node = node_id(settings)
        self._settings = settings
        self._store = Store.connect(settings.redis_url)
        self._rq = tasks.connect(settings)
        self._node = Node(
            id=node,
            pool=settings.pool,
            slots=find_slots(settings, node),
            versions={"trainmaster": version("trainmaster"), "python": platform.python_version()},
        )
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        self._started_at: dict[str, float] = {}
        self._seen_at = float("-inf")
        self._doorbell: Doorbell | None = None
        self._redis_away = False
        self._stopping = False

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; then end every process of it, jobs with a checkpoint."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._stop)
        for slot in self._node.slots:
            log.info("slot %s: %d %s", slot.id, slot.hardware.ranks, slot.hardware.device_name)
        try:
            while not self._stopping:
                self._keep_workers()
                try:
                    self._serve()
                    self._note_redis(None)
                except AWAY as error:
                    self._note_redis(error)
                    time.sleep(TICK_SECONDS)
        finally:
            self._end()

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
        self._doorbell = self._doorbell or self._store.doorbell()
        if time.monotonic() - self._seen_at > HEARTBEAT_SECONDS:
            self._store.register_node(self._node)
            for job_id in self._store.lose_expired(self._settings.max_attempts):
                log.warning("%s: its attempt showed no sign of life and is given up", job_id)
            self._seen_at = time.monotonic()
        self._store.reserve(self._settings.pool)
        for ticket in self._store.outbox():
            # in this order a crash between repeats the ticket, which RQ refuses, and never loses it
            tasks.hand_over(ticket, self._rq)
            self._store.clear_outbox(ticket)
        self._doorbell.wait(TICK_SECONDS)

    def _keep_workers(self) -> None:
        for slot in self._node.slots:
            worker = self._workers.get(slot.id)
            if worker is not None and worker.poll() is None:
                continue
            if time.monotonic() - self._started_at.get(slot.id, float("-inf")) < RESTART_SECONDS:
                continue
            if worker is not None:
                log.warning("the worker of slot %s ended with %s and is started again", slot.id, worker.returncode)
            self._workers[slot.id] = self._start_worker(slot)
            self._started_at[slot.id] = time.monotonic()

    def _start_worker(self, slot: Slot) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "worker.tasks", slot.model_dump_json(), str(os.getpid())]
        # in a session of its own: Ctrl-C is for the agent, which then drains in order
        return subprocess.Popen(command, env={**os.environ, **self._settings.to_environment()}, start_new_session=True)

    def _end(self) -> None:
        """Take no more jobs, let those that run save themselves, and leave no process."""
        try:
            self._store.retire_node(self._node.id)
        except AWAY as error:
            log.warning("Redis is away: %s", error)
        tree = psutil.Process().children(recursive=True)
        for worker in self._workers.values():
            worker.terminate()
        deadline = time.monotonic() + self._settings.grace_seconds + 10
        for worker in self._workers.values():
            try:
                worker.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("a worker did not end in time and is killed")
                worker.kill()
        for process in psutil.wait_procs(tree, timeout=1)[1]:
            process.kill()
        self._store.close()
        self._rq.close()


def lock_path(settings: Settings) -> Path:
    """Held by the agent of this home on this machine as long as it lives."""
    return settings.home / f"{node_id(settings)}.lock"


def main(settings: Settings | None = None) -> int:
    """Run an agent; the exit code. Two on one home would share one node's name: the second is refused."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    settings = settings or Settings.from_environment()
    settings.runs.mkdir(parents=True, exist_ok=True)
    with lock_path(settings).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            agent = Agent(settings)
        except BlockingIOError:
            log.error("another worker runs on %s; stop it, or give this one another TRAINMASTER_HOME", settings.home)
            return 1
        except ValueError as error:
            log.error("%s", error)
            return 1
        agent.run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
