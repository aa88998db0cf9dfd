"""The publish gate: is the exported folder, as stock `transformers` loads it, the model that was trained?

The same look is taken twice, in float32: here at the trainer's model on the exported weights, and by
`python -m gptcore.gate FOLDER DATASET EVAL_TOKENS OUT`, a process that knows only the folder.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptcore.data import Windows
from gptcore.dataset import read_dataset
from gptcore.dist import Dist
from gptcore.evaluate import validation_loss
from gptcore.hellaswag import harness_questions, load_items, sample_of, score
from gptcore.rundir import datasets_root
from gptcore.scorer import Scorer, score_folder

LOGITS_LIMIT = 2e-5  # at logits of up to 8, which float32 rounds so
VAL_LOSS_LIMIT = 1e-4
LOGGED_LIMIT = 5e-3  # from the validation loss that training reported, often in bf16
TIE = 1e-4  # nats a character between two endings that may pass for equally likely
HELLASWAG_ITEMS = 200
# every letter of many scripts, runs of blanks, numbers: what a tokenizer could take for something else
PROBE = "".join(map(chr, range(1, 0x2000))) + " 你好 😀 I'll  say\n\n\t12,345 times: naïve"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def look(scorer: Scorer, dataset_name: str, eval_tokens: int) -> dict[str, Tensor]:
    """Tokens of the probe, logits of two texts, validation loss (), and HellaSwag's normalised scores (N, 4), N 0
    without items."""
    dataset = read_dataset(datasets_root(), dataset_name)
    assert dataset is not None, f"dataset {dataset_name} has gone"
    windows = Windows(datasets_root() / dataset_name, dataset.val, scorer.block_size)
    seen: dict[str, Tensor] = {"tokens": torch.tensor(scorer.encode(PROBE))}
    tokens = windows.read(np.array([0]))[0].to(scorer.device)
    for T in sorted({min(64, scorer.block_size), scorer.block_size}):
        columns = torch.arange(T, device=scorer.device)
        seen[f"logits_{T}"] = scorer.logits_at(tokens[:, :T], columns[None], None, 0 * columns, columns).cpu()
    alone = Dist(0, 0, 1, scorer.device)
    loss = validation_loss(scorer.loss, windows, eval_tokens, max(1, scorer.most_tokens // windows.block_size), alone)
    seen["val_loss"] = torch.tensor(loss, dtype=torch.float64)
    try:
        items = sample_of(load_items(datasets_root(), "validation"), HELLASWAG_ITEMS)
    except FileNotFoundError:
        items = []
    scores = score(harness_questions(items, scorer.encode), scorer, alone)
    seen["hellaswag"] = (scores.logprob / scores.length).reshape(-1, 4)
    return seen


def look_from_outside(folder: Path, dataset_name: str, eval_tokens: int, out: Path) -> dict[str, Tensor] | str:
    """What a fresh process sees that only loads the folder, or the last it said where it broke."""
    command = [sys.executable, "-m", "gptcore.gate", str(folder), dataset_name, str(eval_tokens), str(out)]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode != 0:
        return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    seen = load_file(out)
    out.unlink()
    return seen


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], logged: float) -> tuple[dict[str, float], list[str]]:
    """The differences by name, and what is too large of them. A NaN is too large."""
    found: dict[str, tuple[float, float]] = {  # number, limit
        f"{name}_difference": (
            (ours[name] - theirs[name]).abs().max().item(),
            LOGITS_LIMIT * max(1.0, ours[name].abs().max().item() / 8),
        )
        for name in ours
        if name.startswith("logits")
    }
    found["tokens_differing"] = float(ours["tokens"].tolist() != theirs["tokens"].tolist()), 0
    found["val_loss_difference"] = abs(ours["val_loss"] - theirs["val_loss"]).item(), VAL_LOSS_LIMIT
    found["logged_val_loss_difference"] = abs(theirs["val_loss"].item() - logged), LOGGED_LIMIT
    found["hellaswag_items"] = len(ours["hellaswag"]), HELLASWAG_ITEMS
    found["hellaswag_items_differing"] = _differing(ours["hellaswag"], theirs["hellaswag"]), 0
    problems = [f"{name} {number:.3g} is above {limit:.3g}" for name, (number, limit) in found.items()
                if not number <= limit]  # fmt: skip
    return {name: number for name, (number, _) in found.items()}, problems


def _differing(ours: Tensor, theirs: Tensor) -> int:
    """Items where another ending is chosen, and not for want of a difference."""
    chosen = theirs.nan_to_num(-torch.inf).argmax(1, keepdim=True)
    lost = ours.max(1).values - ours.gather(1, chosen)[:, 0]
    return int((lost > TIE).sum() + theirs.isnan().any(1).sum())


if __name__ == "__main__":
    folder, dataset_name, eval_tokens, out = sys.argv[1:]
    torch.set_deterministic_debug_mode("default" if torch.cuda.is_available() else "error")
    save_file(look(score_folder(Path(folder), device()), dataset_name, int(eval_tokens)), out)
