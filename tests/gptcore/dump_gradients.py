"""Run in several ranks by a test: the averaged gradients of the first step, written by rank 0."""

import sys
from pathlib import Path

import torch

from gptcore.dataset import read_dataset
from gptcore.dist import close, start
from gptcore.plan import resolve
from gptcore.rundir import RunDir, datasets_root
from gptcore.setup import build
from gptcore.spec import TrainSpec, read_spec


def main(folder: Path) -> None:
    run = RunDir(folder)
    spec = read_spec(run.spec)
    assert isinstance(spec, TrainSpec)
    dataset = read_dataset(datasets_root(), "small")
    assert dataset is not None
    dist = start("cpu", 1)
    trainer = build(resolve(spec, datasets_root()), dataset, dist, run, run.attempt(1), lambda event: None)
    trainer._warm_up()
    trainer.batches.seek(0)
    trainer._accumulate_gradients()
    trainer.batches.close()
    if dist.first:
        gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
        torch.save(gradients, folder / f"gradients-{dist.world_size}.pt")
    close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
