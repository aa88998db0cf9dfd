"""The output matrix and the cross-entropy in one: a step's largest tensors by far, never whole."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore.kernels import linear
from gptcore.plan import GPU_LOSS_CHUNK_ELEMENTS, LOSS_CHUNK_ELEMENTS

IGNORED = -100  # a target that counts for nothing: padding of a last, partial batch


def logits_of(products: Tensor, vocab_size: int, softcap: float | None) -> Tensor:
    """products (…, V) of the output matrix → logits (…, vocab_size) float32: softcapped, the padding cut off."""
    logits = products[..., :vocab_size].float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, softcap: float | None) -> Tensor:
    """hidden (N, C), weight (V, C), targets (N,) int64 → mean cross-entropy () float32 over the targets not IGNORED.

    A chunk's products are used up at once, for its loss and for its gradients: kept, they would fill the memory,
    and made again for the backward pass they would cost a tenth of GPT-2's multiplications.
    """
    settings = vocab_size, softcap, torch.is_grad_enabled(), torch.compiler.is_compiling()
    return in_graph(hidden, weight, targets, *settings)


def in_graph(*given: Any) -> Tensor:
    """Dynamo does not follow gradients that are asked for inside, and is told so by `compile_loss`; the rest of the
    compiler does."""
    loss: Tensor = _HeadLoss.apply(*given)
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor,
        vocab_size: int, softcap: float | None, train: bool, compiling: bool,
    ) -> Tensor:  # fmt: skip
        summed_loss = _compiled_loss if compiling else _eager_loss
        total = torch.zeros((), device=hidden.device)
        grads_hidden: list[Tensor] = []
        grad_weight: Tensor | None = None
        for part, wanted in zip(*(of.split(_rows(hidden, weight)) for of in (hidden, targets)), strict=True):
            with torch.set_grad_enabled(train):
                products = linear(part, weight, None).detach().requires_grad_(train)
                loss = summed_loss(products, wanted, vocab_size, softcap)
            total = total + loss.detach()
            if train:
                (grad,) = torch.autograd.grad(loss, products)
                grads_hidden.append(linear(grad, weight.t(), None))
                grad_part = linear(grad.t(), part.t(), None).to(weight.dtype)
                grad_weight = grad_part if grad_weight is None else grad_weight + grad_part
        count = (targets != IGNORED).sum()
        if train:
            ctx.save_for_backward(torch.cat(grads_hidden).to(hidden.dtype), grad_weight, count)
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, count = ctx.saved_tensors
        share = grad / count
        return grad_hidden * share, grad_weight * share, None, None, None, None, None


def _rows(hidden: Tensor, weight: Tensor) -> int:
    """Of a chunk: halves of all rows until the products fit."""
    rows, most = hidden.shape[0], GPU_LOSS_CHUNK_ELEMENTS if hidden.is_cuda else LOSS_CHUNK_ELEMENTS
    while rows > 1 and rows * weight.shape[0] > most:
        rows = (rows + 1) // 2
    return rows


def _eager_loss(products: Tensor, targets: Tensor, vocab_size: int, softcap: float | None) -> Tensor:
    """products (N, V), targets (N,) → the sum () over the targets that are not IGNORED."""
    logits = logits_of(products, vocab_size, softcap)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def _compiled_loss(products: Tensor, targets: Tensor, vocab_size: int, softcap: float | None) -> Tensor:
    """The same as the compiler makes two passes of it, one of them the gradient.

    The padding is masked and not cut off, which would leave rows that are no multiple of a vector and be undone by a
    pass of its own. F.cross_entropy's gradient would sum up each row to learn that it is -1.
    """
    logits = logits_of(products, products.shape[-1], softcap)
    padding = torch.arange(products.shape[-1], device=products.device) >= vocab_size
    logits = logits.masked_fill(padding, float("-inf"))
    shifted = logits - logits.amax(-1, keepdim=True).detach()
    log_sums = shifted.exp().sum(-1, keepdim=True).log().squeeze(-1)
    total = torch.where(targets == IGNORED, 0.0, log_sums).sum()
    return total + F.nll_loss(shifted, targets, ignore_index=IGNORED, reduction="sum")
