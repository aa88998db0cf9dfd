"""A part of the local stack: a child process that never outlives this one."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from gptcore.procs import die_with_parent
from gptcore.rotation import rotate
from trainmaster.mistake import Mistake

LOG_LINES = 15


class PartFailed(Mistake):
    """A part ended, or was not ready in time; the message holds the last lines of its log."""


class Part:
    """A running child process. Start it from the main thread: its death signal follows that thread.

    `log`: where its output goes; None: to ours. `death_signal`: what it gets when we are killed.
    `stop_seconds`: how long it may take to end after SIGTERM.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, log: Path | None, environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (), death_signal: signal.Signals = signal.SIGKILL, stop_seconds: float = 5.0,
    ):  # fmt: skip
        self.name = name
        self._log = log
        self._log_start = log.stat().st_size if log is not None and log.exists() else 0
        self._stop_seconds = stop_seconds
        parent = os.getpid()
        self.started_at = time.monotonic()
        with ExitStack() as files:
            output = files.enter_context(log.open("ab")) if log is not None else None
            # in a session of its own: Ctrl-C reaches us alone, and we stop the parts in order
            self._process = subprocess.Popen(
                command, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT if output is not None else None, pass_fds=pass_fds, start_new_session=True,
                preexec_fn=lambda: die_with_parent(death_signal, parent),
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> bool:
        return self._process.poll() is not None

    def check(self) -> None:
        """Raises PartFailed when the process has ended."""
        if (code := self._process.poll()) is not None:
            how = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
            raise PartFailed(f"{self.name} ended {how}{self.log_tail()}")

    def rotate_log(self) -> None:
        """Keep the log at two parts of limited length, of which the older one has ".old" after its name."""
        if self._log is not None and rotate(self._log):
            self._log_start = 0

    def log_tail(self) -> str:
        """The last lines of what this process wrote, as the end of a message."""
        if self._log is None:
            return ""
        with self._log.open("rb") as file:
            file.seek(self._log_start)
            lines = file.read().decode("utf-8", "replace").splitlines()[-LOG_LINES:]
        return f"; the end of {self._log}:\n" + "\n".join(f"  {line}" for line in lines)

    def stop(self) -> None:
        """Ask it to end, wait, and kill what is left."""
        self._process.terminate()  # nothing where it has ended
        try:
            self._process.wait(self._stop_seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
