"""Which stock `transformers` class holds a model exactly, decided before anything is trained."""

import json
from dataclasses import dataclass
from typing import Any

from gptcore.spec import ModelSpec

# For each class: what every switch must be. A switch that is absent may be anything.
CLASSES: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {
        "norm": "layernorm", "position": "learned", "mlp": "gelu",
        "attention_bias": True, "mlp_bias": True, "qk_norm": False,
        "embed_norm": False, "logit_softcap": None,
    },
    "LlamaForCausalLM": {
        "norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "qk_norm": False,
        "embed_norm": False, "logit_softcap": None, "rope_direction": "forward",
    },
    # vLLM's Qwen3 drops the output bias silently, so QK-norm with biases is not offered
    "Qwen3ForCausalLM": {
        "norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "qk_norm": True,
        "attention_bias": False, "mlp_bias": False, "embed_norm": False,
        "logit_softcap": None, "rope_direction": "forward",
    },
    "NanoChatForCausalLM": {
        "norm": "rmsnorm_plain", "position": "rope", "mlp": "relu2", "qk_norm": True,
        "attention_bias": False, "mlp_bias": False, "embed_norm": True,
        "rope_direction": "backward",
    },
}  # fmt: skip


def native_class(model: ModelSpec) -> tuple[str | None, str]:
    """The class's name and "", or None and the reason: the switches that part it from the nearest."""
    best: tuple[int, str, list[str]] | None = None
    for name, switches in CLASSES.items():
        wrong = [
            # as JSON spells it, which is how the user wrote it
            f"{field} {json.dumps(getattr(model, field))} (it has {json.dumps(needed)})"
            for field, needed in switches.items()
            if getattr(model, field) != needed
        ]
        wrong += _shape_limits(name, model)
        if not wrong:
            return name, ""
        if best is None or len(wrong) < best[0]:
            best = (len(wrong), name, wrong)
    assert best is not None
    return None, f"nearest is {best[1]}, which cannot hold {'; '.join(best[2])}"


def _shape_limits(name: str, model: ModelSpec) -> list[str]:
    limits = []
    if model.norm_placement != "pre":
        limits.append('norm_placement "post" (it has "pre")')
    if name in ("GPT2LMHeadModel", "NanoChatForCausalLM") and model.head_dim * model.n_head != model.n_embd:
        limits.append(f"head_dim {model.head_dim} other than n_embd / n_head {model.n_embd / model.n_head:g}")
    if name == "LlamaForCausalLM" and model.n_embd % model.n_head:
        limits.append(f"n_head {model.n_head}, of which n_embd {model.n_embd} is no multiple")
    if name == "GPT2LMHeadModel" and model.n_kv_head != model.n_head:
        limits.append(f"n_kv_head {model.n_kv_head} other than n_head {model.n_head}")
    return limits


def native_config(model: ModelSpec, tokenizer: str) -> dict[str, Any]:
    """`config.json` of the native class, readable by transformers 4 and 5 alike.

    transformers 5 writes the rotation only as `rope_parameters`; 4.x then silently uses theta
    10,000, so both spellings are written. llama.cpp's converter needs `n_ctx` for GPT-2.
    """
    name, reason = native_class(model)
    assert name is not None, reason
    eot = {"bytes": 0, "gpt2": 50256}[tokenizer]
    config: dict[str, Any] = {theirs: getattr(model, ours) for theirs, ours in config_fields(name).items()}
    config |= {
        "architectures": [name], "bos_token_id": eot, "eos_token_id": eot, "use_cache": True,
        "initializer_range": 0.02,
    }  # fmt: skip
    if name == "GPT2LMHeadModel":
        return config | {
            "model_type": "gpt2", "n_ctx": model.block_size, "activation_function": "gelu_new",
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        }  # fmt: skip
    own: dict[str, tuple[str, dict[str, Any]]] = {
        "LlamaForCausalLM": ("llama", {"hidden_act": "silu", "mlp_bias": model.mlp_bias}),
        "Qwen3ForCausalLM": ("qwen3", {"hidden_act": "silu", "use_sliding_window": False}),
        "NanoChatForCausalLM": ("nanochat", {"hidden_act": "relu2", "final_logit_softcapping": model.logit_softcap}),
    }
    return config | own[name][1] | {
        "model_type": own[name][0], "rope_scaling": None, "attention_dropout": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
    }  # fmt: skip


def config_fields(name: str) -> dict[str, str]:
    """What a class's `config.json` calls the fields of a ModelSpec."""
    common = {"vocab_size": "vocab_size", "tie_word_embeddings": "tie_embeddings"}
    if name == "GPT2LMHeadModel":
        return common | {
            "n_positions": "block_size", "n_embd": "n_embd", "n_layer": "n_layer", "n_head": "n_head",
            "n_inner": "n_hidden", "layer_norm_epsilon": "norm_eps",
        }  # fmt: skip
    return common | {
        "hidden_size": "n_embd", "intermediate_size": "n_hidden", "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head", "head_dim": "head_dim",
        "max_position_embeddings": "block_size", "rms_norm_eps": "norm_eps", "rope_theta": "rope_theta",
        "attention_bias": "attention_bias",
    }  # fmt: skip


@dataclass(frozen=True)
class NativeTensor:
    """One tensor of the native class and ours that it holds, joined along the outputs."""

    name: str
    ours: tuple[str, ...]
    turned: bool = False  # GPT-2's Conv1D keeps (inputs, outputs)


def native_tensors(model: ModelSpec) -> list[NativeTensor]:
    """Every tensor of the class that holds `model`: the one table for export and import.

    GPT-2 goes without the `transformer.` prefix, as its own file does: MLX reads only that form. With a
    head of its own it keeps the prefix: transformers 4 takes the mixture for a damaged file.
    """
    name, reason = native_class(model)
    assert name is not None, reason
    return _gpt2_tensors(model) if name == "GPT2LMHeadModel" else _rotary_tensors(model)


def _gpt2_tensors(model: ModelSpec) -> list[NativeTensor]:
    prefix = "" if model.tie_embeddings else "transformer."
    found = [NativeTensor(f"{prefix}{table}", (table,)) for table in ("wte.weight", "wpe.weight")]
    found += [NativeTensor(f"{prefix}ln_f.{kind}", (f"final_norm.{kind}",)) for kind in ("weight", "bias")]
    if not model.tie_embeddings:
        found.append(NativeTensor("lm_head.weight", ("lm_head.weight",)))
    modules = {
        "attn.c_attn": ("attn.q", "attn.k", "attn.v"), "attn.c_proj": ("attn.o",), "mlp.c_fc": ("mlp.up",),
        "mlp.c_proj": ("mlp.down",), "ln_1": ("attn_norm",), "ln_2": ("mlp_norm",),
    }  # fmt: skip
    for i in range(model.n_layer):
        for theirs, ours in modules.items():
            for kind in ("weight", "bias"):
                turned = kind == "weight" and not theirs.startswith("ln")
                names = tuple(f"blocks.{i}.{x}.{kind}" for x in ours)
                found.append(NativeTensor(f"{prefix}h.{i}.{theirs}.{kind}", names, turned))
    return found


def _rotary_tensors(model: ModelSpec) -> list[NativeTensor]:
    """Llama, Qwen3 and NanoChat: one naming, but for NanoChat's MLP."""
    gained = model.norm == "rmsnorm"
    found = [NativeTensor("model.embed_tokens.weight", ("wte.weight",))]
    found += [NativeTensor("model.norm.weight", ("final_norm.weight",))] if gained else []
    found += [] if model.tie_embeddings else [NativeTensor("lm_head.weight", ("lm_head.weight",))]
    modules = {f"attn.{x}": f"self_attn.{x}_proj" for x in "qkvo"}
    modules |= {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"} if model.mlp == "relu2" else {
        "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"
    }  # fmt: skip
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    norms |= {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"} if model.qk_norm else {}
    for i in range(model.n_layer):
        for ours, theirs in (modules | (norms if gained else {})).items():
            biased = model.attention_bias if ours.startswith("attn.") else model.mlp_bias
            for kind in ("weight", "bias") if biased and ours in modules else ("weight",):
                found.append(NativeTensor(f"model.layers.{i}.{theirs}.{kind}", (f"blocks.{i}.{ours}.{kind}",)))
    return found
