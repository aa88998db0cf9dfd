"""The model that an eval or publish job is about: a job's checkpoint, or a Hub folder."""

from dataclasses import dataclass
from pathlib import Path

import torch

from gptcore.checkpoint import Checkpoint, best_checkpoint, list_checkpoints, set_weights
from gptcore.dataset import tokenizer_of_checkpoint
from gptcore.events import Evaluated
from gptcore.model import GPT
from gptcore.origin import locate
from gptcore.rundir import RunDir
from gptcore.scorer import Scorer, score_folder, score_ours
from gptcore.spec import SourceModel, TrainSpec, parse_spec, refusal
from gptcore.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Trained:
    """A train job's checkpoint."""

    run: RunDir
    checkpoint: Checkpoint
    spec: TrainSpec
    tokenizer: str

    def val_loss(self) -> float | None:
        """What training reported of this step; None where it was not evaluated."""
        of_step = [e.val_loss for e in self.run.events() if isinstance(e, Evaluated) and e.step == self.checkpoint.step]
        return of_step[-1] if of_step else None

    def scorer(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Scorer:
        """The trainer's own model in float32, on weights rounded to `dtype` as an export has them."""
        model = GPT(self.spec.model).to(device).eval()
        set_weights(model, self.checkpoint.weights(), dtype)
        return score_ours(model, load_tokenizer(self.tokenizer), device)


@dataclass(frozen=True)
class HubFolder:
    path: Path

    def scorer(self, device: torch.device) -> Scorer:
        return score_folder(self.path, device)


def find_subject(asked: SourceModel, runs: Path, datasets: Path) -> Trained | HubFolder:
    """Raises SpecError where there is no such model."""
    folder = locate(asked.source, runs, "/source")
    if (folder / "config.json").is_file():
        return HubFolder(folder)
    run = RunDir(folder)
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise refusal("/source", f"{asked.source} has neither config.json nor a complete checkpoint")
    if asked.step is None:
        chosen = best_checkpoint(run, checkpoints[-1].state()) or checkpoints[-1]
    else:
        of_step = [checkpoint for checkpoint in checkpoints if checkpoint.step == asked.step]
        if not of_step:
            have = ", ".join(str(checkpoint.step) for checkpoint in checkpoints)
            raise refusal("/step", f"step {asked.step} has no checkpoint in {asked.source}; it has {have}")
        chosen = of_step[-1]
    meta = chosen.meta()
    spec = parse_spec(meta["spec"])
    assert isinstance(spec, TrainSpec)
    return Trained(run, chosen, spec, tokenizer_of_checkpoint(datasets, meta))
