"""The guard: an update that would harm the run is not applied.

A loss or gradient norm that is not finite, or above mean + 6 sigma of the last 128 accepted steps
(OLMo's rule), skips the update on all ranks. All ranks hold the same averaged numbers, so they
decide alike without asking each other.
"""

import math
import statistics

from gptcore.events import Skipped
from gptcore.state import TrainState

WINDOW = 128
SIGMAS = 6.0
SKIPS_BEFORE_ROLLBACK = 5
MAX_ROLLBACKS = 3


def judge(state: TrainState, loss: float, grad_norm: float) -> Skipped | None:
    """None where the update may be applied, else what is said of it. Changes nothing."""
    loss_limit, norm_limit = limit(state.losses), limit(state.grad_norms)
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    over_loss = loss_limit is not None and loss > loss_limit
    over_norm = norm_limit is not None and grad_norm > norm_limit
    if finite and not (over_loss or over_norm):
        return None
    return Skipped(
        step=state.step + 1, reason="spike" if finite else "non_finite", train_loss=loss, grad_norm=grad_norm,
        loss_limit=loss_limit, grad_norm_limit=norm_limit,
    )  # fmt: skip


def limit(window: list[float]) -> float | None:
    """mean + 6 sigma of a full window; None before."""
    if len(window) < WINDOW:
        return None
    mean = statistics.fmean(window)
    # a GPU idles meanwhile: statistics.pstdev, in exact fractions, takes ten times as long
    return mean + SIGMAS * math.sqrt(math.fsum((x - mean) ** 2 for x in window) / len(window))


def accept(state: TrainState, loss: float, grad_norm: float) -> None:
    """Count an applied update."""
    state.losses = [*state.losses, loss][-WINDOW:]
    state.grad_norms = [*state.grad_norms, grad_norm][-WINDOW:]
    state.skipped_in_a_row = 0


def skip(state: TrainState) -> bool:
    """Count a refused one; True where the run must go back to its last checkpoint."""
    state.batches_skipped += 1
    state.skipped_in_a_row += 1
    return state.skipped_in_a_row >= SKIPS_BEFORE_ROLLBACK
