"""The Hub folder: weights, config and tokenizer of a stock `transformers` class. No custom code.

Our layers hold what the native classes hold, under other names: no weight is permuted. Padding of
the vocabulary is cut, a tied matrix is written once.
"""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE
from torch import Tensor

from gptcore.checkpoint import write_tensors
from gptcore.native import native_class, native_config, native_tensors
from gptcore.spec import ModelSpec
from gptcore.tokenizer import GPT2_EOT, gpt2_ranks

EOT_TEXT = "<|endoftext|>"
VOCAB_TABLES = ("wte.weight", "lm_head.weight")


def export_model(
    folder: Path, spec: ModelSpec, weights: dict[str, Tensor], tokenizer: str, dtype: torch.dtype = torch.float32
) -> str:
    """Write the folder whole (beside it first, then renamed); returns the native class's name."""
    name, reason = native_class(spec)
    assert name is not None, f"asked to export what no class holds: {reason}"
    beside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    tensors = {k: t.to(dtype).contiguous() for k, t in native_weights(spec, weights).items()}
    write_tensors(tensors, beside / "model.safetensors", {"format": "pt"})
    config = native_config(spec, tokenizer) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    _write_json(beside / "config.json", config)
    eot = config["eos_token_id"]
    _write_json(beside / "generation_config.json", {"bos_token_id": eot, "eos_token_id": eot, "do_sample": True})
    write_tokenizer(beside, tokenizer, spec.block_size)
    for path in beside.iterdir():
        path.chmod(0o644)  # another user may serve or upload it
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    return name


def native_weights(spec: ModelSpec, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors by the native class's names. weights: as in a checkpoint, float32."""
    out = {}
    for native in native_tensors(spec):
        tensor = torch.cat([weights[name] for name in native.ours])
        if native.ours[0] in VOCAB_TABLES:
            tensor = tensor[: spec.vocab_size]
        out[native.name] = tensor.t() if native.turned else tensor
    return out


def write_tokenizer(folder: Path, tokenizer: str, block_size: int) -> None:
    """tokenizer.json and tokenizer_config.json: GPT-2's BPE, or 256 bytes and no merges."""
    alphabet = byte_alphabet()
    if tokenizer == "gpt2":
        ranks = gpt2_ranks()
        vocab = {"".join(alphabet[b] for b in token): rank for token, rank in ranks.items()}
        merges = [("".join(alphabet[b] for b in left), "".join(alphabet[b] for b in right))
                  for left, right in merges_of(ranks)]  # fmt: skip
        vocab[EOT_TEXT] = GPT2_EOT
    else:
        # byte 0 stands between documents and in no text, so its place is the special token's: the
        # harness and others need one
        vocab, merges = {EOT_TEXT: 0} | {alphabet[b]: b for b in range(1, 256)}, []
    fast = FastTokenizer(BPE(vocab=vocab, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=tokenizer == "gpt2")
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(EOT_TEXT, special=True)])
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        "bos_token": EOT_TEXT, "eos_token": EOT_TEXT, "unk_token": EOT_TEXT, "pad_token": EOT_TEXT,
    }  # fmt: skip
    if tokenizer == "gpt2":
        config |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    fast.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", config)


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level BPE (Radford et al. 2019)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    stand_in = iter(range(256, 512))
    return [chr(b) if b in kept else chr(next(stand_in)) for b in range(256)]


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges a tiktoken rank table was made by: each token's last two parts, in rank order."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 2:
                joined = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
                at = min(range(len(joined)), key=joined.__getitem__)
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            merges.append((parts[0], parts[1]))
    return merges


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
