"""Model presets: four families at several sizes, as the explicit fields they expand into."""

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

LONGEST_SHOWN = 80  # characters of a value in a message
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = LONGEST_SHOWN

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


_GROUPED = {"gpt2": 1, "llama": 2, "qwen3": 2, "nanochat": 1}  # query heads a key/value head


def _fill_derived(fields: dict[str, Any], grouped: int = 1) -> dict[str, Any]:
    """Fill n_kv_head, head_dim and n_hidden where they follow from other fields."""
    n_embd, n_head = fields.get("n_embd"), fields.get("n_head")
    if not (isinstance(n_embd, int) and isinstance(n_head, int) and n_embd > 0 and n_head > 0):
        return fields  # the field checks will say so
    fields.setdefault("n_kv_head", n_head if n_head % grouped else n_head // grouped)
    if "head_dim" not in fields:
        if n_embd % n_head:
            divisors = [h for h in range(1, min(n_embd, 512) + 1) if n_embd % h == 0]
            near = sorted(divisors, key=lambda h: abs(h - n_head))[:3]
            raise ValueError(
                f"n_embd {n_embd} is not divisible by n_head {n_head}; "
                f"use n_head {', '.join(map(str, sorted(near)))}, or set head_dim"
            )
        fields["head_dim"] = n_embd // n_head
    if "n_hidden" not in fields:
        swiglu = fields.get("mlp", "swiglu") == "swiglu"
        # 8/3 n_embd keeps a gated MLP's parameters at those of a plain one of 4 n_embd
        fields["n_hidden"] = -(-(8 * n_embd // 3) // 256) * 256 if swiglu else 4 * n_embd
    return fields


def _preset(family: str, size: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's fields with some that are given; widths follow those that they follow from."""
    n_layer, n_embd, n_head, block_size = _SIZES[size]
    if family == "nanochat":
        n_head = max(n_embd // 128, 2)
    shape = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "block_size": block_size}
    return _fill_derived(FAMILIES[family] | shape | dict(given), _GROUPED[family])


PRESETS: dict[str, dict[str, Any]] = {
    f"{family}-{size}": _preset(family, size, {})
    for family in FAMILIES
    for size in _SIZES
    if family == "gpt2" or size in ("tiny", "124m", "350m")
}


def expand(given: Mapping[str, Any]) -> dict[str, Any]:
    """A model's fields with those that its preset and its other fields imply. Raises ValueError."""
    preset = given.get("preset")
    if preset is None:
        return _fill_derived(dict(given))
    if not isinstance(preset, str) or preset not in PRESETS:
        near = closest(preset if isinstance(preset, str) else "", PRESETS)
        raise ValueError(f"preset {shown(preset)} is unknown; {near}")
    family, size = preset.split("-")
    # where a width that others follow from is none, theirs are the preset's: it alone is complained of
    return PRESETS[preset] | _preset(family, size, given)


def shown(value: object) -> str:
    """Return a value as a message shows it: at most LONGEST_SHOWN characters, without reading all of a large value."""
    text = _REPR.repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


def closest(word: str, known: Iterable[str]) -> str:
    """The end of a refusal: the nearest known words, or all when none is near."""
    known = list(known)
    near = difflib.get_close_matches(word[:LONGEST_SHOWN], known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(sorted(known))}"
