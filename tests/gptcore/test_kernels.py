"""The CPU's products and attention give what torch's give."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore import kernels
from gptcore.kernels import causal_attention, linear


def with_gradients(output: Tensor, inputs: list[Tensor], towards: Tensor) -> list[Tensor]:
    return [output, *torch.autograd.grad(output, inputs, towards.to(output.dtype))]


has_onednn = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch has no oneDNN here")


@pytest.mark.parametrize("onednn", [False, pytest.param(True, marks=has_onednn)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_product_and_its_gradients_are_those_of_float64(
    compiled: bool, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "SMALLEST_PRODUCT", 0)
    monkeypatch.setattr(kernels, "ONEDNN", onednn)
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 33, 48), (80, 48), (80,)))
    towards = torch.randn(2, 33, 80)
    product = torch.compile(linear, dynamic=False) if compiled else linear
    got = with_gradients(product(x, weight, bias), [x, weight, bias], towards)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    wanted = with_gradients(F.linear(*exact), exact, towards)
    for mine, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)


def test_without_avx512_products_are_left_to_torch() -> None:
    code = "from gptcore import kernels; print(kernels.ONEDNN)"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True) == "False\n"


@pytest.mark.parametrize("onednn", [False, pytest.param(True, marks=has_onednn)])
def test_a_product_by_onednn_is_what_runs_where_it_is_the_faster(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(4, 16)
    monkeypatch.setattr(kernels, "SMALLEST_PRODUCT", 0)
    monkeypatch.setattr(kernels, "ONEDNN", onednn)
    with torch.autograd.profiler.profile() as ran:
        linear(x, weight, None)
    assert any("_linear_pointwise" in event.key for event in ran.key_averages()) == onednn
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, None).dtype == torch.bfloat16


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 4), (torch.bfloat16, 4)])
def test_compiled_attention_is_as_exact_as_torch_own(
    heads: int, key_heads: int, dtype: torch.dtype, factor: float
) -> None:
    torch.manual_seed(0)
    q, k, v = (  # 300 tokens: two full blocks and a part of one
        torch.randn(2, 300, n, 32).to(dtype).transpose(1, 2).requires_grad_() for n in (heads, key_heads, key_heads)
    )
    towards = torch.randn(2, heads, 300, 32)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    mine = with_gradients(torch.compile(causal_attention, dynamic=False)(q, k, v), [q, k, v], towards)
    torchs = with_gradients(reference(q, k, v), [q, k, v], towards)
    doubles = [t.detach().double().requires_grad_() for t in (q, k, v)]
    right = with_gradients(reference(*doubles), doubles, towards)
    for ours, theirs, exact in zip(mine, torchs, right, strict=True):
        assert ours.dtype == dtype
        assert (ours - exact).abs().max() <= factor * (theirs - exact).abs().max()


def test_a_small_head_that_is_not_compiled_attends_in_float32() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 64, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    towards = torch.randn(2, 4, 64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(causal_attention(q, k, v), [q, k, v], towards)
    doubles = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact = with_gradients(F.scaled_dot_product_attention(*doubles, is_causal=True), doubles, towards.bfloat16())
    for ours, right in zip(got, exact, strict=True):
        torch.testing.assert_close(ours, right.to(torch.bfloat16), rtol=2**-7, atol=1e-6)  # an ulp: rounded at the end


def test_a_small_head_in_float64_stays_in_float64() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16, 8, dtype=torch.float64) for _ in range(3))
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(causal_attention(q, k, v), exact, rtol=1e-12, atol=1e-12)
