"""What the process table says, twenty times a second: which attempts of which job are alive."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

import psutil

from worker.processes import JOB

SAMPLE_SECONDS = 0.05


class Watch:
    """Context manager: a thread that looks, and keeps what must never be seen in `seen`.

    `orphan_seconds`: how long a trainer process may live on after the last launcher of its attempt.
    """

    def __init__(self, orphan_seconds: float):
        self.seen: dict[str, list[str]] = {}  # job id: violations
        self.samples = 0
        self._orphan_seconds = orphan_seconds
        self._jobs: dict[psutil.Process, str] = {}
        self._alone_since: dict[psutil.Process, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            self._look()
            self.samples += 1
            time.sleep(max(0.0, began + SAMPLE_SECONDS - time.monotonic()))

    def _look(self) -> None:
        attempts: dict[str, dict[int, list[psutil.Process]]] = {}
        for process, job_id, number in self._trainers():
            attempts.setdefault(job_id, {}).setdefault(number, []).append(process)
        for job_id, living in attempts.items():
            if len(living) > 1:
                self._confirm(job_id, living)
        self._count_orphans(attempts)

    def _trainers(self) -> list[tuple[psutil.Process, str, int]]:
        found = []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                if "--attempt" not in words:
                    continue
                if process not in self._jobs:
                    self._jobs[process] = process.environ().get(JOB, "")
                if self._jobs[process] and process.status() != psutil.STATUS_ZOMBIE:
                    found.append((process, self._jobs[process], int(words[words.index("--attempt") + 1])))
            except (psutil.Error, ValueError, IndexError):  # gone meanwhile
                continue
        return found

    def _confirm(self, job_id: str, living: dict[int, list[psutil.Process]]) -> None:
        """A sample takes milliseconds, in which one may end and the next begin: all are asked once more.

        What was seen then and lives now lived together with what else was seen then.
        """
        still = {number for number, processes in living.items() if any(map(_lives, processes))}
        if len(still) > 1:
            self._note(job_id, f"attempts {sorted(still)} were alive at once")

    def _count_orphans(self, attempts: dict[str, dict[int, list[psutil.Process]]]) -> None:
        now, alone = time.monotonic(), {}
        for job_id, living in attempts.items():
            for number, processes in living.items():
                for process in processes:
                    if not self._launched(process):
                        alone[process] = self._alone_since.get(process, now)
                        if now - alone[process] > self._orphan_seconds:
                            what = (
                                f"a process of attempt {number} lived on {self._orphan_seconds:g} s after its launcher"
                            )
                            self._note(job_id, what)
        self._alone_since = alone

    def _launched(self, process: psutil.Process) -> bool:
        """Whether the launcher that started this trainer, or this rank's torchrun, lives: known by ancestry.

        A frozen launcher counts: it is there, and its lease has its own limit.
        """
        try:
            return any("worker.tasks" in parent.cmdline() for parent in process.parents())
        except psutil.Error:
            return False

    def _note(self, job_id: str, what: str) -> None:
        noted = self.seen.setdefault(job_id, [])
        if what not in noted:
            noted.append(what)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
