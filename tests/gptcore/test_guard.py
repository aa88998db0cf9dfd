import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcore import guard
from gptcore.state import TrainState


def settled(loss: float = 3.0) -> TrainState:
    """A state with full windows around `loss`, norms around 1."""
    state = TrainState()
    for i in range(200):
        guard.accept(state, loss + 0.1 * (-1) ** i, 1.0 + 0.05 * (-1) ** i)
    return state


def test_windows_hold_the_last_128_accepted_steps() -> None:
    state = settled()
    assert len(state.losses) == len(state.grad_norms) == 128


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_from_the_first_step_on(bad: float) -> None:
    for verdict in (guard.judge(TrainState(), bad, 1.0), guard.judge(TrainState(), 3.0, bad)):
        assert verdict is not None
        assert verdict.reason == "non_finite"


def test_a_spike_is_refused_once_the_window_is_full_and_not_before() -> None:
    assert guard.judge(TrainState(losses=[3.0] * 127, grad_norms=[1.0] * 127), 100.0, 100.0) is None
    state = settled()
    assert guard.judge(state, 3.5, 1.2) is None  # within six sigma
    for loss, norm in ((3.7, 1.0), (3.0, 1.4)):
        verdict = guard.judge(state, loss, norm)
        assert verdict is not None
        assert verdict.reason == "spike"
        assert verdict.loss_limit == pytest.approx(3.6, abs=0.01)
        assert verdict.grad_norm_limit == pytest.approx(1.3, abs=0.01)


@given(st.lists(st.booleans(), max_size=40))
def test_only_refusals_in_a_row_lead_back(refused: list[bool]) -> None:
    state, in_a_row = TrainState(), 0
    for bad in refused:
        in_a_row = in_a_row + 1 if bad else 0
        if bad:
            assert guard.skip(state) == (in_a_row >= guard.SKIPS_BEFORE_ROLLBACK)
        else:
            guard.accept(state, 3.0, 1.0)
    assert state.batches_skipped == sum(refused)


def test_the_state_survives_json_bit_for_bit() -> None:
    state = settled(1 / 3)
    state.best_val_loss = 0.1 + 0.2
    assert TrainState.model_validate_json(state.model_dump_json()) == state
