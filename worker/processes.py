"""A trainer's processes: started so that none outlives its launcher, found and killed to the last one."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from gptcore.locks import holder
from gptcore.procs import die_with_parent
from gptcore.rotation import rotate
from worker.job import Ticket

# in the environment of every process of an attempt: ranks are in sessions of their own, and once
# torchrun is gone nothing else ties them together
JOB, ATTEMPT, SLOT, HOME = "TRAINMASTER_JOB", "TRAINMASTER_ATTEMPT", "TRAINMASTER_SLOT", "TRAINMASTER_HOME"


class Tree:
    """A program and everything it starts. Make it in the main thread: death signals follow the thread."""

    def __init__(
        self, command: list[str], ticket: Ticket, environment: Mapping[str, str], folder: Path, log: Path,
        grace_seconds: float,
    ):  # fmt: skip
        self._marks = {JOB: ticket.job_id, ATTEMPT: str(ticket.attempt), SLOT: ticket.slot}
        self._grace_seconds = grace_seconds
        self._kill_at = float("inf")
        self._log = log
        launcher = os.getpid()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command, env={**environment, **self._marks}, cwd=folder, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=lambda: die_with_parent(signal.SIGTERM, launcher),
            )  # fmt: skip

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    def end_within(self, seconds: float) -> None:
        """Let it end by itself for so long; then `alive` kills it."""
        self._kill_at = min(self._kill_at, time.monotonic() + seconds)

    def show_stacks(self) -> None:
        """Have each trainer print where its threads are (`gptcore.setup`). torchrun ends of it, and so do its ranks."""
        for process in living(**self._marks):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGUSR1)

    def alive(self) -> bool:
        """Whether any process of it lives; kills those whose time is over, and rotates the log."""
        rotate(self._log)
        left = []
        if self._process.poll() is not None:
            # looking through all processes costs milliseconds: only once the first has gone. The others
            # are told so by the kernel.
            self.end_within(self._grace_seconds)
            left = list(living(**self._marks))
        if time.monotonic() > self._kill_at:
            kill(*living(**self._marks))
        return bool(left) or self._process.poll() is None


def living(**marks: str) -> Iterator[psutil.Process]:
    """The processes on this machine that carry these marks: JOB, ATTEMPT, SLOT or HOME to their values."""
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if marks.items() <= environment.items() and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except psutil.Error:  # gone meanwhile, or another user's
            continue


def leftovers(ticket: Ticket, home: Path, attempts: Iterable[Path] = ()) -> list[psutil.Process]:
    """What lives here of other attempts at the ticket's job (the folders `attempts`), or had its slot before."""
    found = {*living(**{JOB: ticket.job_id}), *living(**{SLOT: ticket.slot, HOME: str(home)})}
    mine = living(**{JOB: ticket.job_id, ATTEMPT: str(ticket.attempt)})
    signed = [read_signature(path) for folder in attempts for path in folder.glob("launcher-*")]
    return [*(found - set(mine)), *(process for process in signed if process is not None)]


def sign(attempt: Path, node_rank: int) -> None:
    """Note in the attempt's folder that this process is its launcher, for `leftovers`."""
    (attempt / f"launcher-{node_rank}").write_text(f"{_boot_id()} {os.getpid()} {psutil.Process().create_time()}")


def read_signature(path: Path) -> psutil.Process | None:
    """The launcher that signed, where it lives and is of this machine."""
    boot, _, rest = path.read_text().partition(" ")
    pid, _, created = rest.partition(" ")
    if boot == _boot_id() and pid.isdecimal():
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if str(process.create_time()) == created and lives(process):
                return process
    return None


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _boot_id() -> str:
    """Of this machine since it started; elsewhere than on Linux its name must do."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else socket.gethostname()


def holder_of(lock: Path) -> str:
    """Return " (process 123 of trainer)" for whoever holds the lock, "" where the system does not say."""
    pid = holder(lock)
    if pid is None:
        return ""
    try:
        return f" (process {pid} of {psutil.Process(pid).username()})"
    except psutil.NoSuchProcess:
        return f" (process {pid})"


def kill(*processes: psutil.Process) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
