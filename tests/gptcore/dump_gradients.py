"""Run in several ranks by a test: the averaged gradients of the first step, written by rank 0."""

import sys
from pathlib import Path

import torch

from gptcore.dist import close
from tests.gptcore.ranks import build_trainer


def main(folder: Path) -> None:
    trainer = build_trainer(folder)
    trainer._warm_up()
    trainer.batches.seek(0)
    trainer._accumulate_gradients()
    trainer.batches.close()
    if trainer.dist.first:
        gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
        torch.save(gradients, folder / f"gradients-{trainer.dist.world_size}.pt")
    close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
