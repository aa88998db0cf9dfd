"""From a process's arguments to a Trainer: the run directory, the ranks, the data, the model.

The edge of the trainer: what breaks within `main` becomes a `failed` event here.
"""

import argparse
import faulthandler
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn.parallel import DistributedDataParallel

from gptcore import device as devices
from gptcore.checkpoint import list_checkpoints
from gptcore.compiler import compile_loss
from gptcore.data import Sequence, Windows
from gptcore.dataset import Dataset, read_dataset
from gptcore.dist import Dist, close, start, start_store
from gptcore.evaluate import val_windows
from gptcore.events import Notice, PhaseChanged, Report, Started
from gptcore.failure import reporting
from gptcore.hellaswag import Item, load_items_together
from gptcore.locks import shared
from gptcore.model import GPT
from gptcore.optim import build_optimizers
from gptcore.plan import Hardware, fits, peak_flops, plan, resolve
from gptcore.preflight import preflight
from gptcore.prepare import prepare_builtin
from gptcore.procs import die_with_parent
from gptcore.rundir import Attempt, RunDir, datasets_root, runs_root, write_atomically
from gptcore.spec import SpecError, TrainSpec, read_spec, refusal
from gptcore.train import Trainer

PREPARING_SECONDS = 24 * 3600.0
Found = TypeVar("Found")


def main(argv: list[str] | None = None) -> int:
    """Run one attempt. Exit code 0 where it finished or stopped as told, 2 for a spec that cannot run."""
    arguments = _arguments(argv)
    faulthandler.register(signal.SIGUSR1)  # where every thread is, for who wonders why nothing moves
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    try:
        _run(arguments)
    except SpecError as error:
        print(*(f"{p.pointer}: {p.message}" for p in error.problems), sep="\n", file=sys.stderr)  # noqa: T201
        return 2
    return 0


def _run(arguments: argparse.Namespace) -> None:
    spec = read_spec(arguments.spec or RunDir(arguments.run_dir).spec)
    if not isinstance(spec, TrainSpec):
        raise refusal("/kind", f"{spec.kind} is no job for the trainer; use train")
    if arguments.spec is not None:
        spec = resolve(spec, datasets_root())
    rank = int(os.environ.get("RANK", 0))
    run, attempt = claim(arguments, spec, rank)
    with shared(attempt.lock):
        with reporting(attempt, rank) as report:
            spec = resolve(spec, datasets_root())
            dataset = _dataset(spec, rank, report)
            dist = start(spec.resources.device)
            preflight(dist, report)
            build(spec, dataset, dist, run, attempt, report).train()
        close()


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gptcore.train", description=__doc__)
    parser.add_argument("run_dir", nargs="?", type=Path, help="a run directory with its spec.json")
    parser.add_argument("--spec", type=Path, help="a job spec to run in a new directory")
    parser.add_argument("--attempt", type=int, help="an attempt's number whose folder is claimed already")
    arguments = parser.parse_args(argv)
    if (arguments.run_dir is None) == (arguments.spec is None):
        parser.error("give either RUN_DIR or --spec FILE")
    return arguments


def claim(arguments: argparse.Namespace, spec: TrainSpec, rank: int) -> tuple[RunDir, Attempt]:
    """Return the run directory and this attempt's folder in it, which rank 0 makes unless its number is given.

    Rank 0 tells the others over the store of this start, which ranks on other nodes reach too.
    """
    if arguments.attempt is not None and arguments.run_dir is not None:
        run = RunDir(arguments.run_dir.absolute())
        return run, run.attempt(arguments.attempt)
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if rank == 0:
        run, attempt = _claim_first(arguments, spec)
        if not alone:
            start_store().set("attempt", f"{attempt.number} {run.path.name}")
        return run, attempt
    number, _, name = start_store().get("attempt").decode().partition(" ")
    run = RunDir(runs_root() / name if arguments.spec is not None else arguments.run_dir.absolute())
    return run, run.attempt(int(number))


def _claim_first(arguments: argparse.Namespace, spec: TrainSpec) -> tuple[RunDir, Attempt]:
    if arguments.spec is None:
        run = RunDir(arguments.run_dir.absolute())
    else:
        run = RunDir(runs_root() / f"{spec.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        write_atomically(run.spec, spec.model_dump_json(indent=2))
    return run, run.claim_attempt()


def _wait_for(look: Callable[[], Found | None], what: str, seconds: float = 60.0) -> Found:
    """What `look` finds, once it finds something."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"{what} did not appear within {seconds:.0f} s"
        time.sleep(0.05)
    return found


def build(spec: TrainSpec, dataset: Dataset, dist: Dist, run: RunDir, attempt: Attempt, report: Report) -> Trainer:
    """Everything a run needs, checked before the first step. Raises SpecError."""
    folder = datasets_root() / dataset.name
    block_size = spec.model.block_size
    train_windows, val = (Windows(folder, split, block_size) for split in (dataset.train, dataset.val))
    _need_windows(spec, dataset, train_windows, val)
    hardware = devices.hardware(dist)
    settled, slow = _settled(_on_these_ranks(spec, dist), run, hardware, dist)
    planned, precision = plan(settled, hardware), settled.precision
    assert planned.world_size == dist.world_size
    compiled, eager = devices.resolve_compile(spec, dist, planned.total_flops / dist.world_size)
    tokens_evaluated = (
        math.ceil(spec.max_steps / spec.evaluate.every_steps) * block_size * val_windows(val, spec.evaluate.eval_tokens)
    )
    evaluates_apart = compiled and devices.evaluation_graph_pays(
        spec.model, tokens_evaluated // dist.world_size, dist.device.type
    )
    for notice in filter(None, (slow, eager)):
        report(Notice(level="warning", message=notice))
    torch.manual_seed(spec.seed)
    model = GPT(spec.model, activation_checkpointing=spec.activation_checkpointing).to(dist.device)
    forward, replica = wrap(model, compiled, dist)
    report(Started(
        kind=spec.kind, device=dist.device.type, device_name=hardware.device_name, world_size=dist.world_size,
        threads=torch.get_num_threads(), precision=precision, compiled=compiled,
        micro_batch_size=planned.micro_batch_size, grad_accum_steps=planned.grad_accum_steps,
        parameters=planned.parameters, total_steps=planned.total_steps, tokens_per_step=planned.tokens_per_step,
        versions={"python": platform.python_version(), "torch": torch.__version__, "trainmaster": _version()},
        dataset_sha256=dataset.sha256,
    ))  # fmt: skip
    return Trainer(
        spec=spec, planned=planned, dist=dist, run=run, attempt=attempt, report=report,
        model=model, forward=forward, replica=replica, compiled=compiled, evaluates_apart=evaluates_apart,
        precision=precision,
        optimizers=build_optimizers(model, spec.optim, dist),
        dataset=dataset, train_windows=Sequence(train_windows, spec.seed), val=val,
        peak_flops=peak_flops(hardware.device_name),
        hellaswag_items=_hellaswag_items(dist) if spec.evaluate.hellaswag else [],
    )  # fmt: skip


def _hellaswag_items(dist: Dist) -> list[Item]:
    try:
        return load_items_together(datasets_root(), "validation", dist)
    except FileNotFoundError as error:
        raise refusal("/evaluate/hellaswag", str(error)) from error


def _dataset(spec: TrainSpec, rank: int, report: Report) -> Dataset:
    """The prepared dataset; a built-in one is made on first use, by rank 0.

    Before the ranks join each other: hours of tokenizing would outlast any collective's patience.
    """
    name, root = spec.data.dataset, datasets_root()
    if rank == 0 and read_dataset(root, name) is None:
        report(PhaseChanged(phase="preparing", message=f"preparing {name}"))
        prepare_builtin(root, name)
    return _wait_for(lambda: read_dataset(root, name), f"dataset {name}", PREPARING_SECONDS)


def _need_windows(spec: TrainSpec, dataset: Dataset, train: Windows, val: Windows) -> None:
    """Refuse a dataset too short for one window of the model's context."""
    for split, windows, tokens in (("train", train, dataset.train.tokens), ("val", val, dataset.val.tokens)):
        if windows.count == 0:
            message = (
                f"block_size {spec.model.block_size} is longer than any shard of dataset "
                f"{dataset.name}'s {split} split ({tokens} tokens); use a smaller block_size or more text"
            )
            raise refusal("/model/block_size", message)


def _on_these_ranks(spec: TrainSpec, dist: Dist) -> TrainSpec:
    """The spec as torchrun really started it: the batch is the spec's, whatever the number of ranks."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    resources = spec.resources.model_copy(update={"ranks_per_node": ranks, "nodes": dist.world_size // ranks})
    return spec.model_copy(update={"resources": resources})


def _settled(spec: TrainSpec, run: RunDir, hardware: Hardware, dist: Dist) -> tuple[TrainSpec, str]:
    """The spec without an "auto" that has been found before, and a notice where its precision is slow here.

    One found anew on another machine would change the sums: the precision is that of the newest checkpoint, and so is
    the micro-batch where as many ranks made it and it fits here. An explicit micro-batch that the run had to halve
    stays halved.
    """
    meta = checkpoints[-1].meta() if (checkpoints := list_checkpoints(run)) else None
    asked = meta["precision"] if meta and spec.precision == "auto" else spec.precision
    precision, slow = devices.resolve_precision(asked, dist.device)
    spec = spec.model_copy(update={"precision": precision})
    if meta is None or meta["world_size"] != spec.world_size:
        return spec, slow
    if spec.micro_batch_size not in ("auto", meta["spec"]["micro_batch_size"]):
        return spec, slow  # the user changed it since
    size = meta["micro_batch_size"]
    return spec.model_copy(update={"micro_batch_size": size}) if fits(spec, hardware, size) else spec, slow


def _version() -> str:
    try:
        return version("trainmaster")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "source"


def wrap(model: GPT, compiled: bool, dist: Dist) -> tuple[Any, Any]:
    """The model's loss function, compiled where asked, and the same with gradients shared by ranks."""
    forward: Any = compile_loss(model) if compiled else model
    if dist.world_size == 1:
        return forward, forward
    device_ids = [dist.local_rank] if dist.device.type == "cuda" else None
    # RoPE's tables are constants, so there are no buffers to send at each forward pass
    replica = DistributedDataParallel(
        forward, device_ids=device_ids, gradient_as_bucket_view=True, broadcast_buffers=False
    )
    return forward, replica
