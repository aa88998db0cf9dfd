"""A model as evaluations see it: text to tokens, tokens to logits. Ours, or any that `transformers` loads."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore.model import GPT
from gptcore.plan import LOSS_CHUNK_ELEMENTS
from gptcore.tokenizer import Tokenizer

BATCH_TOKENS = 16_384
NO_LIMIT = 2048  # tokens, of a model that could take any number


@dataclass(frozen=True)
class Scorer:
    """`logits_at`: tokens, positions (B, T), mask (B, 1, T, T) or None, rows, columns (N,) → logits (N, V)
    float32 at those places. `packs`: it heeds positions and mask."""

    encode: Callable[[str], list[int]]
    logits_at: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]  # tokens, targets (B, T) → mean ()
    block_size: int
    vocab_size: int
    packs: bool
    device: torch.device

    @property
    def most_tokens(self) -> int:
        """Of a batch: as many as leave the logits room."""
        return min(BATCH_TOKENS, LOSS_CHUNK_ELEMENTS // self.vocab_size)


def score_ours(model: GPT, tokenizer: Tokenizer, device: torch.device) -> Scorer:
    def logits_at(tokens: Tensor, positions: Tensor, mask: Tensor | None, rows: Tensor, columns: Tensor) -> Tensor:
        return model.head(model.hidden(tokens, positions, mask)[rows, columns])

    spec = model.spec
    assert spec.vocab_size is not None
    return Scorer(
        lambda text: tokenizer.encode(text).tolist(), logits_at, model, spec.block_size, spec.vocab_size,
        packs=True, device=device,
    )  # fmt: skip


def score_folder(folder: Path, device: torch.device) -> Scorer:
    """A Hub folder by stock `transformers` in float32. Raises its errors: OSError and ValueError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device).eval()
    config = model.config

    def logits_at(tokens: Tensor, positions: Tensor, mask: Tensor | None, rows: Tensor, columns: Tensor) -> Tensor:
        assert mask is None
        return model(tokens).logits[rows, columns]

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten())

    return Scorer(
        tokenizer.encode, logits_at, loss, getattr(config, "max_position_embeddings", NO_LIMIT), config.vocab_size,
        packs=False, device=device,
    )  # fmt: skip
