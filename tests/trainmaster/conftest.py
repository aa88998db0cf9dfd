"""A home of its own for each test, and the command line as a real process in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import wait_until

Start = Callable[..., subprocess.Popen[str]]
TRAINMASTER = [str(Path(sys.executable).with_name("trainmaster"))]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """TRAINMASTER_HOME for every process of the test; none may be left when it ends."""
    for name in [name for name in os.environ if name.startswith("TRAINMASTER_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    monkeypatch.setenv("TRAINMASTER_HOME", str(home))
    monkeypatch.setenv("TRAINMASTER_GRACE_SECONDS", "5")
    monkeypatch.setenv("TRAINMASTER_DEVICE", "cpu")
    yield home
    left = processes_of(home)
    for process in left:
        process.kill()
    assert not left, f"left behind: {[process.cmdline() for process in left]}"


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    """Start a command of ours; whatever still runs when the test ends is interrupted."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*TRAINMASTER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    wait_until(lambda: not processes_of(home), 30)


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """A command of ours, run to its end."""
    return subprocess.run([*TRAINMASTER, *arguments], input=stdin, capture_output=True, text=True, timeout=120)


def line(process: subprocess.Popen[str], start: str) -> str:
    """The next line that the process prints which begins so."""
    assert process.stdout is not None
    read = []
    for text in process.stdout:
        read.append(text)
        if text.startswith(start):
            return text
    raise AssertionError(f"ended without a line {start!r}: {''.join(read)}")


def processes_of(home: Path) -> list[psutil.Process]:
    """Every living process that was started for this home."""
    found = []
    for process in psutil.process_iter():
        try:
            # Redis writes its title over its environment; it is known by where it works
            mine = process.environ().get("TRAINMASTER_HOME") == str(home) or process.cwd() == str(home / "redis")
            if mine and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # gone meanwhile
            continue
    return found
