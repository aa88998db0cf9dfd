"""Model presets: four families at several sizes, as the explicit fields they expand into."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

FAMILIES: dict[str, dict[str, Any]] = {
    # Radford et al. 2019
    "gpt2": {
        "norm": "layernorm", "norm_eps": 1e-5, "position": "learned", "mlp": "gelu",
        "attention_bias": True, "mlp_bias": True, "qk_norm": False, "tie_embeddings": True,
    },
    # the GPT-2 variant this project grew from: RMSNorm, RoPE, GQA, SwiGLU, attention biases
    "llama": {
        "norm": "rmsnorm", "norm_eps": 1e-5, "position": "rope", "mlp": "swiglu",
        "attention_bias": True, "mlp_bias": False, "qk_norm": False, "tie_embeddings": True,
    },
    "qwen3": {
        "norm": "rmsnorm", "norm_eps": 1e-6, "position": "rope", "mlp": "swiglu",
        "attention_bias": False, "mlp_bias": False, "qk_norm": True, "tie_embeddings": True,
    },
    # Karpathy's nanochat, as `NanoChatForCausalLM` holds it
    "nanochat": {
        "norm": "rmsnorm_plain", "norm_eps": 1e-6, "position": "rope", "rope_direction": "backward",
        "mlp": "relu2", "attention_bias": False, "mlp_bias": False, "qk_norm": True,
        "embed_norm": True, "logit_softcap": 15.0, "tie_embeddings": False, "init": "fan_in",
    },
}  # fmt: skip

# size: (n_layer, n_embd, n_head, block_size); nanochat's heads are 128 wide
_SIZES = {
    "tiny": (4, 192, 6, 256),
    "124m": (12, 768, 12, 1024),
    "350m": (24, 1024, 16, 1024),
    "774m": (36, 1280, 20, 1024),
    "1558m": (48, 1600, 25, 1024),
}


def _preset(family: str, size: str) -> dict[str, Any]:
    n_layer, n_embd, n_head, block_size = _SIZES[size]
    if family == "nanochat":
        n_head = max(n_embd // 128, 2)
    grouped = family in ("llama", "qwen3")
    n_hidden = -(-(8 * n_embd // 3) // 256) * 256 if grouped else 4 * n_embd
    return FAMILIES[family] | {
        "n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "block_size": block_size,
        "n_kv_head": n_head // 2 if grouped else n_head,
        "head_dim": n_embd // n_head, "n_hidden": n_hidden,
    }  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    f"{family}-{size}": _preset(family, size)
    for family in FAMILIES
    for size in _SIZES
    if family == "gpt2" or size in ("tiny", "124m", "350m")
}


def closest(word: str, known: Iterable[str]) -> str:
    """The end of a refusal: the nearest known words, or all when none is near."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(sorted(known))}"
