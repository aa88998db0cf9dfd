"""How many tokens, and how long, until a tiny GPT has learnt a text as well as nanoGPT's own recipe leaves it.

    python benchmarks/time_to_loss.py [--text FILE] [--seeds 5] [--first-seed 6] [--compile] [--json FILE]

Both train 4 layers of width 128 on 64 characters of context, by turns, on the same threads, with the parts of this
trainer. The reference is nanoGPT's recipe for CPUs (its README: validation loss 1.88 on Shakespeare); ours is
`examples/nanochat-tiny.json`, but for the text. The first 90 % of the characters are for training; the loss is over all
whole windows of the rest, in float32. Evaluating and compiling stand beside the training time, not in it.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.table import RESULTS, ROOT, Table
from gptcore.data import Batch, Sequence, Windows
from gptcore.device import resolve_precision
from gptcore.dist import start
from gptcore.evaluate import validation_loss
from gptcore.model import GPT
from gptcore.optim import build_optimizers, set_lr, update
from gptcore.prepare import SplitWriter
from gptcore.setup import wrap
from gptcore.sources import python_stdlib
from gptcore.spec import TrainSpec

SHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # sha256 of the text
SHAKESPEARE_LOSS = 1.8857  # that nanoGPT's run ends with, by an estimate; see tests/benchmarks/nanogpt.py
TOLERANCE = 0.03  # how near to it the reference must end, for the comparison to count
TRAIN_SHARE = 0.9
EVALUATED_AT = (0.75, 0.8, 0.825, 0.85, 0.875, 0.9, 0.925, 0.95, 1.0)  # shares of a run's steps
BLOCK_SIZE, N_LAYER, N_EMBD = 64, 4, 128
FEWER_TOKENS, LESS_TIME = 4, 6  # times, against the reference

REFERENCE = {
    "kind": "train",
    "name": "nanogpt-on-a-cpu",
    "model": {"preset": "gpt2-tiny", "n_layer": 4, "n_embd": 128, "n_head": 4, "block_size": 64,
              "attention_bias": False, "mlp_bias": False},
    "data": {"dataset": "text"},
    "optim": {"name": "adamw", "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 100, "schedule": "cosine",
              "weight_decay": 0.1, "grad_clip": 1.0, "beta1": 0.9, "beta2": 0.99},
    "max_steps": 2000,
    "tokens_per_step": 12 * 64,
    "precision": "fp32",
}  # fmt: skip


@dataclass(frozen=True)
class Text:
    """A text as character numbers, cut into training and validation."""

    name: str
    vocab_size: int
    characters: np.ndarray  # uint16
    train: Windows
    val: Windows
    is_shakespeare: bool


def read_text(path: Path | None, folder: Path) -> Text:
    """The file, or as much of the Python standard library's source as Shakespeare is long."""
    if path is None:
        source = python_stdlib()
        name = source.description
        text = "".join(document.text for document in source.read(0))[:1_115_394]
    else:
        name, text = path.name, path.read_text(encoding="utf-8")
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    characters = np.array([numbers[character] for character in text], dtype=np.uint16)
    cut = int(TRAIN_SHARE * len(characters))
    train, val = (_windows(folder, *part) for part in (("train", characters[:cut]), ("val", characters[cut:])))
    known = hashlib.sha256(text.encode()).hexdigest() == SHAKESPEARE
    return Text(name, len(numbers), characters[:cut], train, val, known)


def _windows(folder: Path, split: str, characters: np.ndarray) -> Windows:
    writer = SplitWriter(folder, split, len(characters))
    writer.append(characters, len(characters))
    return Windows(folder, writer.finish(), BLOCK_SIZE)


def ordered_batches(spec: TrainSpec, text: Text) -> Iterator[Batch]:
    """As our trainer reads: every window once, in an order that the seed says."""
    sequence, count = Sequence(text.train, spec.seed), spec.tokens_per_step // BLOCK_SIZE
    return (sequence.read(step * count, count) for step in range(spec.max_steps))


def random_batches(spec: TrainSpec, text: Text) -> Iterator[Batch]:
    """As nanoGPT reads: windows that begin anywhere, some twice and some never."""
    random, count = np.random.default_rng(spec.seed), spec.tokens_per_step // BLOCK_SIZE
    for _ in range(spec.max_steps):
        starts = random.integers(0, len(text.characters) - BLOCK_SIZE, count)
        rows = torch.from_numpy(text.characters[starts[:, None] + np.arange(BLOCK_SIZE + 1)].astype(np.int64))
        yield rows[:, :-1], rows[:, 1:]


def without_norm_biases(model: GPT) -> None:
    """nanoGPT's LayerNorm has a gain alone; a model spec cannot say so."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_parameter("bias", None)


@dataclass(frozen=True)
class Point:
    """What it took to get so far, evaluations left out, and the loss there."""

    tokens: int
    seconds: float
    cpu_seconds: float  # of all threads: what a busy machine changes least
    loss: float


@dataclass
class Run:
    """One training run: where it was at each evaluation, and what its parts took."""

    seed: int
    points: list[Point] = field(default_factory=list)
    compile_seconds: float = 0.0
    evaluation_seconds: float = 0.0

    def reached(self, loss: float) -> Point | None:
        """The first evaluation that found `loss` or less."""
        return next((point for point in self.points if point.loss <= loss), None)

    @property
    def end(self) -> Point:
        return self.points[-1]


@dataclass(frozen=True)
class Recipe:
    name: str
    spec: TrainSpec
    batches: Callable[[TrainSpec, Text], Iterator[Batch]]
    adapt: Callable[[GPT], None] = lambda model: None

    def run(self, text: Text, seed: int, compiled: bool) -> Run:
        spec, dist = self.spec.model_copy(update={"seed": seed}), start("cpu")
        torch.manual_seed(seed)
        model = GPT(spec.model.model_copy(update={"vocab_size": text.vocab_size}))
        self.adapt(model)
        forward, _ = wrap(model, compiled, dist)
        bf16 = resolve_precision(spec.precision, dist.device)[0] == "bf16"
        optimizers, parameters = build_optimizers(model, spec.optim, dist), list(model.parameters())

        def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                loss: Tensor = forward(tokens, targets)
            return loss

        done, evaluated_at = Run(seed), {round(share * spec.max_steps) for share in EVALUATED_AT}
        if compiled:
            began = time.perf_counter()
            loss_of(*next(self.batches(spec, text))).backward()
            model.zero_grad(set_to_none=True)
            done.compile_seconds = time.perf_counter() - began
        began, cpu_began = time.perf_counter(), time.process_time()
        for step, batch in enumerate(self.batches(spec, text)):
            set_lr(optimizers, step, spec.optim, spec.max_steps)
            loss_of(*batch).backward()
            norm, clip = get_total_norm([p.grad for p in parameters if p.grad is not None]), spec.optim.grad_clip
            update(optimizers, norm / clip if clip is not None and norm > clip else None)
            if step + 1 in evaluated_at:
                asked, cpu_asked = time.perf_counter(), time.process_time()
                with torch.no_grad():
                    loss = validation_loss(model, text.val, text.val.count * BLOCK_SIZE, 128, dist)
                tokens = (step + 1) * spec.tokens_per_step
                done.points.append(Point(tokens, asked - began, cpu_asked - cpu_began, loss))
                done.evaluation_seconds += (took := time.perf_counter() - asked)
                began, cpu_began = began + took, cpu_began + time.process_time() - cpu_asked
        return done


def recipes(example: Path) -> tuple[Recipe, Recipe]:
    """The reference and ours: the example as it stands. Raises SpecError."""
    reference = Recipe("reference", TrainSpec.model_validate(REFERENCE), random_batches, without_norm_biases)
    ours = Recipe("ours", TrainSpec.model_validate_json(example.read_text()), ordered_batches)
    for recipe in (reference, ours):
        shape = recipe.spec.model
        assert (shape.n_layer, shape.n_embd, shape.block_size) == (N_LAYER, N_EMBD, BLOCK_SIZE), recipe.name
    return reference, ours


class Comparison:
    """Both recipes' runs, seed by seed, and what they come to."""

    def __init__(self, table: Table, text: Text, recipes: tuple[Recipe, Recipe]):
        self.table, self.text, self.recipes = table, text, recipes
        self.runs: dict[str, list[Run]] = {recipe.name: [] for recipe in recipes}

    def run(self, seeds: range, compiled: bool) -> None:
        for seed in seeds:
            for recipe in self.recipes:
                done = recipe.run(self.text, seed, compiled)
                self.runs[recipe.name].append(done)
                what = f"{recipe.name}, seed {seed}: loss after {done.end.tokens:,} tokens, {done.end.seconds:.1f} s"
                self.table.row(what, done.end.loss, "nats", **asdict(done))

    def report(self) -> None:
        reference, ours = self.runs["reference"], self.runs["ours"]
        ends = [run.end.loss for run in reference]
        target = SHAKESPEARE_LOSS if self.text.is_shakespeare else statistics.median(ends)
        near = all(abs(loss - target) <= TOLERANCE for loss in ends)
        self._row("reference: loss at the end", "nats", ends, f"{target:.4f} ± {TOLERANCE}", near)
        self._row("ours: loss at the end", "nats", [run.end.loss for run in ours])
        for name, runs in self.runs.items():
            self._row(f"{name}: compiling", "s", [run.compile_seconds for run in runs])
            self._row(f"{name}: evaluating", "s", [run.evaluation_seconds for run in runs])
        # a reference that ends above the target counts with its whole run, no more
        theirs = [run.reached(target) or run.end for run in reference]
        own = [point for run in ours if (point := run.reached(target))]
        self.table.row(f"ours: seeds that reach {target:.4f}", len(own), "seeds",
                       target=str(len(ours)), met=len(own) == len(ours))  # fmt: skip
        if len(own) < len(ours):
            return
        for what, unit, limit in (
            ("tokens", "tokens", FEWER_TOKENS),
            ("seconds", "s", LESS_TIME),
            ("cpu_seconds", "s", None),
        ):
            a, b = ([getattr(point, what) for point in points] for points in (theirs, own))
            self._row(f"reference: {what} to the loss", unit, a)
            self._row(f"ours: {what} to the loss", unit, b)
            times = [mine / yours for mine, yours in zip(a, b, strict=True)]
            met = statistics.median(times) >= limit if limit else None
            self._row(f"{what}: reference ÷ ours", "times", times, f"≥ {limit}" if limit else "", met)

    def _row(self, what: str, unit: str, values: list[Any], target: str = "", met: bool | None = None) -> None:
        """The median, its spread in words, and all values in the file."""
        least, most = (f"{end:,.0f}" if end >= 1000 else f"{end:.3g}" if unit != "nats" else f"{end:.4f}"
                       for end in (min(values), max(values)))  # fmt: skip
        self.table.row(f"{what}, median ({least} to {most})", statistics.median(values), unit, target=target, met=met,
                       values=values)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file; default: the Python standard library's source")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=6, help="our recipe was chosen on seeds 1, 2 and above 100")
    parser.add_argument("--compile", action="store_true", help="both recipes through torch.compile")
    parser.add_argument("--spec", type=Path, default=ROOT / "examples" / "nanochat-tiny.json", help="our recipe")
    parser.add_argument("--json", type=Path, default=RESULTS / "time_to_loss.json")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: give 1 or more")
    with tempfile.TemporaryDirectory() as folder:
        text = read_text(options.text, Path(folder))
        table = Table(options.json, ["torch", "numpy"])
        target = f"{SHAKESPEARE_LOSS}" if text.is_shakespeare else "the reference's own median"
        print(f"{text.name}: {text.vocab_size} different characters; {len(text.characters):,} to train on; "
              f"loss to reach: {target}; {torch.get_num_threads()} threads; "
              f"{'compiled' if options.compile else 'eager'}")  # fmt: skip
        comparison = Comparison(table, text, recipes(options.spec))
        comparison.run(range(options.first_seed, options.first_seed + options.seeds), options.compile)
        comparison.report()
    return 0 if table.all_met else 1


if __name__ == "__main__":
    raise SystemExit(main())
