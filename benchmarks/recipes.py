"""Tokens to a loss: the recipes of `examples/` on one text, each with its learning rates swept alike.

    python benchmarks/gpu.py --part recipes --recipe homework --text FILE --home DIR --tokens 150000000
    (again with --resume until nothing is left; then --recipe qwen3, nanochat, normuon, and fewer --tokens)

The homework's recipe at its best rate sets the loss to reach. Schedules are scaled to the tokens; a shorter run is one
with fewer --tokens, not the middle of a longer one. A run that the budget cuts off is paused with a checkpoint and goes
on at the next call, bit for bit as the trainer resumes. No text is read more than four times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.table import ROOT, Row, Table

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {  # of the examples, and what else its optim says
    "homework": ("homework-124m", {}), "qwen3": ("qwen3-124m", {}), "nanochat": ("nanochat-124m", {}),
    "normuon": ("nanochat-124m", {"muon_beta2": 0.95}),
}  # fmt: skip
RATES = ("lr", "min_lr", "embed_lr", "head_lr", "muon_lr")
LR_SCALES = (1.0, 2.0, 0.5)
MOST_EPOCHS = 4
STEP_TOKENS = 131_072  # a quarter of the examples': a short run has few steps as it is
EVALUATIONS = 20
PAUSE_SECONDS = 25.0  # before the budget's end: a checkpoint and the way out
TINY: dict[str, Any] = {"n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 32}


def add_arguments(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument("--recipe", choices=RECIPES, help="recipes: which")
    arguments.add_argument("--text", type=Path, help="recipes: a text file, or a folder of *.txt")
    arguments.add_argument("--home", type=Path, help="recipes: where the dataset and the runs stay between calls")
    arguments.add_argument("--tokens", type=float, default=150e6, help="recipes: of each run")
    arguments.add_argument("--lr-scale", dest="lr_scales", action="append", type=float,
                           help=f"recipes: times the example's rates; default {LR_SCALES}")  # fmt: skip


def recipes(table: Table, asked: argparse.Namespace, budget: Any) -> None:
    if not (asked.recipe and asked.text and asked.home):
        raise SystemExit("--part recipes needs --recipe, --text and --home")
    from gptcore.prepare import prepare
    from gptcore.sources import text_files

    home = asked.home.absolute()
    tokenizer = "bytes" if asked.tiny else "gpt2"
    dataset = prepare(home / "datasets", "text", text_files([asked.text.absolute()]), tokenizer, val_fraction=0.02)
    if asked.tokens > MOST_EPOCHS * dataset.train.tokens:
        raise SystemExit(
            f"{asked.tokens:,.0f} tokens are more than {MOST_EPOCHS} passes over {asked.text}'s "
            f"{dataset.train.tokens:,}; give more text or fewer --tokens"
        )
    for scale in asked.lr_scales or LR_SCALES:
        spec = recipe_spec(asked.recipe, scale, int(asked.tokens), asked.tiny)
        if spec["name"] in asked.done:
            continue
        row = describe(spec, asked.recipe, scale) | train(home, spec, budget.left() - PAUSE_SECONDS)
        left = row.pop("why_left")
        what = f"{asked.recipe} × {scale:g}, {row['tokens'] / 1e6:,.3g}M tokens: final validation loss"
        if left:
            table.row(f"{what}: {left}", None, "", left=True, **row)
        else:
            table.row(what, row["val_losses"][-1][1], "nats", case=spec["name"], **row)
    compare(table)


def recipe_spec(recipe: str, scale: float, tokens: int, tiny: bool) -> Row:
    """The example's spec on another text and length: its schedule in the same proportions."""
    example, more = RECIPES[recipe]
    spec: Row = json.loads((ROOT / "examples" / f"{example}.json").read_text())
    step_tokens = 256 if tiny else STEP_TOKENS
    steps, shrunk = max(2, tokens // step_tokens), spec["max_steps"]
    optim = more | {name: value * scale if name in RATES and value else value for name, value in spec["optim"].items()}
    for name in ("warmup_steps", "muon_momentum_warmup_steps"):
        if optim.get(name):
            optim[name] = max(1, round(optim[name] * steps / shrunk))
    if tiny:
        spec["model"] = {"preset": spec["model"]["preset"].replace("124m", "tiny")} | TINY
        spec["resources"] = {"device": "cpu"}
    spec.pop("micro_batch_size", None)  # "auto" for all: the product's own choice
    every = max(1, steps // EVALUATIONS)
    return spec | {
        "name": f"{recipe}-x{scale:g}-{steps}", "data": {"dataset": "text"}, "optim": optim, "max_steps": steps,
        "tokens_per_step": step_tokens, "compile": not tiny,
        "evaluate": {"every_steps": every, "eval_tokens": 4096 if tiny else 10_485_760},
        "checkpoint": {"every_steps": max(every, steps // 4), "keep": 1},
    }  # fmt: skip


def describe(spec: Row, recipe: str, scale: float) -> Row:
    """What a token of it costs."""
    from gptcore.plan import count_parameters, flops_per_token
    from gptcore.spec import parse_spec

    model = parse_spec(spec).model.model_copy(update={"vocab_size": 50257})  # type: ignore[union-attr]
    counts = count_parameters(model)
    flops = flops_per_token(model, counts.matmul, causal=False)
    tokens = spec["max_steps"] * spec["tokens_per_step"]
    return {"recipe": recipe, "lr_scale": scale, "tokens": tokens, "parameters": counts.exported,
            "matmul_parameters": counts.matmul, "flops_per_token": flops, "flops": flops * tokens}  # fmt: skip


def train(home: Path, spec: Row, seconds: float) -> Row:
    """Begin or go on with a run, and pause it when the time is over → its validation losses by tokens."""
    from gptcore.events import Evaluated, Failed, Finished
    from gptcore.rundir import RunDir, write_atomically

    run = RunDir(home / "runs" / spec["name"])
    found = [event for event in run.events() if isinstance(event, Evaluated | Finished)]
    why = "no time left, call again with --resume"
    if seconds > 0 and not any(isinstance(event, Finished) for event in found):
        if not run.spec.exists():
            write_atomically(run.spec, json.dumps(spec))
        attempt = run.claim_attempt()
        environment = {
            **os.environ,
            "TRAINMASTER_HOME": str(home),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        }
        command = [sys.executable, "-m", "gptcore.train", str(run.path), "--attempt", str(attempt.number)]
        until = time.monotonic() + seconds
        with attempt.log.open("w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=run.path)
            while process.poll() is None:
                if time.monotonic() > until and not attempt.stop.exists():
                    write_atomically(attempt.stop, "pause")
                time.sleep(0.2)
        failed = [event for event in run.events() if isinstance(event, Failed)]
        if process.returncode:
            why = f"failed: {failed[-1].message if failed else attempt.log.read_text().splitlines()[-1]}"
        found = [event for event in run.events() if isinstance(event, Evaluated | Finished)]
    if any(isinstance(event, Finished) for event in found):
        why = ""
    losses = {event.tokens: event.val_loss for event in found if isinstance(event, Evaluated)}
    return {"val_losses": sorted(losses.items()), "why_left": why}


def compare(table: Table) -> None:
    """Each recipe's best rate against the homework's best run, which has the most tokens of those there are."""
    table.rows = [row for row in table.rows if not row.get("comparison")]
    runs = [row for row in table.rows if "val_losses" in row and row["value"] is not None]
    homework = [row for row in runs if row["recipe"] == "homework"]
    if not homework:
        return
    longest = max(row["tokens"] for row in homework)
    target = min((row for row in homework if row["tokens"] == longest), key=lambda row: float(row["value"]))
    for recipe in RECIPES:
        lengths = {row["tokens"] for row in runs if row["recipe"] == recipe}
        best = [min((row for row in runs if row["recipe"] == recipe and row["tokens"] == tokens),
                    key=lambda row: float(row["value"])) for tokens in sorted(lengths)]  # fmt: skip
        reached = next((row for row in best if row["value"] <= target["value"]), None)
        if best:
            what = f"{recipe}: tokens of the shortest run that ends at the homework's {target['value']:.4f} or below"
            table.row(what, reached and reached["tokens"] / 1e6, "M tokens", comparison=True,
                      of_homework=reached and reached["tokens"] / longest,
                      flops_of_homework=reached and reached["flops"] / target["flops"],
                      best=[(row["tokens"], row["value"], row["lr_scale"]) for row in best])  # fmt: skip
