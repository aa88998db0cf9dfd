"""First weights from elsewhere: another run's checkpoint, or a folder that `transformers` wrote.

The reverse of `gptcore.export`: importing and exporting gives back the same tensors.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gptcore.checkpoint import Checkpoint, best_checkpoint, list_checkpoints
from gptcore.export import VOCAB_TABLES
from gptcore.failure import Unavailable
from gptcore.native import CLASSES, config_fields, native_tensors
from gptcore.plan import refuse_another_run, refuse_another_shape
from gptcore.rundir import RunDir
from gptcore.spec import InitSpec, ModelSpec, TrainSpec, refusal

_HUB_PREFIX = "hf://"


@dataclass(frozen=True)
class Origin:
    """Weights by our names; a checkpoint too where the optimiser's state is wanted."""

    weights: dict[str, Tensor]
    checkpoint: Checkpoint | None


def load_origin(spec: TrainSpec, init: InitSpec, runs: Path) -> Origin:
    """What `init`, the spec's `init_from`, names. Raises SpecError where it is not there or is of another shape."""
    folder = locate(init.source, runs, "/init_from/source")
    if (folder / "config.json").is_file():
        if init.optimizer:
            raise _refusal(f"{init.source} is a Hub folder, which has no optimiser state; leave optimizer out")
        config = json.loads((folder / "config.json").read_text())
        refuse_another_shape(init.source, spec.model, fields_of_config(config))
        return Origin(import_weights(spec.model, _safetensors(folder)), None)
    checkpoints = list_checkpoints(RunDir(folder))
    if not checkpoints:
        raise _refusal(f"{init.source} has neither config.json nor a complete checkpoint in {folder}")
    newest = checkpoints[-1]
    chosen = newest if init.optimizer else best_checkpoint(RunDir(folder), newest.state()) or newest
    refuse_another_run(spec, init, chosen.meta()["spec"], chosen.step)
    return Origin(chosen.weights(), chosen if init.optimizer else None)


def locate(source: str, runs: Path, pointer: str) -> Path:
    """The folder of a job's id, of a path in the runs root, or fetched from the Hub: hf://owner/name@revision."""
    if source.startswith(_HUB_PREFIX):
        import httpx2
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

        repo, _, revision = source.removeprefix(_HUB_PREFIX).partition("@")
        wanted = ["*.json", "*.safetensors", "merges.txt", "tokenizer.model"]
        try:
            return Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted))
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise refusal(pointer, f"{source} is not on the Hub, or HF_TOKEN may not read it: {error}") from error
        except (LocalEntryNotFoundError, httpx2.TransportError) as error:
            raise Unavailable(f"the Hub does not give {source}: {error}") from error
    folder = (runs / source).resolve()
    if not folder.is_relative_to(runs.resolve()) or not folder.is_dir():
        message = f"{source} is no folder of {runs}; give a job's id, a folder there, or hf://owner/name"
        raise refusal(pointer, message)
    return folder


_refusal = partial(refusal, "/init_from/source")
# keys of a config.json, and what they may say
_OTHERWISE_ANOTHER_FUNCTION: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "rope_type": ("default",), "type": ("default",),
    "partial_rotary_factor": (1.0,), "use_sliding_window": (False,), "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}  # fmt: skip


def _safetensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    if not tensors:
        raise _refusal(f"{folder} holds no *.safetensors; convert the weights with transformers' save_pretrained")
    return tensors


def fields_of_config(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a ModelSpec that a native class's config.json fixes."""
    architecture = (config.get("architectures") or ["not said"])[0]
    if architecture not in CLASSES:
        raise _refusal(f"its class is {architecture}; those that can be imported are {', '.join(CLASSES)}")
    # where transformers 5 keeps rope_theta, and where both keep what they do to the angles
    config = config | (config.get("rope_parameters") or {}) | (config.get("rope_scaling") or {})
    activation = {"swiglu": "silu", "relu2": "relu2"}.get(CLASSES[architecture]["mlp"])
    for key, ours in (_OTHERWISE_ANOTHER_FUNCTION | {"hidden_act": (activation,)}).items():
        if config.get(key) not in (None, *ours):
            raise _refusal(f"its {key} is {config[key]!r}, which no model here computes; wanted {ours[0]!r}")
    names = config_fields(architecture)
    found = {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}
    if wrong := [field for field, value in CLASSES[architecture].items() if found.get(field, value) != value]:
        raise _refusal(f"its {wrong[0]} is {found[wrong[0]]!r}, with which no {architecture} can be held here")
    # left out, a field is what transformers takes for it
    absent = {"tie_embeddings": True, "n_hidden": 4 * found["n_embd"]} if architecture == "GPT2LMHeadModel" else {
        "tie_embeddings": False, "head_dim": found["n_embd"] // found["n_head"], "rope_theta": 10_000.0,
        "n_kv_head": found["n_head"], "norm_eps": 1e-6,
        "attention_bias": False, "mlp_bias": config.get("mlp_bias", False),
        "logit_softcap": config.get("final_logit_softcapping"),
    }  # fmt: skip
    return absent | CLASSES[architecture] | found


def import_weights(model: ModelSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A native class's tensors by our names, float32, the vocabulary padded with zeros."""
    tensors = {name.removeprefix("transformer."): tensor.float() for name, tensor in tensors.items()}
    out: dict[str, Tensor] = {}
    for native in native_tensors(model):
        tensor = tensors[native.name.removeprefix("transformer.")]
        tensor = tensor.t() if native.turned else tensor
        out |= dict(zip(native.ours, tensor.chunk(len(native.ours)), strict=True))
    for table in VOCAB_TABLES:
        if table in out:
            padding = model.padded_vocab_size - len(out[table])
            out[table] = torch.cat((out[table], out[table].new_zeros(padding, model.n_embd)))
    return out
