import math
from itertools import pairwise

import pytest
import torch

from gptcore.dist import Dist
from gptcore.model import GPT
from gptcore.optim import (
    Muon,
    _work,
    build_optimizers,
    load_optimizer_tensors,
    lr_factor,
    optimizer_tensors,
    orthogonalise,
    parameter_groups,
    set_lr,
    share_evenly,
    update,
)  # fmt: skip
from gptcore.spec import OptimSpec
from tests.gptcore.conftest import FAMILIES, randomised, tiny_model

ALONE = Dist(0, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_groups_cover_every_parameter_once_and_decay_no_vector(family: str, name: str, tied: bool) -> None:
    model = GPT(tiny_model(family, tie_embeddings=tied, norm="rmsnorm"))
    adamw, muon = parameter_groups(model, OptimSpec.model_validate({"name": name, "lr": 0.1}))
    grouped = [id(p) for group in adamw + muon for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    for group in adamw:
        assert all((p.dim() < 2) == (group["weight_decay"] == 0) for p in group["params"])
    assert all(p.dim() == 2 for group in muon for p in group["params"])


def test_cosine_warms_up_from_its_share_and_ends_at_the_least_rate() -> None:
    optim = OptimSpec(lr=1.2e-3, min_lr=1.2e-4, warmup_steps=715, warmup_from=0.1)
    factors = [lr_factor(step, optim, 19_073) for step in range(19_073)]
    assert factors[0] == pytest.approx(0.1, abs=0.002)
    assert factors[714] == pytest.approx(1.0)
    assert factors[715] == pytest.approx(1.0)
    assert factors[(715 + 19_073) // 2] == pytest.approx(0.55, abs=0.001)
    assert factors[-1] == pytest.approx(0.1, rel=1e-12)
    assert max(abs(a - b) for a, b in pairwise(factors)) < 0.002


def test_warmup_stable_decay_is_flat_and_then_a_line() -> None:
    optim = OptimSpec(lr=1.0, schedule="wsd", warmup_steps=10, cooldown_fraction=0.5)
    factors = [lr_factor(step, optim, 100) for step in range(100)]
    assert set(factors[10:51]) == {1.0}
    assert factors[75] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.02)


def test_groups_keep_their_own_rates_and_muons_momentum_warms_up() -> None:
    optim = OptimSpec(name="muon", lr=0.01, embed_lr=0.3, head_lr=0.004, muon_lr=0.02, schedule="constant")
    optimizers = build_optimizers(GPT(tiny_model("nanochat")), optim, ALONE)
    assert set_lr(optimizers, 0, optim, 100) == 0.01
    assert {g["lr"] for o in optimizers for g in o.param_groups} == {0.3, 0.004, 0.02}
    assert optimizers[1].param_groups[0]["momentum"] == 0.85
    set_lr(optimizers, 300, optim, 1000)
    assert optimizers[1].param_groups[0]["momentum"] == pytest.approx(0.95)


def test_without_a_warm_up_muons_momentum_is_there_from_the_first_step() -> None:
    optim = OptimSpec(name="muon", lr=0.1, muon_momentum=0.9, muon_momentum_warmup_steps=0)
    optimizers = build_optimizers(GPT(tiny_model("llama")), optim, ALONE)
    set_lr(optimizers, 0, optim, 10)
    assert optimizers[1].param_groups[0]["momentum"] == 0.9


def test_muons_matrices_decay_by_their_own_rate() -> None:
    optim = OptimSpec(name="muon", lr=0.1, muon_lr=0.5, muon_weight_decay=0.2, weight_decay=0.3)
    model = GPT(tiny_model("llama"))
    _, muon = build_optimizers(model, optim, ALONE)
    before = [p.detach().clone() for p in muon.param_groups[0]["params"]]
    for parameter in muon.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    muon.step()
    for parameter, was in zip(muon.param_groups[0]["params"], before, strict=True):
        torch.testing.assert_close(parameter.detach(), was * (1 - 0.5 * 0.2))


def test_every_state_is_restored_to_where_its_parameter_lies() -> None:
    model = GPT(tiny_model("llama"))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64)).backward()
    optimizer.step()
    saved = optimizer_tensors(model, [optimizer], ALONE)
    elsewhere = GPT(model.spec).to("meta")
    optimizer = torch.optim.AdamW(elsewhere.parameters())
    load_optimizer_tensors(elsewhere, [optimizer], ALONE, saved)
    assert {tensor.device.type for state in optimizer.state.values() for tensor in state.values()} == {"meta"}


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
def test_muons_owners_have_about_equal_work(ranks: int) -> None:
    matrices = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]  # of a layer of GPT-2
    work = [_work(torch.empty(shape, device="meta")) for _ in range(12) for shape in matrices]
    owners = share_evenly(work, ranks)
    loads = [sum(w for w, owner in zip(work, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert max(loads) <= 1.05 * sum(loads) / ranks


def test_muon_takes_the_steps_of_torchs_own() -> None:
    shapes = [(64, 32), (32, 64), (32, 32), (32, 32)]
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    muon = Muon([{"params": ours, "weight_decay": 0.1}], lr=0.02, momentum=0.95, dist=ALONE)
    oracle = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="original")
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        muon.step()
        oracle.step()
    for a, b in zip(ours, theirs, strict=True):
        # both orthogonalise in bfloat16; batched products round otherwise than single ones
        assert (a - b).norm() < 0.01 * (5 * 0.02 * math.sqrt(min(a.shape)))


def test_normuon_evens_out_a_neurons_history_and_keeps_the_size_of_the_update() -> None:
    torch.manual_seed(0)
    for shape in ((48, 32), (32, 48), (32, 32)):
        plain, even = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
        muon = Muon([plain], lr=1.0, momentum=0.9, dist=ALONE)
        normuon = Muon([even], lr=1.0, momentum=0.9, dist=ALONE, beta2=0.8)
        within = 1 if shape[0] >= shape[1] else 0
        squares = torch.zeros(shape).mean(within, keepdim=True)
        for step in range(4):
            plain.grad = torch.randn(shape)
            even.grad = plain.grad.clone()
            update, got = plain.detach().clone(), even.detach().clone()
            muon.step()
            normuon.step()
            update, got = update - plain.detach(), got - even.detach()
            squares = 0.8 * squares + 0.2 * update.square().mean(within, keepdim=True)
            wanted = update / squares.sqrt()
            assert torch.allclose(got, wanted * update.norm() / wanted.norm(), rtol=1e-3, atol=1e-6)
            if step == 0:  # no history yet: all neurons move alike
                sizes = got.norm(dim=within)
                assert sizes.max() / sizes.min() < 1.001


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_orthogonalised_matrices_have_singular_values_near_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape in ((3, 48, 16), (2, 16, 48)):
        orthogonal = orthogonalise(torch.randn(shape), dtype)
        assert orthogonal.dtype == dtype
        values = torch.linalg.svdvals(orthogonal.float())
        assert 0.6 < values.min() < values.max() < 1.3


def test_muon_multiplies_bfloat16_only_where_the_processor_does(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def noted(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        given.append(dtype)
        return orthogonalise(matrices, dtype)

    monkeypatch.setattr("gptcore.optim.orthogonalise", noted)
    for native in (True, False):
        monkeypatch.setattr("gptcore.optim.multiplies_bf16", lambda _, native=native: native)
        matrix = torch.nn.Parameter(torch.randn(4, 4))
        matrix.grad = torch.randn(4, 4)
        Muon([matrix], lr=0.02, momentum=0.95, dist=ALONE).step()
    assert given == [torch.bfloat16, torch.float32]


def test_a_muon_step_leaves_nothing_unmoved() -> None:
    model = randomised(tiny_model("qwen3"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = build_optimizers(model, OptimSpec(name="muon", lr=0.01), ALONE)
    set_lr(optimizers, 10, OptimSpec(name="muon", lr=0.01), 100)
    tokens = torch.randint(0, 96, (2, 16))
    model(tokens, tokens).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_update_divides_gradients_as_clipping_before_it_does(name: str) -> None:
    optim = OptimSpec.model_validate({"name": name, "lr": 0.01, "muon_beta2": 0.9})
    one, other = (randomised(tiny_model("qwen3")) for _ in range(2))
    theirs, ours = (build_optimizers(model, optim, ALONE) for model in (one, other))
    tokens = torch.randint(0, 96, (2, 16))
    for model, optimizers in ((one, theirs), (other, ours)):
        set_lr(optimizers, 0, optim, 10)
        model(tokens, tokens).backward()
    norm = torch.nn.utils.clip_grad_norm_(one.parameters(), 0.5)
    assert norm > 1
    update(theirs, None)
    update(ours, norm / 0.5)
    assert all(p.grad is None for p in other.parameters())
    clipped, divided = optimizer_tensors(one, theirs, ALONE), optimizer_tensors(other, ours, ALONE)
    assert clipped.keys() == divided.keys()
    for key, state in clipped.items():
        rounded = key.endswith("mean_squares")  # they come after products in bfloat16
        torch.testing.assert_close(divided[key], state, rtol=0.02 if rounded else 1e-4, atol=1e-12)
