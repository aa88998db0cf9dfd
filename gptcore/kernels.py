"""Matrix products and attention on a CPU, where torch's own are not the fastest that it brings.

In float32 only the order of the sums changes; in bfloat16 the compiled attention rounds its scores too, which torch's
keeps in float32. Measured in docs/benchmarks.md; on a GPU torch's own run.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.compiler.config
import torch.nn.functional as F
from torch import Tensor

# torch sends float32 products to MKL. On AMD with AVX-512 that runs at half speed, and oneDNN, in the same wheel, does
# not; on AMD without it MKL is 1.2 to 1.7 times as fast as oneDNN
ONEDNN = "AVX512" in torch.backends.cpu.get_cpu_capability() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
SMALLEST_PRODUCT = 2**24  # multiplications: under it, one more call costs what oneDNN saves
SMALL_HEAD = 2**13  # positions times width: up to it torch's attention is slower in bfloat16 than in float32
BLOCK = 128  # positions: pairs of blocks that the mask hides whole are never computed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, C), weight (O, C), bias (O,) → (…, O): what `F.linear` gives."""
    another = x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    if another or not ONEDNN or x.numel() * weight.shape[0] < SMALLEST_PRODUCT:
        return F.linear(x, weight, bias)
    return torch.ops.gptcore.product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, H, T, D), k and v (B, K, T, D) of one dtype, H a multiple of K → (B, H, T, D).

    Compiled on a CPU, by blocks: the compiler makes one pass over the scores of what are ten eager ones.
    """
    if q.device.type == "cpu" and torch.compiler.is_compiling():
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        return torch.ops.gptcore.attention(q, k, v)[0]
    if q.device.type == "cpu" and q.shape[2] * q.shape[3] <= SMALL_HEAD:
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast("cpu", enabled=False):
            return _torch_attention(q.to(wide), k.to(wide), v.to(wide)).to(q.dtype)
    return _torch_attention(q, k, v)


def _torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


# --- the operators: the compiler takes what is inside as it is


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, C), weight (O, C), bias (O,) → (N, O) float32."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


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


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By itself: in the model's compilation twelve layers of it would take minutes. At its first call: what merely
    imports this would wait a second for the compiler."""
    compiled = functools.cache(lambda: torch.compile(function, dynamic=False))
    return lambda *given: compiled()(*given)


@_compiled
def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """→ output (B, H, T, D), log_sums (n, B·K, G·b, 1) float32: each row's log2 Σ 2^score, kept for the gradient
    instead of the scores (Dao et al. 2022).

    Each distance has a softmax of its own; the end brings them to one scale.
    """
    queries, keys, values = (_blocks(x, k.shape[1]) for x in (q, k, v))
    softmaxes = []
    for distance, late, early in _pairs(keys):
        scores = _scaled(queries[late] @ keys[early].mT, q)
        if distance == 0:
            scores = scores.unflatten(2, (-1, keys.shape[2])).masked_fill(_to_come(keys), float("-inf")).flatten(2, 3)
        largest = scores.amax(-1, keepdim=True)
        weights = torch.exp2(scores - largest)
        softmaxes.append((largest, weights.sum(-1, keepdim=True), weights.to(q.dtype) @ values[early]))
    n = len(keys)
    joined = [_joined([[part[block - d] for part in softmaxes[d]] for d in range(block + 1)]) for block in range(n)]
    return _heads([output for output, _ in joined], q), torch.stack([log_sum for _, log_sum in joined])


def _joined(softmaxes: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Of one block of queries, over some keys each: (largest score, sum of weights, output) → output, log_sum."""
    top = functools.reduce(torch.maximum, [largest for largest, _, _ in softmaxes])
    scales = [torch.exp2(largest - top) for largest, _, _ in softmaxes]
    total = _sum(scale * weights for scale, (_, weights, _) in zip(scales, softmaxes, strict=True))
    output = _sum(scale * output for scale, (_, _, output) in zip(scales, softmaxes, strict=True))
    return output / total, top + total.log2()


def _attention_shape(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    shape = _blocks(q, k.shape[1]).shape
    return _empty_heads(q), q.new_empty(*shape[:-1], 1, dtype=torch.float32)


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _attention_gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.gptcore.attention_backward(grad, *ctx.saved_tensors)


@_compiled
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores stand on their side here, keys by queries: of three gradients' products one then transposes, not two."""
    shared = _blocks((grad.float() * output.float()).sum(-1, keepdim=True), k.shape[1])
    grads, queries, keys, values = (_blocks(x, k.shape[1]) for x in (grad, q, k, v))
    grads_q, grads_k, grads_v = [], [], []
    for distance, late, early in _pairs(keys):
        scores = _scaled(keys[early] @ queries[late].mT, q)
        if distance == 0:
            to_come = _to_come(keys).T[:, None]
            scores = scores.unflatten(3, (-1, keys.shape[2])).masked_fill(to_come, float("-inf")).flatten(3, 4)
        weights = torch.exp2(scores - log_sums[late].mT)
        grad_weights = (values[early] @ grads[late].mT).float()
        grad_scores = (weights * (grad_weights - shared[late].mT) * q.shape[3] ** -0.5).to(q.dtype)
        grads_q.append(grad_scores.mT @ keys[early])
        grads_k.append(grad_scores @ queries[late])
        grads_v.append(weights.to(q.dtype) @ grads[late])
    n = len(keys)
    of_queries = [_sum(grads_q[d][block - d].float() for d in range(block + 1)) for block in range(n)]
    of_keys, of_values = (
        [_sum(x[d][block].float() for d in range(n - block)) for block in range(n)] for x in (grads_k, grads_v)
    )
    return _heads(of_queries, q), _heads(of_keys, k), _heads(of_values, v)


def _blocks(x: Tensor, kv_heads: int) -> Tensor:
    """x (B, H, T, D) → (n, B·K, G·b, D): n blocks of b positions, the G = H/K query heads of a key head as one's rows.

    Zeros fill the last block: keys that come after every query, queries without a gradient.
    """
    size = min(BLOCK, x.shape[2])
    x = F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size)).unflatten(1, (kv_heads, -1))
    return x.permute(3, 0, 1, 2, 4, 5).flatten(3, 4).flatten(1, 2).contiguous()


def _heads(blocks: list[Tensor], like: Tensor) -> Tensor:
    """What `_blocks` made → as `like` (B, H, T, D), each token's heads side by side, as the next product wants them."""
    B, H, T, D = like.shape
    x = torch.stack([block.to(like.dtype) for block in blocks])
    x = x.unflatten(2, (-1, min(BLOCK, T))).unflatten(1, (B, -1))  # (n, B, K, G, b, D)
    return x.permute(1, 0, 4, 2, 3, 5).reshape(B, -1, H, D)[:, :T].contiguous().transpose(1, 2)


def _pairs(blocks: Tensor) -> list[tuple[int, slice, slice]]:
    """(distance, blocks of queries, the blocks of keys as far before them): everything that queries may see."""
    return [(distance, slice(distance, None), slice(len(blocks) - distance)) for distance in range(len(blocks))]


def _to_come(keys: Tensor) -> Tensor:
    """(b, b), true where within its own block a key comes after a query; int32 for half the vectors of int64."""
    place = torch.arange(keys.shape[2], dtype=torch.int32)
    return place[:, None] < place


def _scaled(products: Tensor, q: Tensor) -> Tensor:
    """Queries times keys → scores float32, for powers of two: the compiler would keep an exponential that is used
    twice, and read it again."""
    return products.float() * (q.shape[3] ** -0.5 * math.log2(math.e))


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


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
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor output, Tensor log_sums)"
    " -> (Tensor, Tensor, Tensor)"
)
for name, on_cpu, shape in (
    ("product", _product, lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0])),
    ("attention", _attention, _attention_shape),
    ("attention_backward", _attention_backward, lambda grad, *qkv: tuple(map(_empty_heads, qkv[:3]))),
):
    _LIBRARY.impl(name, _on_values(on_cpu), "CPU")
    torch.library.register_fake(f"gptcore::{name}", shape, lib=_LIBRARY)
torch.library.register_autograd("gptcore::product", _product_backward, setup_context=_keep_product, lib=_LIBRARY)
torch.library.register_autograd("gptcore::attention", _attention_gradients, setup_context=_keep_attention, lib=_LIBRARY)
