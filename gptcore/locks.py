"""File locks that end with the process that holds them.

Lock files are readable by their owner alone: whoever may open one may also hold it, and so keep its owner waiting.
"""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

LOCKS = Path("/proc/locks")  # Linux


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold `path` alone; waits for others to let go."""
    with open_lock(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def shared(path: Path) -> Iterator[None]:
    """Hold `path` together with others; waits while one holds it alone."""
    with open_lock(path) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def is_held(path: Path) -> bool:
    """Whether any process holds `path` now, alone or shared."""
    with open_lock(path) as file:
        return not take(file.fileno())


def take(file: int) -> bool:
    """Hold an open file alone from now on; false where another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_lock(path: Path) -> TextIO:
    """Open a lock file for reading and appending, because NFS shares a lock only with a reader; make it if needed."""
    file = open(path, "a+", encoding="utf-8", opener=_owners_alone)  # noqa: SIM115
    found = os.fstat(file.fileno())
    if stat.S_IMODE(found.st_mode) & 0o077 and found.st_uid == os.geteuid():  # made by an earlier version
        os.fchmod(file.fileno(), 0o600)
    return file


def _owners_alone(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def holder(path: Path) -> int | None:
    """Return the id of a process that holds `path`; None where none does, or the system does not say."""
    if not LOCKS.exists():
        return None
    inode = str(path.stat().st_ino)
    for line in LOCKS.read_text("utf-8").splitlines():
        # "1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF"; behind "->" waits another
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode:
            return int(fields[4])
    return None
