"""Run in several ranks by a test: the last rank has room for four sequences only; each rank writes what it uses."""

import sys
from pathlib import Path

import torch

from gptcore.data import Batch
from gptcore.dist import close
from gptcore.train import Trainer
from tests.gptcore.ranks import build_trainer

healthy = Trainer._forward_backward


def on_a_small_gpu(trainer: Trainer, batch: Batch, share: float, last: bool) -> torch.Tensor:
    if trainer.dist.rank == trainer.dist.world_size - 1 and len(batch[0]) > 4:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return healthy(trainer, batch, share, last)


def main(folder: Path) -> None:
    trainer = build_trainer(folder)
    trainer._forward_backward = on_a_small_gpu.__get__(trainer)  # type: ignore[method-assign]
    trainer._warm_up()
    trainer.batches.seek(0)
    trainer.step()
    trainer.batches.close()
    planned = trainer.planned
    (folder / f"rank-{trainer.dist.rank}").write_text(f"{planned.micro_batch_size} x {planned.grad_accum_steps}")
    close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
