"""The launcher: one attempt at a job, from its ticket to the word on how it ended.

It starts the trainer, ships its events in order, holds the attempt's lease and heeds wishes to stop.
The trainer knows nothing of it: they speak through the run directory. While Redis is away training
goes on, and what was not shipped is read again. How an attempt ended is said by its last event,
never by an exit code. On several nodes this is the first one's; the others run a `Member`.
"""

import errno
import os
import signal
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from shutil import disk_usage

from gptcore.curves import extend
from gptcore.events import Failed, Finished, JsonlReport, Notice, last_event
from gptcore.locks import open_lock, shared, take
from gptcore.rotation import older_log
from gptcore.rundir import RunDir, write_atomically
from gptcore.spec import AnySpec, PublishSpec, SpecError, parse_spec, read_spec
from worker import processes, trainer
from worker.connection import AWAY
from worker.gpus import GpuMemory
from worker.hold import TICK_SECONDS, Hold, draining, log, patiently
from worker.job import JobError, Status, Ticket
from worker.member import BROKEN_SECONDS, Member
from worker.place import node_address, runs_root_id, slot_lock
from worker.record import job_of
from worker.schema import Schema, SchemaTooNew
from worker.settings import Settings
from worker.shipper import BATCH_EVENTS, Shipper
from worker.store import CLAIM_SECONDS, Store, Superseded

SHIP_SECONDS = 0.5  # at least between two shipments: each costs both sides half a millisecond
CATCH_UP_SECONDS = 5.0  # for what earlier attempts left; what takes longer is shipped while the trainer runs
LEAST_BYTES = 2**20  # free for a job that saves no checkpoint
MAY_PASS = ("crash", "disk_full", "unavailable")  # of a trainer's own reasons to fail: by another attempt
LOG_LINES = 40  # the last of a failed trainer's, in the job's error


def run(job_id: str, attempt: int, node_rank: int, slot: str) -> None:
    """The one function that a ticket may call. Does nothing where the ticket is no longer good."""
    ticket = Ticket(job_id=job_id, attempt=attempt, node_rank=node_rank, slot=slot)
    if not ticket.is_sound:  # made by hand: its ids become names of files below
        log.error("%s for slot %s is not a ticket that an agent made", ticket.id, slot)
        return
    settings = Settings.from_environment()
    store = Store(settings.redis_url, socket_timeout=2.0)
    # for the agent, which ends launchers that hang
    note = slot_lock(settings, slot).with_suffix(".ticket")
    note.unlink(missing_ok=True)  # on a full disk rather none than another's
    with suppress(OSError):
        note.write_text(f"{job_id} {attempt}")
    boot, root, give_up_at = f"{slot}:{os.getpid()}", runs_root_id(settings), time.monotonic() + CLAIM_SECONDS
    try:
        with closing(Schema(settings.redis_url, socket_timeout=2.0)) as schema:
            patiently(schema.bring_up_to_date, settings.grace_seconds, give_up_at)
    except SchemaTooNew as error:
        log.error("%s: the ticket is not taken: %s", ticket.id, error)
        return
    if not patiently(lambda: store.claim(ticket, boot, root), settings.grace_seconds, give_up_at):
        log.info("%s: the ticket is no longer good", ticket.id)
        return
    hold = Hold(store, ticket, settings.grace_seconds)
    try:
        (Launcher if node_rank == 0 else Member)(settings, hold).run()
    except Superseded as superseded:
        log.warning("%s; nothing more is written", superseded)


class Launcher:
    def __init__(self, settings: Settings, hold: Hold):
        self._settings = settings
        self._hold = hold
        self._ticket = hold.ticket
        self._job = job_of(hold.record, None)
        self._run_dir = RunDir(settings.runs / self._job.id)
        self._attempt = self._run_dir.attempt(hold.ticket.attempt)
        self._shipper = Shipper(hold.store, self._job.id, self._run_dir, hold.ticket.attempt, self._job.total_steps)
        self._limit: float | None = None  # of seconds in all attempts
        self._ran_before = float(hold.record.get("ran_seconds", 0))
        self._began = time.monotonic()
        self._ship_at = float("-inf")
        self._word = ""  # how the attempt is to end, once it is: what the stop file says
        self._broken = ""  # what broke on another of its nodes
        self._hung = ""  # why its trainer is taken for one that hangs
        self._columns_end = 0  # the byte of its events up to which their columns are stored
        self._returncode = 0  # the trainer's: says something only where the trainer could not

    def run(self) -> None:
        try:
            self._run(parse_spec(self._job.spec))
        except SpecError as error:
            self._ship_what_is_left()
            self._fail("invalid_spec", str(error))
        except OSError as error:  # a full disk, a runs root that cannot be written: the job says so
            self._ship_what_is_left()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # until there is room no attempt counts as one that failed
                self._give_up("disk_full", f"{error}; free some space for {self._settings.runs}", most=0)
            else:
                self._give_up("worker", f"{type(error).__name__}: {error}")

    def _run(self, spec: AnySpec) -> None:
        self._limit = spec.resources.max_duration_seconds
        if (owner := self._run_dir.owner()) not in ("", self._job.id):
            message = f"{self._run_dir.path} is the run directory of {owner}; move it away and submit the job again"
            return self._fail("foreign_run_dir", message)
        if isinstance(spec, PublishSpec) and (message := self._settings.refuses_repo(spec.repo)):
            self._ship_what_is_left()
            return self._fail("invalid_spec", message)
        self._need_room()
        if not self._claim_folder():
            return None
        with ExitStack() as locks:
            clear = self._outlast(locks)
            finished = self._finished_before()
            self._ship_all(CATCH_UP_SECONDS if clear and not finished else float("inf"))
            if finished or self._shipper.finished:
                return self._finish("succeeded", "finished in an earlier attempt")
            if clear:
                locks.enter_context(shared(self._attempt.lock))
                self._train(self._settled_spec(spec))
            return self._conclude()

    # ---- before

    def _need_room(self) -> None:
        """Raises OSError where not one checkpoint would fit: what is trained could not be kept."""
        need, free = (self._job.plan or {}).get("checkpoint_bytes", LEAST_BYTES), disk_usage(self._settings.runs).free
        if free < need:
            what = " for a checkpoint" if self._job.plan else ""
            raise OSError(errno.ENOSPC, f"it needs {need / 2**20:,.0f} MiB{what}, {free / 2**20:,.0f} are free")

    def _claim_folder(self) -> bool:
        """Make this attempt's folder. An older state of the store learns from the directory how far it came."""
        latest = max((attempt.number for attempt in self._run_dir.attempts()), default=0)
        if latest >= self._ticket.attempt:
            why = f"attempt {latest} was made before, in a history that Redis forgot"
            self._finish("recovering", why, attempt=latest)
            return False
        self._attempt.path.mkdir(parents=True)
        processes.sign(self._attempt.path, 0)
        write_atomically(self._run_dir.owner_mark, self._job.id)
        return True

    def _settled_spec(self, spec: AnySpec) -> AnySpec:
        """The spec that the run began with, whatever Redis says later."""
        if not self._run_dir.spec.exists():
            write_atomically(self._run_dir.spec, spec.model_dump_json(indent=2))
            return spec
        began_with = read_spec(self._run_dir.spec)
        if began_with != spec:
            report = JsonlReport(self._attempt.events, self._attempt.number)
            report(Notice(level="warning", message="the spec in Redis was changed; the run goes on with its own"))
            report.close()
        return began_with

    def _outlast(self, locks: ExitStack) -> bool:
        """Wait until no process of an earlier attempt lives, here or elsewhere; false when told to stop.

        Their locks stay with us, so that none can begin late. Whoever is still at it on a node that Redis
        does not hear is told so through the directory; a wish to stop waits for it only so long.
        """
        earlier = [attempt for attempt in self._run_dir.attempts() if attempt.number < self._attempt.number]
        folders = [attempt.path for attempt in earlier]
        kill_at = time.monotonic() + self._settings.grace_seconds
        held_by_others = [(attempt, locks.enter_context(open_lock(attempt.lock)).fileno()) for attempt in earlier]
        while True:
            told = bool(self._heed())
            held_by_others = [(attempt, lock) for attempt, lock in held_by_others if not take(lock)]
            for attempt, _ in held_by_others:
                if not attempt.stop.exists():
                    write_atomically(attempt.stop, "pause")
            left = processes.leftovers(self._ticket, self._settings.home, folders)
            if not (held_by_others or left) or (told and time.monotonic() > kill_at + BROKEN_SECONDS):
                return not told
            if time.monotonic() > kill_at:
                processes.kill(*left)
            time.sleep(TICK_SECONDS)

    def _finished_before(self) -> bool:
        """Whether an earlier attempt finished the run, by the last event of each."""
        for attempt in self._run_dir.attempts():
            if attempt.number < self._attempt.number and isinstance(last_event(attempt.events), Finished):
                return True
        return False

    # ---- during

    def _train(self, spec: AnySpec) -> None:
        """Run the trainer to its end, all events shipped. Raises Superseded and OSError, the trainer stopped."""
        meeting = f"{node_address(self._settings)} {trainer.free_port()}"
        if len(self._job.nodes) > 1:
            self._report(rendezvous=meeting)
        self._hold.renew()  # nvidia-smi may take seconds
        memory = GpuMemory()
        tree = trainer.start(spec, self._settings, self._run_dir.path, self._ticket, meeting, self._attempt.log)
        try:
            while tree.alive():
                self._send()
                self._tend(tree)
                self._columns_end = extend(self._attempt, self._columns_end)
                time.sleep(TICK_SECONDS)
            self._returncode = tree.returncode or 0
            self._ship_all()
            self._pass_on_word_left()
            self._await_members()
        except (Superseded, OSError) as error:
            if isinstance(error, Superseded):  # else the disk takes no word for the trainer
                self._pass_on("pause")
            # without the others no rank gets as far as a checkpoint
            tree.end_within(BROKEN_SECONDS if len(self._job.nodes) > 1 else self._settings.grace_seconds)
            while tree.alive():
                with suppress(Superseded):
                    if isinstance(error, OSError):  # until it is gone the job is ours
                        self._hold.renew()
                time.sleep(TICK_SECONDS)
            raise
        memory.await_return(meanwhile=self._hold.renew)

    def _tend(self, tree: processes.Tree) -> None:
        word = self._heed()
        if word and self._pass_on(word):
            tree.end_within(self._settings.grace_seconds)
        if self._broken:
            tree.end_within(BROKEN_SECONDS)
        if self._hung and not word and self._pass_on("pause"):  # one that is only slow leaves with a checkpoint
            tree.show_stacks()
            tree.end_within(self._settings.grace_seconds)
        if self._shipper.outcome is not None:  # it said its last word
            tree.end_within(self._settings.grace_seconds)

    def _pass_on_word_left(self) -> None:
        """Of another rank, which broke: the first was killed while it waited for that one on its GPU.

        A crash may be no more than the echo of the first one's own end, so it stays in the log.
        """
        word = self._attempt.word_left()
        if word is not None and word.reason != "crash" and self._shipper.outcome is None:
            report = JsonlReport(self._attempt.events, self._attempt.number)
            report(word)
            report.close()
            self._ship_all()

    def _pass_on(self, word: str) -> bool:
        """Tell the trainer to stop; whether it was not told so before."""
        if self._attempt.told() == word:
            return False
        write_atomically(self._attempt.stop, word)
        return True

    def _heed(self) -> str:
        """Hold the lease and ask how the attempt is to end: "" or a word for the stop file."""
        desired = self._hold.renew()
        if desired.startswith("broken"):
            self._broken = desired.removeprefix("broken: ")
        elif desired:
            self._word = desired
        elif draining.is_set():
            self._word = self._word or "pause"
        elif self._limit is not None and self._ran_seconds() > self._limit:
            self._word = self._word or "max_duration"
        return self._word

    def _ran_seconds(self) -> float:
        """In all attempts; time in the queue does not count."""
        return self._ran_before + time.monotonic() - self._began

    def _await_members(self) -> None:
        """Until nothing of the attempt lives on its other nodes. One that is lost meanwhile ends the attempt."""
        if len(self._job.nodes) > 1:
            self._report(rendezvous="over")
        while len(self._job.nodes) > 1 and self._hold.insist(lambda: self._hold.store.members_left(self._job.id)):
            self._hold.renew()
            time.sleep(TICK_SECONDS)

    def _send(self) -> None:
        """Ship what there is, unless Redis is away: the same lines are sent again."""
        if (silent_seconds := time.monotonic() - self._ship_at) < 0:
            return
        with suppress(*AWAY, Superseded):  # the next renewal tells whether another attempt has the job
            began, sent = time.monotonic(), BATCH_EVENTS
            while sent == BATCH_EVENTS and time.monotonic() < began + TICK_SECONDS:  # more waits after a whole batch
                sent = self._shipper.send("running", self._ticket.slot, ran_seconds=self._ran_seconds())
            if sent:
                self._ship_at = time.monotonic() + (SHIP_SECONDS if sent < BATCH_EVENTS else 0)
            else:
                self._hung = self._hung or self._shipper.progress.hang(silent_seconds, self._settings.hang_seconds)

    def _ship_all(self, seconds: float = float("inf")) -> None:
        """Ship every event of every attempt, or as many as `seconds` allow. The lease is held meanwhile."""
        began = time.monotonic()
        while self._hold.insist(lambda: self._shipper.send(ran_seconds=self._ran_seconds())):
            self._hold.renew()
            if time.monotonic() > began + seconds:
                return

    def _ship_what_is_left(self) -> None:
        """Ship what earlier attempts left, as far as the disk can be read: the job may end with this attempt."""
        if self._run_dir.owner() in ("", self._job.id):
            with suppress(OSError):
                self._ship_all()

    def _report(self, **fields: object) -> None:
        self._hold.insist(lambda: self._hold.store.report(self._job.id, self._ticket.attempt, fields))

    # ---- after

    def _conclude(self) -> None:
        """Say how the attempt ended. Nothing of it lives and all its events are shipped."""
        outcome, step = self._shipper.outcome, self._shipper.progress.step
        if isinstance(outcome, Finished):  # also where a wish to stop came too late
            self._finish("succeeded", "")
        elif self._word == "cancel":
            self._finish("cancelled", "cancelled on request")
        elif isinstance(outcome, Failed) and outcome.reason not in MAY_PASS:
            self._fail(outcome.reason, outcome.message)
        elif isinstance(outcome, Failed) and outcome.reason == "disk_full" and self._word != "max_duration":
            self._give_up(outcome.reason, outcome.message)  # also when drained: its last steps are not saved
        elif self._word == "pause":
            self._finish("queued", "its worker was drained")
        elif self._word == "max_duration":
            reached = f"{step} of {self._job.total_steps} steps"
            message = f"reached max_duration_seconds {self._limit:g} after {reached}; its checkpoints are kept"
            if isinstance(outcome, Failed):
                message += f", but the last steps are not in them: {outcome.message}"
            self._fail("max_duration", message, log_lines=0)
        elif self._hung:
            self._give_up("hung", self._hung)
        elif self._broken:
            self._give_up("exited", self._broken)
        elif isinstance(outcome, Failed):
            # alone, one that broke before its first step would break again the same way
            again = step > 0 or len(self._job.nodes) > 1 or outcome.reason != "crash"
            self._give_up(outcome.reason, outcome.message, None if again else 1)
        elif outcome is None:
            code = self._returncode
            how = f" by {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"
            how += ", as where the machine has no memory left" if code == -signal.SIGKILL else ""
            self._give_up("exited", f"the trainer ended without a word{how}")
        elif self._attempt.told() == "pause":
            self._finish("queued", "another of its nodes was drained")
        else:
            self._give_up("exited", "the trainer was told to stop by something else")

    def _fail(self, reason: str, message: str, log_lines: int = LOG_LINES) -> None:
        error = JobError(reason=reason, message=message, log=_tail(self._attempt.log, log_lines))
        self._finish("failed", reason, error=error)

    def _finish(self, status: Status, why: str, **fields: object) -> None:
        job_id, attempt, who = self._job.id, self._ticket.attempt, self._ticket.slot
        fields |= {"ran_seconds": self._ran_seconds()}
        self._hold.insist(lambda: self._hold.store.finish(job_id, attempt, status, why, who=who, fields=fields))

    def _give_up(self, reason: str, message: str, most: int | None = None) -> None:
        """End the attempt as lost: another follows, unless `most` were lost in a row; with 0 it does not count."""
        error = JobError(reason=reason, message=message, log=_tail(self._attempt.log, LOG_LINES))
        job_id, attempt, who = self._job.id, self._ticket.attempt, self._ticket.slot
        most = self._settings.max_attempts if most is None else most
        self._hold.insist(lambda: self._hold.store.lose(job_id, attempt, most, error, who=who))


def _tail(log: Path, lines: int) -> list[str]:
    """The last lines that the trainer printed."""
    text = b""
    for part in (older_log(log), log):
        if part.exists() and lines:
            with part.open("rb") as file:
                file.seek(max(0, part.stat().st_size - 16_384))
                text += file.read()
    return text.decode("utf-8", "replace").splitlines()[-lines:]
