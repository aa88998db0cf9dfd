"""A model as evaluations see it: text to tokens, tokens to logits. Ours, or any that `transformers` loads."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from gptcore.model import GPT
from gptcore.plan import LOSS_CHUNK_ELEMENTS
from gptcore.presets import shown
from gptcore.spec import refusal
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


def load_encode(folder: Path, pointer: str, special: bool = False) -> Callable[[str], list[int]]:
    """Return a Hub folder's own text-to-tokens function. Raises SpecError if stock `transformers` cannot load it.

    special: with the tokens that the tokenizer puts around a text.
    """
    from transformers import AutoTokenizer

    with _files_at_fault(folder, pointer):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return lambda text: tokenizer.encode(text, add_special_tokens=special)


@contextmanager
def _files_at_fault(folder: Path, pointer: str) -> Iterator[None]:
    """Turn what `transformers` raises over files that it cannot load into a SpecError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, ImportError,
            RuntimeError, SafetensorError) as error:  # fmt: skip
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        message = f"transformers cannot load {folder}: {type(error).__name__}: {shown(str(error))}"
        raise refusal(pointer, message) from error


def load_model(name: Path | str, dtype: torch.dtype | str) -> Any:
    """Return a stock `transformers` model. Its errors pass: OSError, ValueError, ...

    Both switches are given outright: a config may ask for code of its repository, or for a kernel from the Hub.
    """
    from transformers import AutoModelForCausalLM

    load = partial(AutoModelForCausalLM.from_pretrained, name, dtype=dtype, trust_remote_code=False)
    try:
        return load(attn_implementation="sdpa")
    except ValueError:  # an architecture without it
        return load(attn_implementation="eager")


def score_folder(folder: Path, device: torch.device) -> Scorer:
    """Return a Hub folder's model by stock `transformers` in float32. Raises SpecError if it cannot be loaded."""
    encode = load_encode(folder, "/source", special=True)
    with _files_at_fault(folder, "/source"):
        model = load_model(folder, torch.float32)
    model.to(device).eval()
    config = model.config

    def logits_at(tokens: Tensor, positions: Tensor, mask: Tensor | None, rows: Tensor, columns: Tensor) -> Tensor:
        assert mask is None
        return model(tokens).logits[rows, columns]

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten())

    return Scorer(
        encode, logits_at, loss, getattr(config, "max_position_embeddings", NO_LIMIT), config.vocab_size,
        packs=False, device=device,
    )  # fmt: skip
