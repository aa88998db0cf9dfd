"""How an attempt that cannot go on says so: one `failed` event, with the rank that broke first."""

import errno
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gptcore.events import Failed, Report
from gptcore.log import reporter
from gptcore.rundir import Attempt, write_atomically
from gptcore.spec import SpecError

# how long rank 0 waits for word from the rank whose end broke its own collective
FIRST_WORD_SECONDS = 3.0
_TRACEBACK_CHARACTERS = 8000


class Diverged(RuntimeError):
    """The guard went back as often as it may."""


class Mismatch(RuntimeError):
    """The exported folder is not the model that was trained."""


class Unavailable(RuntimeError):
    """Something elsewhere does not answer, and may do so later."""


REASONS: dict[type[BaseException], str] = {
    SpecError: "user_error", Diverged: "diverged", Mismatch: "mismatch", Unavailable: "unavailable",
}  # fmt: skip


def describe(error: BaseException, rank: int) -> Failed:
    """The event for an exception: what kind it is decides whether another attempt can help."""
    reason, message = "crash", f"{type(error).__name__}: {error}"
    if type(error) in REASONS:
        reason, message = REASONS[type(error)], str(error)
    elif isinstance(error, torch.OutOfMemoryError):
        reason = "out_of_memory"
        message += "; use a smaller micro_batch_size, or activation_checkpointing"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "disk_full"
    trace = "".join(traceback.format_exception(error))[-_TRACEBACK_CHARACTERS:]
    return Failed.model_validate({"reason": reason, "message": message, "rank": rank, "traceback": trace})


@contextmanager
def reporting(attempt: Attempt, rank: int) -> Iterator[Report]:
    """What breaks within is said before it goes on. Rank 0 reports; another rank leaves word for it, since its own
    end breaks rank 0's collective."""
    report = reporter(attempt, first=rank == 0)
    try:
        yield report
    except (KeyboardInterrupt, Exception) as error:
        failed = describe(error, rank)
        if rank != 0:
            write_atomically(attempt.path / f"failed-rank-{rank}.json", failed.model_dump_json())
        else:
            report(_first_word(attempt, failed) if failed.reason == "crash" else failed)
        raise


def _first_word(attempt: Attempt, own: Failed) -> Failed:
    """The earliest of rank 0's own failure and what other ranks left."""
    deadline = time.monotonic() + FIRST_WORD_SECONDS
    while time.monotonic() < deadline:
        left = [Failed.model_validate_json(p.read_text()) for p in attempt.path.glob("failed-rank-*.json")]
        if left:
            return min([own, *left], key=lambda failed: failed.time)
        time.sleep(0.1)
    return own
