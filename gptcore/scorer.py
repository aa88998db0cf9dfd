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
from torch import Tensor

from gptcore.failure import may_pass
from gptcore.model import GPT
from gptcore.plan import LOSS_CHUNK_ELEMENTS
from gptcore.spec import SpecError, refusal
from gptcore.tokenizer import PROBE, Tokenizer

BATCH_TOKENS = 16_384
PROBE_TOKENS = 8
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

    with files_at_fault(f"transformers cannot load {folder}", pointer):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return lambda text: tokenizer.encode(text, add_special_tokens=special)


@contextmanager
def files_at_fault(problem: str, pointer: str) -> Iterator[None]:
    """Turn what a library raises over files that it cannot use into a SpecError, "{problem}: …".

    Libraries raise anything over a hostile file, and Rust's raise a PanicException, which is not an Exception. What has
    another cause passes: a full or broken disk, a GPU without memory, the Hub.
    """
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        has_other_cause = isinstance(error, SpecError | torch.OutOfMemoryError) or (
            isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        )
        if has_other_cause or not (isinstance(error, Exception) or is_panic) or may_pass(error):
            raise
        raise refusal(pointer, f"{problem}: {type(error).__name__}: {_short(str(error))}") from error


def _short(text: str) -> str:
    """Return the text on one line, without its middle if it is long: files may put megabytes into a message."""
    line = " ".join(text[:10_000].split())
    return line if len(line) <= 400 else f"{line[:200]} … {line[-200:]}"


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
    with files_at_fault(f"transformers cannot load {folder}", "/source"):
        model = load_model(folder, torch.float32)
    model.to(device).eval()
    with files_at_fault(f"{folder} holds no model of text that can be scored", "/source"):
        block_size = _whole(model.config, "max_position_embeddings", NO_LIMIT)
        vocab_size = _whole(model.config, "vocab_size")
        _try_out(model, encode(PROBE)[: min(block_size, PROBE_TOKENS)], vocab_size, device)

    def logits_at(tokens: Tensor, positions: Tensor, mask: Tensor | None, rows: Tensor, columns: Tensor) -> Tensor:
        assert mask is None
        return model(tokens).logits[rows, columns]

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten())

    return Scorer(
        encode, logits_at, loss, block_size, vocab_size, packs=False, device=device
    )  # fmt: skip


def _whole(config: Any, name: str, default: int | None = None) -> int:
    """Return a number of a config. Raises ValueError unless it is a whole one above 0."""
    value = getattr(config, name, default)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} in its config.json is {value!r}; wanted a whole number above 0")
    return value


@torch.no_grad()
def _try_out(model: Any, tokens: list[int], vocab_size: int, device: torch.device) -> None:
    """Raise an error if the model gives no logits (1, T, vocab_size) for a few tokens."""
    logits = model(torch.tensor([tokens], device=device)).logits
    if logits.shape != (1, len(tokens), vocab_size):
        raise ValueError(f"its logits have shape {tuple(logits.shape)}, not {(1, len(tokens), vocab_size)}")
