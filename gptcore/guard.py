"""The guard: an update that would harm the run is not applied.

An update is skipped on all ranks if its loss or gradient norm is not finite, or is more than `optim.spike_sigmas`
standard deviations above the mean of the last 128 steps. As in OLMo-core, refused values enter the window too, so a
level that lasts is accepted after a few steps. All ranks hold the same averaged numbers, so they decide alike without
communication.
"""

import math

from gptcore.events import Skipped
from gptcore.state import TrainState

WINDOW = 128
# the least standard deviation of losses, as a share of their mean, and of the logarithms of gradient norms:
# in a flat window every rounding error would be a spike
LEAST_LOSS_SIGMA = 0.01
LEAST_NORM_SIGMA = 0.05
SKIPS_BEFORE_ROLLBACK = 5
MAX_ROLLBACKS = 3
_LEAST_NORM = 1e-30  # a norm of 0 has no logarithm
_MOST_EXPONENT = 700.0  # above this exp() overflows


def judge(state: TrainState, loss: float, grad_norm: float, sigmas: float | None) -> Skipped | None:
    """Return None if the update may be applied, else the event that reports the refusal. Changes nothing.

    sigmas: see `optim.spike_sigmas`; None refuses only what is not finite.
    """
    loss_limit = norm_limit = None
    if sigmas is not None and len(state.losses) >= WINDOW:
        loss_limit, norm_limit = _loss_limit(state.losses, sigmas), _norm_limit(state.grad_norms, sigmas)
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    over_loss = loss_limit is not None and loss > loss_limit
    over_norm = norm_limit is not None and grad_norm > norm_limit
    if finite and not (over_loss or over_norm):
        return None
    return Skipped(
        step=state.step + 1, reason="spike" if finite else "non_finite", train_loss=loss, grad_norm=grad_norm,
        loss_limit=loss_limit, grad_norm_limit=norm_limit,
    )  # fmt: skip


def _loss_limit(losses: list[float], sigmas: float) -> float:
    mean, sigma = _mean_and_sigma(losses)
    return mean + sigmas * max(sigma, LEAST_LOSS_SIGMA * abs(mean))


def _norm_limit(grad_norms: list[float], sigmas: float) -> float:
    """Norms are judged by their logarithms: norms are about log-normal, and one healthy step in a hundred of a small
    model is beyond six standard deviations of the norms themselves."""
    mean, sigma = _mean_and_sigma([math.log(max(norm, _LEAST_NORM)) for norm in grad_norms])
    return math.exp(min(mean + sigmas * max(sigma, LEAST_NORM_SIGMA), _MOST_EXPONENT))


def _mean_and_sigma(values: list[float]) -> tuple[float, float]:
    """Return the mean and the population's standard deviation. A GPU idles meanwhile: statistics.pstdev, which
    computes in exact fractions, takes ten times as long."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / len(values))


def accept(state: TrainState, loss: float, grad_norm: float) -> None:
    """Count an applied update."""
    _observe(state, loss, grad_norm)
    state.skipped_in_a_row = 0


def skip(state: TrainState, loss: float, grad_norm: float) -> bool:
    """Count a refused update. Return True if the run must go back to its last checkpoint."""
    _observe(state, loss, grad_norm)
    state.batches_skipped += 1
    state.skipped_in_a_row += 1
    return state.skipped_in_a_row >= SKIPS_BEFORE_ROLLBACK


def _observe(state: TrainState, loss: float, grad_norm: float) -> None:
    """Add a step to the windows. One number that is not finite would make every later limit not finite too."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        state.losses = [*state.losses, loss][-WINDOW:]
        state.grad_norms = [*state.grad_norms, grad_norm][-WINDOW:]
