"""Validation loss, always over the same tokens."""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gptcore.data import Windows
from gptcore.dist import Dist
from gptcore.failure import Interrupted
from gptcore.loss import IGNORED
from gptcore.tokenizer import load_tokenizer

LossFunction = Callable[[Tensor, Tensor], Tensor]  # tokens, targets (B, T) → mean loss ()


def val_windows(windows: Windows, eval_tokens: int) -> int:
    """How many windows from the split's start are evaluated: about `eval_tokens`, at least one."""
    return max(1, min(windows.count, eval_tokens // windows.block_size))


def validation_loss(
    loss_of: LossFunction, windows: Windows, eval_tokens: int, micro_batch_size: int, dist: Dist,
    is_stopped: Callable[[], bool] = lambda: False,
) -> float:  # fmt: skip
    """Mean loss in nats a token over the first windows of the split, shared by the ranks.

    All batches have one shape (the last is padded with targets that do not count), so a compiled
    `loss_of` is never compiled again.

    is_stopped: asked between batches. If it is true on any rank, all raise Interrupted together.
    """
    count = val_windows(windows, eval_tokens)
    mine = np.arange(dist.rank, count, dist.world_size)
    total = torch.zeros(3, dtype=torch.float64, device=dist.device)  # loss · windows, windows, ranks that stopped
    for start in range(0, len(mine), micro_batch_size):
        if is_stopped():
            total[2] = 1
            break
        indices = mine[start : start + micro_batch_size]
        tokens, targets = windows.read(indices)
        missing = micro_batch_size - len(indices)
        if missing:
            tokens = torch.cat((tokens, tokens.new_zeros(missing, windows.block_size)))
            targets = torch.cat((targets, targets.new_full((missing, windows.block_size), IGNORED)))
        loss = loss_of(tokens.to(dist.device), targets.to(dist.device))
        total[0] += loss.detach().double() * len(indices)
        total[1] += len(indices)
    loss_sum, windows_seen, stopped = dist.sum(total).tolist()
    if stopped:
        raise Interrupted
    return float(loss_sum / windows_seen)


def bits_per_byte(val_loss: float, windows: Windows, eval_tokens: int, tokenizer: str) -> float:
    """Return a loss that compares across tokenizers: nats per token → bits per byte of the text that was evaluated."""
    count = val_windows(windows, eval_tokens)
    return val_loss * count * windows.block_size / (math.log(2) * max(1, _target_bytes(windows, count, tokenizer)))


@lru_cache(8)  # a run evaluates the same windows each time
def _target_bytes(windows: Windows, count: int, tokenizer: str) -> int:
    """Return the bytes of text of the targets of the first `count` windows."""
    lengths, total = load_tokenizer(tokenizer).token_bytes(), 0
    for start in range(0, count, 256):
        targets = windows.read(np.arange(start, min(count, start + 256)))[1].numpy()
        total += int(lengths[targets].sum())
    return total
