"""The launcher: one attempt at a job, from its ticket to the word on how it ended.

It starts the trainer, ships its events in order, holds the attempt's lease and heeds wishes to stop.
The trainer knows nothing of it: they speak through the run directory. While Redis is away training
goes on, and what was not shipped is read again. How an attempt ended is said by its last event,
never by an exit code.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

import redis

from gptcore.events import Failed, Finished
from gptcore.locks import shared
from gptcore.rundir import Attempt, RunDir, write_atomically
from gptcore.spec import PrepareSpec, SpecError, TrainSpec, parse_spec
from worker import processes, trainer
from worker.job import JobError, Status, Ticket
from worker.settings import Settings
from worker.shipper import Shipper
from worker.store import Store, Superseded

TICK_SECONDS = 0.2
LOG_LINES = 40  # the last of a failed trainer's, in the job's error

draining = threading.Event()  # set by SIGTERM: leave with a checkpoint, another worker goes on
log = logging.getLogger(__name__)
AWAY = (redis.ConnectionError, redis.TimeoutError)
Answer = TypeVar("Answer")


def run(job_id: str, attempt: int, node_rank: int, slot: str) -> None:
    """The one function that a ticket may call. Does nothing where the ticket is no longer good."""
    settings = Settings.from_environment()
    store = Store.connect(settings.redis_url, socket_timeout=2.0)
    ticket = Ticket(job_id=job_id, attempt=attempt, node_rank=node_rank, slot=slot)
    if not store.claim(ticket, boot=f"{slot}:{os.getpid()}"):
        return
    launcher = Launcher(settings, store, ticket)
    try:
        launcher.run()
    except Superseded as superseded:
        log.warning("%s; nothing more is written", superseded)
    except OSError as error:  # a full disk, a runs root that cannot be written: the job says so
        launcher.give_up("worker", f"{type(error).__name__}: {error}")


class Launcher:
    def __init__(self, settings: Settings, store: Store, ticket: Ticket):
        self._settings = settings
        self._store = store
        self._who = ticket.slot
        self._job = store.get_job(ticket.job_id)
        self._number = ticket.attempt
        self._run_dir = RunDir(settings.runs / ticket.job_id)
        self._limit: float | None = None  # of seconds in all attempts
        self._ran_before = float(store.internal(ticket.job_id, "ran_seconds") or 0)
        self._began = time.monotonic()
        self._word = ""  # how the attempt is to end, once it is: what the stop file says
        self._kill_at = float("inf")

    def run(self) -> None:
        try:
            spec = parse_spec(self._job.spec)
        except SpecError as error:
            return self._fail("invalid_spec", str(error))
        if spec.resources.nodes > 1:
            return self._fail("invalid_spec", "nodes above 1 are not run yet; use 1")
        self._limit = spec.resources.max_duration_seconds
        earlier = self._run_dir.attempts()
        attempt = self._claim_folder()
        own = Shipper(self._store, self._job.id, attempt, self._number, self._job.total_steps)
        with ExitStack() as locks:
            if not self._outlast(earlier, locks):
                return self._conclude(own, attempt)
            if self._ship_earlier(earlier):
                return self._finish("succeeded", "finished in an earlier attempt")
            locks.enter_context(shared(attempt.lock))
            if not self._run_dir.spec.exists():
                write_atomically(self._run_dir.spec, spec.model_dump_json(indent=2))
            self._train(spec, attempt, own)
            return self._conclude(own, attempt)

    # ---- before

    def _claim_folder(self) -> Attempt:
        """This attempt's folder. A store restored from an older state learns the number from the directory."""
        attempt = self._run_dir.claim_attempt(at_least=self._number)
        if attempt.number != self._number:
            number = {"attempt": attempt.number, "claimed": attempt.number}
            self._patiently(lambda: self._store.report(self._job.id, self._number, number))
            self._number = attempt.number
        return attempt

    def _outlast(self, earlier: list[Attempt], locks: ExitStack) -> bool:
        """Wait until no process of an earlier attempt lives, here or elsewhere; false when told to stop.

        Their locks stay with us, so that none can begin late.
        """
        kill_at = time.monotonic() + self._settings.grace_seconds
        held_by_others = [locks.enter_context(attempt.lock.open("a")).fileno() for attempt in earlier]
        while earlier and not self._heed():
            held_by_others = [lock for lock in held_by_others if not _take(lock)]
            if not held_by_others and not processes.living(self._job.id):
                break
            if time.monotonic() > kill_at:
                processes.kill(self._job.id)
            time.sleep(TICK_SECONDS)
        return not self._heed()

    def _ship_earlier(self, earlier: list[Attempt]) -> bool:
        """Ship what earlier launchers could not any more; whether one of those attempts had finished."""
        known = self._patiently(lambda: self._store.last_event(self._job.id))
        outcomes = []
        for attempt in (a for a in earlier if a.number >= known[0]):
            shipper = Shipper(self._store, self._job.id, attempt, self._number, self._job.total_steps, known)
            self._send_all(shipper)
            outcomes.append(shipper.progress.outcome)
        return any(isinstance(outcome, Finished) for outcome in outcomes)

    # ---- during

    def _train(self, spec: TrainSpec | PrepareSpec, attempt: Attempt, own: Shipper) -> None:
        """Run the trainer to its end, all events shipped. Raises Superseded, the trainer stopped."""
        command = trainer.command(spec, self._settings, self._run_dir.path, attempt.number)
        environment = trainer.environment(spec, self._settings)
        tree = processes.Tree(command, self._job.id, environment, self._run_dir.path, attempt.log)
        try:
            while tree.alive():
                self._send(own)
                self._tend(tree, attempt, self._heed())
            self._send_all(own)
        except Superseded:
            while tree.alive():
                self._tend(tree, attempt, "pause")
            raise

    def _tend(self, tree: processes.Tree, attempt: Attempt, word: str) -> None:
        """Pass on a wish to stop, kill what outstays its grace, and wait a tick."""
        now, grace = time.monotonic(), self._settings.grace_seconds
        if word and word != _text(attempt):
            write_atomically(attempt.stop, word)
            self._kill_at = min(self._kill_at, now + grace)
        if not tree.leader_alive():  # torchrun was killed: its ranks are told so by the kernel
            self._kill_at = min(self._kill_at, now + grace)
        if now > self._kill_at:
            tree.kill()
        time.sleep(TICK_SECONDS)

    def _heed(self) -> str:
        """Hold the lease and ask how the attempt is to end: "" or a word for the stop file."""
        try:
            desired = self._store.renew(self._job.id, self._number)
        except AWAY:
            desired = ""
        if desired:
            self._word = desired
        elif draining.is_set():
            self._word = self._word or "pause"
        elif self._limit is not None and self._ran_seconds() > self._limit:
            self._word = self._word or "max_duration"
        return self._word

    def _ran_seconds(self) -> float:
        """In all attempts; time in the queue does not count."""
        return self._ran_before + time.monotonic() - self._began

    def _send(self, shipper: Shipper) -> bool:
        try:
            return shipper.send("running", self._who, ran_seconds=self._ran_seconds())
        except AWAY:  # training goes on; the same lines are sent again
            return False

    def _send_all(self, shipper: Shipper) -> None:
        while self._patiently(lambda: shipper.send(ran_seconds=self._ran_seconds())):
            pass

    def _patiently(self, call: Callable[[], Answer]) -> Answer:
        """Wait for Redis as long as it takes; a worker that is to end gives it the grace period."""
        give_up_at = float("inf")
        while True:
            try:
                return call()
            except AWAY:
                if draining.is_set():
                    give_up_at = min(give_up_at, time.monotonic() + self._settings.grace_seconds)
                if time.monotonic() > give_up_at:
                    raise
            time.sleep(TICK_SECONDS)

    # ---- after

    def _conclude(self, own: Shipper, attempt: Attempt) -> None:
        """Say how the attempt ended. Nothing of it lives and all its events are shipped."""
        outcome = own.progress.outcome
        if isinstance(outcome, Finished):  # also where a wish to stop came too late
            self._finish("succeeded", "")
        elif self._word == "cancel":
            self._finish("cancelled", "cancelled on request")
        elif isinstance(outcome, Failed) and outcome.reason != "crash":
            self._fail(outcome.reason, outcome.message, attempt)
        elif self._word == "pause":
            self._finish("queued", "its worker was drained")
        elif self._word == "max_duration":
            reached = f"{own.progress.step} of {self._job.total_steps} steps"
            message = f"reached max_duration_seconds {self._limit:g} after {reached}; its checkpoints are kept"
            self._fail("max_duration", message)
        elif isinstance(outcome, Failed):
            # one that broke before its first step would break again the same way
            self.give_up("crash", outcome.message, attempt, None if own.progress.step else 1)
        elif outcome is None:
            self.give_up("exited", "the trainer ended without a word", attempt)
        else:
            self.give_up("exited", "the trainer was told to stop by something else", attempt)

    def _fail(self, reason: str, message: str, attempt: Attempt | None = None) -> None:
        error = JobError(reason=reason, message=message, log=_tail(attempt) if attempt else [])
        self._finish("failed", reason, error)

    def _finish(self, status: Status, why: str, error: JobError | None = None) -> None:
        fields = {"error": error, "ran_seconds": self._ran_seconds()}
        self._patiently(
            lambda: self._store.finish(self._job.id, self._number, status, why, who=self._who, fields=fields)
        )

    def give_up(self, reason: str, message: str, attempt: Attempt | None = None, most: int | None = None) -> None:
        """End the attempt as lost: another follows, unless `most` were lost in a row."""
        error = JobError(reason=reason, message=message, log=_tail(attempt) if attempt else [])
        most = most or self._settings.max_attempts
        self._patiently(lambda: self._store.lose(self._job.id, self._number, most, error, who=self._who))


def _take(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _text(attempt: Attempt) -> str:
    return attempt.stop.read_text() if attempt.stop.exists() else ""


def _tail(attempt: Attempt) -> list[str]:
    """The last lines that the trainer printed."""
    if not attempt.log.exists():
        return []
    with attempt.log.open("rb") as file:
        file.seek(max(0, attempt.log.stat().st_size - 16_384))
        return file.read().decode("utf-8", "replace").splitlines()[-LOG_LINES:]
