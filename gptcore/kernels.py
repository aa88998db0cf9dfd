"""Matrix products and attention on a CPU, where torch's own are not the fastest that it brings.

Both are exact: what changes is the order of the sums. Measured in docs/benchmarks.md; on a GPU torch's own run.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.compiler.config
import torch.nn.functional as F
from torch import Tensor

# torch sends float32 products to MKL, which runs at half speed on AMD; oneDNN, in the same wheel, does not
ONEDNN = platform.machine() == "x86_64" and hasattr(torch.ops.mkldnn, "_linear_pointwise")
SMALLEST_PRODUCT = 2**24  # multiplications: under it, one more call costs what oneDNN saves
QUERY_BLOCK = 128  # rows of scores at once: they stay in the cache, and half of the masked part is never computed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, C), weight (O, C), bias (O,) → (…, O): what `F.linear` gives."""
    another = x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    if another or not ONEDNN or x.numel() * weight.shape[0] < SMALLEST_PRODUCT:
        return F.linear(x, weight, bias)
    return torch.ops.gptcore.product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, H, T, D), k and v (B, K, T, D) of one dtype, H a multiple of K → (B, H, T, D).

    Compiled on a CPU, by blocks of queries: the compiler makes one pass over the scores of what are ten eager ones.
    """
    if q.device.type == "cpu" and torch.compiler.is_compiling():
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        return torch.ops.gptcore.attention(q, k, v)[0]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


# --- the operators: the compiler takes what is inside as it is


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, C), weight (O, C), bias (O,) → (N, O) float32."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _product_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _keep_product(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    return (
        torch.ops.gptcore.product(grad, weight.t(), None) if ctx.needs_input_grad[0] else None,
        torch.ops.gptcore.product(grad.t(), x.t(), None) if ctx.needs_input_grad[1] else None,
        grad.sum(0) if ctx.has_bias else None,
    )


@torch.compile(dynamic=False)  # by itself: in the model's compilation twelve layers of it would take minutes
def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """→ output (B, H, T, D), log_sum (B, K, H/K, T, 1) float32: of each row, kept for the gradient instead of the
    scores (Dao et al. 2022)."""
    outputs, log_sums = [], []
    for rows in _blocks(q):
        scores = _scores(q, k, rows)
        largest = scores.amax(-1, keepdim=True)
        weights = (scores - largest).exp()
        total = weights.sum(-1, keepdim=True)
        output = _rows_times(weights.to(q.dtype), v[:, :, : rows.stop]) / total  # fewer divisions than of the weights
        outputs.append(output.to(q.dtype).flatten(1, 2))
        log_sums.append(largest + total.log())
    return _as_heads(torch.cat(outputs, 2)), torch.cat(log_sums, 3)


def _attention_shape(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, H, T, _ = q.shape
    K = k.shape[1]
    return _empty_heads(q), q.new_empty(B, K, H // K, T, 1, dtype=torch.float32)


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _attention_gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.gptcore.attention_backward(grad, *ctx.saved_tensors)


@torch.compile(dynamic=False)
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    scale = q.shape[3] ** -0.5
    shared = _grouped((grad.float() * output.float()).sum(-1, keepdim=True), k)
    grads_q, grads_k, grads_v = [], [], []
    for rows in _blocks(q):
        seen = slice(rows.stop)
        weights = (_scores(q, k, rows) - log_sum[:, :, :, rows]).exp()
        grad_rows = _grouped(grad[:, :, rows], k)
        grad_weights = _rows_times(grad_rows, v[:, :, seen].mT).float()
        grad_scores = (weights * (grad_weights - shared[:, :, :, rows]) * scale).to(q.dtype)
        grads_q.append(_rows_times(grad_scores, k[:, :, seen]).flatten(1, 2))
        grads_k.append(grad_scores.flatten(2, 3).mT @ _grouped(q[:, :, rows], k).flatten(2, 3))
        grads_v.append(weights.to(q.dtype).flatten(2, 3).mT @ grad_rows.flatten(2, 3))
    return _as_heads(torch.cat(grads_q, 2)), _summed(grads_k), _summed(grads_v)


def _summed(grads: list[Tensor]) -> Tensor:
    """Of each block of queries the gradient of the keys that it saw (B, K, seen, D) → of all keys (B, K, T, D)."""
    sums = [
        functools.reduce(torch.add, [grad[:, :, block].float() for grad in grads[number:]])
        for number, block in enumerate(_blocks(grads[-1]))
    ]
    return _as_heads(torch.cat(sums, 2).to(grads[0].dtype))


def _attention_backward_shape(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_heads(q), _empty_heads(k), _empty_heads(v)


def _blocks(q: Tensor) -> list[slice]:
    T = q.shape[2]
    return [slice(first, min(first + QUERY_BLOCK, T)) for first in range(0, T, QUERY_BLOCK)]


def _scores(q: Tensor, k: Tensor, rows: slice) -> Tensor:
    """The scaled scores of some queries, -inf where a query may not look: (B, K, G, rows, rows.stop) float32."""
    scores = _rows_times(_grouped(q[:, :, rows], k), k[:, :, : rows.stop].mT).float() * q.shape[3] ** -0.5
    query, key = torch.arange(rows.start, rows.stop, device=q.device), torch.arange(rows.stop, device=q.device)
    return scores.masked_fill(query[:, None] < key, float("-inf"))


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """x (B, H, …) → (B, K, H/K, …): the query heads that share a key head are rows of one product."""
    return x.unflatten(1, (k.shape[1], -1))


def _rows_times(x: Tensor, matrix: Tensor) -> Tensor:
    """x (B, K, G, rows, N), matrix (B, K, N, M) → (B, K, G, rows, M)."""
    return (x.flatten(2, 3) @ matrix).unflatten(2, x.shape[2:4])


def _as_heads(x: Tensor) -> Tensor:
    """x (B, H, T, D), each token's heads side by side in memory, as the next product wants them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_heads(x: Tensor) -> Tensor:
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _on_values(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator on tensors without a history: what compiles itself would look for one."""
    return lambda *given: operator(*(t if t is None else t.detach() for t in given))


# torch keeps compiled graphs on the disk and does not know that they hold these operators' gradients
torch.compiler.config.cache_key_tag = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
_LIBRARY = torch.library.Library("gptcore", "DEF")
_LIBRARY.define("product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.define("attention(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
_LIBRARY.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor output, Tensor log_sum)"
    " -> (Tensor, Tensor, Tensor)"
)
for name, on_cpu, shape in (
    ("product", _product, _product_shape),
    ("attention", _attention, _attention_shape),
    ("attention_backward", _attention_backward, _attention_backward_shape),
):
    _LIBRARY.impl(name, _on_values(on_cpu), "CPU")
    torch.library.register_fake(f"gptcore::{name}", shape, lib=_LIBRARY)
torch.library.register_autograd("gptcore::product", _product_backward, setup_context=_keep_product, lib=_LIBRARY)
torch.library.register_autograd("gptcore::attention", _attention_gradients, setup_context=_keep_attention, lib=_LIBRARY)
