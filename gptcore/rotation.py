"""Logs of processes that keep them open: bounded, without the processes' help."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

LOG_BYTES = 32 * 2**20  # of one part of a log: on a slow disk it is copied within a lease


def older_log(log: Path) -> Path:
    """Return where the earlier part of a log is kept once the log became too long."""
    return log.with_name(f"{log.name}.old")


def rotate(log: Path) -> bool:
    """Once a log is longer than LOG_BYTES, move its text into its older part, which is replaced; return whether it was.

    Its writers keep it open (to append), so it is copied and then emptied: what they print in between is lost. A disk
    too full for the copy loses all of it.
    """
    with suppress(OSError):
        if log.stat().st_size > LOG_BYTES:
            with suppress(OSError):
                shutil.copyfile(log, older_log(log))
            os.truncate(log, 0)
            return True
    return False
