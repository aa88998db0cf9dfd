"""A trainer's processes: started so that none outlives its launcher, found and killed to the last one."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psutil

from gptcore.procs import die_with_parent

# every process of a job's attempts carries its id here: ranks are in sessions of their own, and
# once torchrun is gone nothing else ties them together
MARK = "TRAINMASTER_JOB"


class Tree:
    """A program and everything it starts. Make it in the main thread: death signals follow the thread."""

    def __init__(self, command: list[str], job_id: str, environment: Mapping[str, str], folder: Path, log: Path):
        self._job_id = job_id
        launcher = os.getpid()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env={**environment, MARK: job_id},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(signal.SIGTERM, launcher),
            )

    def leader_alive(self) -> bool:
        return self._process.poll() is None

    def alive(self) -> bool:
        # looking through all processes costs milliseconds: only once the leader has gone
        return self.leader_alive() or bool(living(self._job_id))

    def kill(self) -> None:
        """SIGKILL to all there are now; call until none is alive."""
        if self.leader_alive():
            self._process.kill()
        kill(self._job_id)


def living(job_id: str) -> list[psutil.Process]:
    """The processes on this machine that belong to any attempt at the job."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == job_id and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # gone meanwhile, or another user's
            continue
    return found


def kill(job_id: str) -> None:
    for process in living(job_id):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
