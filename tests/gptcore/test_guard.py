import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcore import guard
from gptcore.state import TrainState

SIGMAS = 6.0


def settled(loss: float = 3.0) -> TrainState:
    """A state with full windows around `loss`, norms around 1."""
    state = TrainState()
    for i in range(200):
        guard.accept(state, loss + 0.1 * (-1) ** i, 1.0 + 0.05 * (-1) ** i)
    return state


def refused(losses: list[float], norms: list[float], state: TrainState | None = None) -> list[int]:
    """The indices of the updates that the guard refuses when it sees these in order."""
    state, found = state or TrainState(), []
    for index, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        if guard.judge(state, loss, norm, SIGMAS) is None:
            guard.accept(state, loss, norm)
        else:
            found.append(index)
            guard.skip(state, loss, norm)
    return found


def test_the_guards_windows_hold_the_last_128_finite_steps() -> None:
    state = settled()
    guard.skip(state, math.nan, 1.0)
    guard.skip(state, 3.0, math.inf)
    assert len(state.losses) == len(state.grad_norms) == 128
    assert all(map(math.isfinite, state.losses + state.grad_norms))
    guard.skip(state, 9.0, 2.0)
    assert (state.losses[-1], state.grad_norms[-1], len(state.losses)) == (9.0, 2.0, 128)


@pytest.mark.parametrize("sigmas", [SIGMAS, None])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_from_the_first_step_on(bad: float, sigmas: float | None) -> None:
    for verdict in (guard.judge(TrainState(), bad, 1.0, sigmas), guard.judge(TrainState(), 3.0, bad, sigmas)):
        assert verdict is not None
        assert verdict.reason == "non_finite"


def test_a_spike_is_refused_once_the_guards_window_is_full_and_not_before() -> None:
    assert guard.judge(TrainState(losses=[3.0] * 127, grad_norms=[1.0] * 127), 100.0, 100.0, SIGMAS) is None
    state = settled()
    assert guard.judge(state, 3.5, 1.2, SIGMAS) is None  # within six sigma
    for loss, norm in ((3.7, 1.0), (3.0, 1.4)):
        verdict = guard.judge(state, loss, norm, SIGMAS)
        assert verdict is not None
        assert verdict.reason == "spike"
        assert verdict.loss_limit == pytest.approx(3.6, abs=0.01)
        assert verdict.grad_norm_limit == pytest.approx(math.exp(6 * 0.05), rel=0.01)
        assert guard.judge(state, loss, norm, None) is None  # switched off


def test_the_guard_takes_a_lasting_rise_for_the_new_level_after_a_few_steps() -> None:
    draw = random.Random(0)
    before, after = ([draw.gauss(level, 0.01) for _ in range(200)] for level in (2.0, 2.3))
    assert refused(before + after, [1.0] * 400) == [200, 201, 202, 203]
    assert guard.SKIPS_BEFORE_ROLLBACK > 4  # so this rise alone never leads back
    rising_norms = [draw.gauss(1.0, 0.01) for _ in range(200)] + [draw.gauss(4.0, 0.01) for _ in range(200)]
    assert refused([2.0] * 400, rising_norms) == [200, 201, 202, 203]


def test_the_guard_skips_hardly_a_healthy_step_of_log_normal_gradient_norms() -> None:
    """Also of norms that scatter as widely as a small model's: none of these 3,000, and no more than 1 in 100,000."""
    draw = random.Random(1)
    for scatter in (0.1, 0.5, 1.0):
        losses = [draw.gauss(2.0, 0.05) for _ in range(1000)]
        assert refused(losses, [draw.lognormvariate(0.0, scatter) for _ in losses]) == []


def test_the_guard_does_not_call_a_flat_window_s_next_step_a_spike() -> None:
    state = TrainState(losses=[2.0] * 128, grad_norms=[1.0] * 128)
    assert guard.judge(state, 2.01, 1.05, SIGMAS) is None
    assert guard.judge(state, 2.5, 1.0, SIGMAS) is not None
    assert guard.judge(state, 2.0, 3.0, SIGMAS) is not None


def test_the_guard_refuses_single_spikes_in_a_run_that_learns() -> None:
    draw = random.Random(2)
    losses = [2 + 3 * math.exp(-i / 500) + draw.gauss(0, 0.03) for i in range(2000)]
    norms = [draw.lognormvariate(0.0, 0.2) for _ in losses]
    losses[700] = 6.5
    norms[1500] = 30.0
    assert refused(losses, norms) == [700, 1500]


@given(st.lists(st.booleans(), max_size=40))
def test_only_refusals_in_a_row_lead_back(refused: list[bool]) -> None:
    state, in_a_row = TrainState(), 0
    for bad in refused:
        in_a_row = in_a_row + 1 if bad else 0
        if bad:
            assert guard.skip(state, 3.0, 1.0) == (in_a_row >= guard.SKIPS_BEFORE_ROLLBACK)
        else:
            guard.accept(state, 3.0, 1.0)
    assert state.batches_skipped == sum(refused)


def test_the_state_survives_json_bit_for_bit() -> None:
    state = settled(1 / 3)
    state.best_val_loss = 0.1 + 0.2
    assert TrainState.model_validate_json(state.model_dump_json()) == state
