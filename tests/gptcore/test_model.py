import math

import pytest
import torch

from gptcore import loss as loss_module
from gptcore.compiler import compile_loss
from gptcore.model import GPT, rope_tables, rotate
from gptcore.spec import ModelSpec
from tests.gptcore.conftest import FAMILIES, randomised, tiny_model

families = pytest.mark.parametrize("family", FAMILIES)


def batch(spec: ModelSpec, B: int = 2, T: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(7)
    tokens = torch.randint(0, 96, (B, T + 1))
    return tokens[:, :-1], tokens[:, 1:]


@families
def test_the_loss_at_the_start_is_that_of_guessing(family: str) -> None:
    spec = tiny_model(family)
    torch.manual_seed(0)
    assert GPT(spec)(*batch(spec)).item() == pytest.approx(math.log(96), abs=0.25)


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_at_the_start_is_that_of_guessing_with_zero_projections(tied: bool) -> None:
    spec = tiny_model("nanochat", tie_embeddings=tied)
    assert spec.init == "fan_in"
    torch.manual_seed(0)
    model = GPT(spec)
    loss = model(*batch(spec))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(96), abs=0.25)
    assert sum(p.grad.norm().item() for p in model.parameters() if p.grad is not None) > 0.01


@families
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_token_changes_no_logits_before_it(family: str, placement: str) -> None:
    spec = tiny_model(family, norm_placement=placement)
    model, (tokens, _) = randomised(spec), batch(spec)
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 96
    with torch.no_grad():
        difference = (model.logits(tokens) - model.logits(changed)).abs().amax(dim=(0, 2))
    assert difference[:20].max() < 1e-5
    assert difference[20:].min() > 1e-4


@families
def test_swapping_two_early_tokens_moves_the_last_logits(family: str) -> None:
    # with one layer only a position encoding can tell the order; with two, causality alone can
    model = randomised(tiny_model(family, n_layer=1))
    tokens, _ = batch(model.spec)
    tokens[:, 3], tokens[:, 9] = 11, 60
    swapped = tokens.clone()
    swapped[:, [3, 9]] = tokens[:, [9, 3]]
    with torch.no_grad():
        moved = (model.logits(tokens)[:, -1] - model.logits(swapped)[:, -1]).abs().max()
    assert moved > 1e-3


def test_without_positions_the_order_of_early_tokens_is_not_seen() -> None:
    # the control for the test above: it can fail
    model = randomised(tiny_model("llama", n_layer=1, position="none"))
    tokens, _ = batch(model.spec)
    swapped = tokens.clone()
    swapped[:, [3, 9]] = tokens[:, [9, 3]]
    with torch.no_grad():
        moved = (model.logits(tokens)[:, -1] - model.logits(swapped)[:, -1]).abs().max()
    assert moved < 1e-4


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_rotated_scores_depend_on_distance_and_never_on_offset(direction: str) -> None:
    spec = tiny_model("llama", rope_direction=direction)
    cos, sin = rope_tables(spec)
    torch.manual_seed(0)
    q, k = torch.randn(2, spec.head_dim)

    def score(i: int, j: int) -> float:
        turned_q = rotate(q.view(1, 1, 1, -1), cos[i : i + 1], sin[i : i + 1])
        turned_k = rotate(k.view(1, 1, 1, -1), cos[j : j + 1], sin[j : j + 1])
        return float((turned_q * turned_k).sum())

    assert score(9, 4) == pytest.approx(score(40, 35), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


@families
def test_one_batch_can_be_learnt_by_heart(family: str) -> None:
    spec = tiny_model(family, n_embd=64, vocab_size=96)
    torch.manual_seed(0)
    model = GPT(spec)
    tokens, targets = batch(spec, B=2, T=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(150):
        loss = model(tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def gradients(model: GPT, forward: object, data: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    forward(*data).backward()  # type: ignore[operator]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], relative: float) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert (gradient - other[name]).norm() <= relative * gradient.norm() + 1e-7, name


def written_out(model: GPT, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = model.logits(tokens).flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=loss_module.IGNORED)


@families
@pytest.mark.parametrize("rows", [None, 10])
def test_the_loss_and_its_gradients_are_those_of_the_logits(
    family: str, rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomised(tiny_model(family))
    tokens, targets = batch(model.spec)
    targets = targets.clone()
    targets[1, 5:] = loss_module.IGNORED
    if rows is not None:
        monkeypatch.setattr(loss_module, "LOSS_CHUNK_ELEMENTS", rows * model.spec.padded_vocab_size)
    assert abs(model(tokens, targets) - written_out(model, tokens, targets)) < 1e-5
    expected = gradients(model, lambda *data: 3 * written_out(model, *data), (tokens, targets))
    assert_equal_gradients(expected, gradients(model, lambda *data: 3 * model(*data), (tokens, targets)), 1e-5)


@families
def test_activation_checkpointing_changes_no_gradient(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = randomised(tiny_model(family))
    saving = GPT(plain.spec, activation_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    data, kept = batch(plain.spec), 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    sizes = []
    for model in (plain, saving):
        kept = 0
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(*data)
        sizes.append(kept)
    assert sizes[1] < 0.7 * sizes[0]
    assert_equal_gradients(gradients(plain, plain, data), gradients(saving, saving, data), 1e-6)
    positions, mask = torch.arange(32).expand(2, 32), torch.eye(32, dtype=torch.bool).expand(2, 1, 32, 32)
    assert torch.equal(saving.hidden(data[0], positions, mask), plain.hidden(data[0], positions, mask))


@families
def test_padding_of_the_vocabulary_gets_no_probability_and_no_gradient(family: str) -> None:
    model = randomised(tiny_model(family, tie_embeddings=False))
    tokens, targets = batch(model.spec)
    assert model.logits(tokens).shape == (2, 32, 96)
    found = gradients(model, model, (tokens, targets))
    assert found["lm_head.weight"].shape[0] == 128
    assert found["lm_head.weight"][96:].abs().max() == 0


@pytest.mark.slow
@families
def test_the_compiled_loss_and_its_gradients_are_the_eager_ones(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(tiny_model(family))
    tokens, targets = batch(model.spec)
    targets = targets.clone()
    targets[1, 5:] = loss_module.IGNORED
    data = tokens, targets
    loss, expected = model(*data), gradients(model, model, data)
    monkeypatch.setattr(loss_module, "LOSS_CHUNK_ELEMENTS", 20 * model.spec.padded_vocab_size)  # four chunks
    compiled = compile_loss(model)
    assert_equal_gradients(expected, gradients(model, compiled, data), 1e-4)
    assert abs(compiled(*data) - loss) < 1e-5
