"""Run in several ranks by a test: the last rank has room for four sequences only; each rank writes what it uses."""

import sys
from pathlib import Path

import torch

from gptcore.data import Batch
from gptcore.dataset import read_dataset
from gptcore.dist import close, start
from gptcore.plan import resolve
from gptcore.rundir import RunDir, datasets_root
from gptcore.setup import build
from gptcore.spec import TrainSpec, read_spec
from gptcore.train import Trainer

healthy = Trainer._forward_backward


def on_a_small_gpu(trainer: Trainer, batch: Batch, share: float, last: bool) -> torch.Tensor:
    if trainer.dist.rank == trainer.dist.world_size - 1 and len(batch[0]) > 4:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return healthy(trainer, batch, share, last)


def main(folder: Path) -> None:
    run = RunDir(folder)
    spec = read_spec(run.spec)
    assert isinstance(spec, TrainSpec)
    dataset = read_dataset(datasets_root(), "small")
    assert dataset is not None
    dist = start("cpu", 1)
    trainer = build(resolve(spec, datasets_root()), dataset, dist, run, run.attempt(1), lambda event: None)
    trainer._forward_backward = on_a_small_gpu.__get__(trainer)  # type: ignore[method-assign]
    trainer._warm_up()
    trainer.batches.seek(0)
    trainer.step()
    trainer.batches.close()
    planned = trainer.planned
    (folder / f"rank-{dist.rank}").write_text(f"{planned.micro_batch_size} x {planned.grad_accum_steps}")
    close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
