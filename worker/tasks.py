"""RQ's part: a queue and a worker process per slot. RQ carries tickets and is never asked how a job is.

Guards against what RQ does to jobs of many hours, each held against the source of the pinned version:
no timeout, no retry, no callbacks, no commands over Redis, one function that may be called, and a
worker that outlives an absent Redis and its agent, and hands a request to end on to its horse.
"""

import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import psutil
import redis
from rq import Queue, Worker
from rq.exceptions import DuplicateJobError
from rq.executions import Execution
from rq.job import Job
from rq.serializers import JSONSerializer

from gptcore.locks import exclusive, is_held
from gptcore.procs import die_with_parent
from worker import launch
from worker.connection import AWAY, connect
from worker.hold import TICK_SECONDS, draining
from worker.job import JobError, Slot, Ticket
from worker.place import agent_lock, slot_lock
from worker.processes import HOME, SLOT, holder_of, kill, living
from worker.settings import Settings
from worker.shipper import end_shipped, ship_rest
from worker.store import Store, Superseded

FUNCTION = "worker.launch.run"
WORKER_SECONDS = 60  # RQ's time to live of an idle worker; it waits for work a little less
RESULT_SECONDS = 3600  # how long RQ remembers a ticket, so that a second copy of it is refused


class TicketJob(Job):
    """An RQ job that can only be a ticket, whatever stands in Redis."""

    def restore(self, raw_data: Any) -> None:
        super().restore(raw_data)
        self._success_callback_name = self._failure_callback_name = self._stopped_callback_name = None
        self.webhooks = []
        self.retries_left = self.repeats_left = None

    @property
    def func(self) -> Callable[..., None]:
        if self.func_name != FUNCTION or self.instance is not None:
            raise PermissionError(f"{self.func_name} is not what a ticket may call")
        return launch.run


class SlotWorker(Worker):
    """Works off one slot's queue, one ticket at a time, each in a forked horse."""

    max_connection_wait_time = 1.0  # a minute by default: tickets would run out when Redis is back
    alone = False  # no agent was there at the last heartbeat

    def subscribe(self) -> None:
        """No commands: RQ's stop kills without a checkpoint, and its thread would be forked along."""

    def fork_work_horse(self, job: Job, queue: Queue) -> None:
        # a request to end that comes while we fork must reach the horse once it can hear it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        super().fork_work_horse(job, queue)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if self._stop_requested:
            self.handle_warm_shutdown_request()

    def main_work_horse(self, job: Job, queue: Queue) -> None:
        die_with_parent(signal.SIGTERM, self.pid)
        super().main_work_horse(job, queue)

    def setup_work_horse_signals(self) -> None:
        super().setup_work_horse_signals()  # type: ignore[no-untyped-call]
        signal.signal(signal.SIGTERM, _drain)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def handle_warm_shutdown_request(self) -> None:
        """RQ would wait for the job's end, a day or a week."""
        super().handle_warm_shutdown_request()  # type: ignore[no-untyped-call]
        if self.horse_pid:
            os.kill(self.horse_pid, signal.SIGTERM)

    def set_shutdown_requested_date(self) -> None:
        try:
            super().set_shutdown_requested_date()  # type: ignore[no-untyped-call]
        except redis.RedisError as error:
            self.log.warning("Redis is away: %s", error)

    def maintain_heartbeats(self, job: Job, execution: Execution) -> None:
        try:
            super().maintain_heartbeats(job, execution)
        except redis.RedisError as error:  # RQ's own worker would quit and leave its horse alone
            self.log.warning("Redis is away, the launcher goes on: %s", error)

    def handle_work_horse_killed(self, job: Job, retpid: Any, ret_val: Any, rusage: Any) -> None:
        """The launcher is dead: say so once nothing of its attempt lives, instead of when its lease runs out."""
        settings = Settings.from_environment()
        ticket = Ticket.model_validate(dict(zip(Ticket.model_fields, job.args, strict=True)))
        if not ticket.is_sound:
            return
        message = f"its launcher was killed (wait status {ret_val})"
        store = Store(settings.redis_url)

        def hold() -> None:
            with suppress(*AWAY, Superseded):
                store.renew(ticket.job_id, ticket.attempt, ticket.node_rank)

        clear_slot(ticket.slot, settings, meanwhile=hold)
        error = JobError(reason="launcher_lost", message=message)
        if ticket.node_rank == 0:
            job_id, attempt, most = ticket.job_id, ticket.attempt, settings.max_attempts
            if not store.lose(job_id, attempt, most, error, who=ticket.slot, shipped=False):
                if ship_rest(store, settings.runs, job_id, attempt, meanwhile=hold):
                    end_shipped(store, job_id, attempt, ticket.slot)
                store.lose(job_id, attempt, most, error, who=ticket.slot)
        else:
            store.leave(ticket.job_id, ticket.attempt, ticket.node_rank, f"slot {ticket.slot}: {message}")
        store.close()

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """Also ends a worker that waits for work while no agent has been there since it last looked."""
        super().heartbeat(timeout, pipeline)
        if os.getpid() == self.pid and self.horse_pid == 0 and not is_held(agent_lock(Settings.from_environment())):
            if self.alone:
                os.kill(os.getpid(), signal.SIGTERM)
            self.alone = True
        else:
            self.alone = False


def clear_slot(slot: str, settings: Settings, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Wait until no trainer lives in the slot; the kernel told it that its launcher died. Kills after the grace."""
    kill_at = time.monotonic() + settings.grace_seconds
    while left := list(living(**{SLOT: slot, HOME: str(settings.home)})):
        meanwhile()
        if time.monotonic() > kill_at:
            kill(*left)
        time.sleep(TICK_SECONDS)


def _drain(signum: int, frame: FrameType | None) -> None:
    draining.set()


def hand_over(ticket: Ticket, connection: redis.Redis) -> None:
    """Put a ticket into its slot's queue; one that is there already stays alone."""
    queue = Queue(ticket.slot, connection=connection, serializer=JSONSerializer, job_class=TicketJob)
    with suppress(DuplicateJobError):
        queue.enqueue_call(
            FUNCTION, args=[*ticket.model_dump().values()], job_id=ticket.id, unique=True,
            timeout=-1, result_ttl=RESULT_SECONDS, failure_ttl=RESULT_SECONDS,
        )  # fmt: skip


def serving(settings: Settings, slot: Slot) -> psutil.Process | None:
    """The process that serves this very slot, whoever started it."""
    lock = slot_lock(settings, slot.id)
    if not lock.exists() or not is_held(lock):
        return None
    pid, _, record = lock.read_text("utf-8").partition("\n")
    if not pid.isdecimal() or not psutil.pid_exists(int(pid)) or record != slot.model_dump_json():
        return None
    return psutil.Process(int(pid))


def main(slot: Slot) -> None:
    """Serve a slot until told to end. A former worker's launcher that is still at it comes first."""
    settings = Settings.from_environment()
    lock = slot_lock(settings, slot.id)
    lock.parent.mkdir(exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    if is_held(lock):
        logging.warning("slot %s waits for %s, which another worker%s holds", slot.id, lock, holder_of(lock))
    with exclusive(lock):
        lock.write_text(f"{os.getpid()}\n{slot.model_dump_json()}", "utf-8")
        clear_slot(slot.id, settings)
        if sys.platform == "linux":
            os.sched_setaffinity(0, slot.cores)
        # by UUID: CUDA counts GPUs in another order than nvidia-smi, and anew once one is lost
        os.environ |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(slot.gpu_uuids)}
        try:
            worker = SlotWorker(
                [slot.id],
                name=f"{slot.id}-{uuid.uuid4().hex}",  # RQ takes a dead worker's name for a living one
                connection=connect(settings.redis_url), serializer=JSONSerializer, job_class=TicketJob,
                worker_ttl=WORKER_SECONDS,
            )  # fmt: skip
            worker.work(logging_level="WARNING")
        except AWAY as error:  # at its start: later it waits. The agent starts another
            sys.exit(f"slot {slot.id}: Redis is away: {error}")


if __name__ == "__main__":
    main(Slot.model_validate_json(sys.argv[1]))
