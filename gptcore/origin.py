"""First weights from elsewhere: another run's checkpoint, or a folder that `transformers` wrote.

The reverse of `gptcore.export`: importing and exporting gives back the same tensors.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from gptcore.checkpoint import Checkpoint, best_checkpoint, list_checkpoints
from gptcore.dataset import Tokenizer, tokenizer_of_checkpoint
from gptcore.export import VOCAB_TABLES
from gptcore.failure import Unavailable, may_pass
from gptcore.hub_client import prepare_hub_client
from gptcore.init_check import refuse_another_config, refuse_another_tokenizer, tokenizer_refusal
from gptcore.model import GPT
from gptcore.native import native_tensors
from gptcore.plan import refuse_another_run
from gptcore.rundir import RunDir, datasets_root
from gptcore.scorer import files_at_fault, load_encode
from gptcore.spec import HUB_PREFIX, InitSpec, ModelSpec, TrainSpec, refusal
from gptcore.tokenizer import PROBE, tokenizer_difference


@dataclass(frozen=True)
class Origin:
    """Weights by our names; a checkpoint too where the optimiser's state is wanted."""

    weights: dict[str, Tensor]
    checkpoint: Checkpoint | None


def load_origin(spec: TrainSpec, init: InitSpec, runs: Path, tokenizer: Tokenizer) -> Origin:
    """Return the weights that `init`, the spec's `init_from`, names; `tokenizer`: of the spec's dataset.

    Raises SpecError if they are not there, or are of another shape or tokenizer.
    """
    folder = locate(init.source, runs, "/init_from/source")
    if (folder / "config.json").is_file():
        if init.optimizer:
            raise _refusal(f"{init.source} is a Hub folder, which has no optimiser state; leave optimizer out")
        refuse_another_config(init.source, spec.model, (folder / "config.json").read_bytes())
        if difference := tokenizer_difference(_tokens_of_probe(init.source, folder), tokenizer):
            raise tokenizer_refusal(init.source, spec, difference, tokenizer)
        tensors = _safetensors(init.source, folder)
        _refuse_other_tensors(init.source, spec.model, tensors)
        return Origin(import_weights(spec.model, tensors), None)
    checkpoints = list_checkpoints(RunDir(folder))
    if not checkpoints:
        raise _refusal(f"{init.source} has neither config.json nor a complete checkpoint in {folder}")
    newest = checkpoints[-1]
    chosen = newest if init.optimizer else best_checkpoint(RunDir(folder), newest.state()) or newest
    meta = chosen.meta()
    refuse_another_run(spec, init, meta["spec"], chosen.step)
    refuse_another_tokenizer(init.source, tokenizer_of_checkpoint(datasets_root(), meta), spec, tokenizer)
    return Origin(chosen.weights(), chosen if init.optimizer else None)


def _tokens_of_probe(source: str, folder: Path) -> list[int]:
    """Return the tokens of PROBE by a Hub folder's own tokenizer. Raises SpecError if it has none that loads."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        way_out = "save its tokenizer there too, with transformers' save_pretrained"
        raise _refusal(f"{source} has no tokenizer to compare with the dataset's; {way_out}")
    return load_encode(folder, "/init_from/source")(PROBE)


def locate(source: str, runs: Path, pointer: str) -> Path:
    """Return the folder of a job's id, of a path in the runs root, or fetched from the Hub: hf://owner/name@revision."""
    if source.startswith(HUB_PREFIX):
        import httpx2
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

        try:
            prepare_hub_client()
        except ValueError as error:
            raise refusal(pointer, str(error)) from error
        repo, _, revision = source.removeprefix(HUB_PREFIX).partition("@")
        wanted = ["*.json", "*.safetensors", "merges.txt", "tokenizer.model"]
        try:
            return Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted))
        except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx2.TransportError) as error:
            raise Unavailable(f"the Hub does not give {source}: {error}") from error
        except HfHubHTTPError as error:
            if may_pass(error):
                raise Unavailable(f"the Hub does not give {source}: {error}") from error
            raise refusal(pointer, f"{source} is not on the Hub, or HF_TOKEN may not read it: {error}") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # a name or an answer that makes no sense
            raise refusal(pointer, f"the Hub's answer about {source} cannot be used: {error!r}") from error
    folder = (runs / source).resolve()
    if not folder.is_relative_to(runs.resolve()) or not folder.is_dir():
        message = f"{source} is no folder of {runs}; give a job's id, a folder there, or hf://owner/name"
        raise refusal(pointer, message)
    return folder


_refusal = partial(refusal, "/init_from/source")


def _safetensors(source: str, folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder, without GPT-2's prefix. Raises SpecError if there are none, or not readable."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with files_at_fault(f"{path.name} of {source} cannot be read", "/init_from/source"):
            tensors |= load_file(path)
    if not tensors:
        raise _refusal(f"{folder} holds no *.safetensors; convert the weights with transformers' save_pretrained")
    return {_plain(name): tensor for name, tensor in tensors.items()}


def _plain(name: str) -> str:
    return name.removeprefix("transformer.")


def _refuse_other_tensors(source: str, model: ModelSpec, tensors: dict[str, Tensor]) -> None:
    """Raise SpecError if a tensor is missing or has not the shape that config.json promises."""
    with torch.device("meta"):  # shapes alone, no memory
        ours = dict(GPT(model).named_parameters(remove_duplicate=False))
    problems = []
    for native in native_tensors(model):
        shapes = [list(ours[name].shape) for name in native.ours]
        if native.ours[0] in VOCAB_TABLES:
            shapes[0][0] = model.vocab_size or 0  # without our padding
        wanted = [sum(shape[0] for shape in shapes), *shapes[0][1:]]
        wanted = wanted[::-1] if native.turned else wanted
        found = tensors.get(_plain(native.name))
        if found is None:
            problems.append(f"{native.name} is missing")
        elif list(found.shape) != wanted:
            problems.append(f"{native.name} has shape {list(found.shape)}, not {wanted}")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise _refusal(f"the tensors of {source} are not those of its config.json: {'; '.join(problems[:3])}{more}")


def import_weights(model: ModelSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a native class's tensors by our names, float32, the vocabulary padded with zeros."""
    out: dict[str, Tensor] = {}
    for native in native_tensors(model):
        tensor = tensors[_plain(native.name)].float()
        tensor = tensor.t() if native.turned else tensor
        out |= dict(zip(native.ours, tensor.chunk(len(native.ours)), strict=True))
    for table in VOCAB_TABLES:
        if table in out:
            padding = model.padded_vocab_size - len(out[table])
            out[table] = torch.cat((out[table], out[table].new_zeros(padding, model.n_embd)))
    return out
