"""How an attempt that cannot go on says so: one `failed` event, with the rank that broke first."""

import errno
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gptcore.events import Failed, Report
from gptcore.log import reporter
from gptcore.rundir import Attempt
from gptcore.spec import SpecError

# how long rank 0 waits for word from the rank whose end broke its own collective
FIRST_WORD_SECONDS = 3.0
_TRACEBACK_CHARACTERS = 8000


class Diverged(RuntimeError):
    """The guard went back as often as it may."""


class Interrupted(Exception):
    """A rank saw that the job is to stop; all ranks raise this at the same place."""


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
    elif is_out_of_memory(error):
        reason = "out_of_memory"
        message += "; use a smaller micro_batch_size, or activation_checkpointing"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "disk_full"
    elif may_pass(error):
        reason = "unavailable"
    trace = "".join(traceback.format_exception(error))[-_TRACEBACK_CHARACTERS:]
    return Failed.model_validate({"reason": reason, "message": message, "rank": rank, "traceback": trace})


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or, where the system refuses memory instead of killing, the CPU has no room for a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def may_pass(error: BaseException) -> bool:
    """Whether it is the Hub's, or of the way there, and of a kind that is over later."""
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    return isinstance(error, HfHubHTTPError | TransportError | OfflineModeIsEnabled)


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
            attempt.leave_word(rank, failed)
        else:
            report(_first_word(attempt, failed) if failed.reason == "crash" else failed)
        raise


def _first_word(attempt: Attempt, own: Failed) -> Failed:
    """The earliest of rank 0's own failure and what other ranks left."""
    deadline = time.monotonic() + FIRST_WORD_SECONDS
    while time.monotonic() < deadline:
        if (left := attempt.word_left()) is not None:
            return min(own, left, key=lambda failed: failed.time)
        time.sleep(0.1)
    return own
