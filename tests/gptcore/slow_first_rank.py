"""Run in several ranks by a test. Rank 0 saves and samples for longer than a collective may wait, and the last rank
computes another gradient norm. Each rank writes the hash of its last weights.
"""

import hashlib
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from gptcore import dist as ranks
from gptcore import train
from gptcore.checkpoint import Saver
from gptcore.dist import close
from tests.gptcore.ranks import build_trainer

LIMIT_SECONDS = 2.0


def slow(work: Callable[..., Any]) -> Callable[..., Any]:
    """Slow once, not again at once: `Saver.save` waits too, for nothing after the trainer has waited."""
    ended = 0.0

    def slowed(*given: Any, **named: Any) -> Any:
        nonlocal ended
        if time.monotonic() - ended > 1.0:
            time.sleep(1.5 * LIMIT_SECONDS)
        result = work(*given, **named)
        ended = time.monotonic()
        return result

    return slowed


def main(folder: Path) -> None:
    trainer = build_trainer(folder)
    dist = trainer.dist
    train.TRAINING_TIMEOUT = timedelta(seconds=LIMIT_SECONDS)  # type: ignore[misc]
    ranks.HEARTBEAT_SECONDS = 0.2  # type: ignore[misc]
    Saver.wait = slow(Saver.wait)  # type: ignore[method-assign]
    train.sample = slow(train.sample)
    if dist.rank == dist.world_size - 1:
        total_norm = train.get_total_norm
        train.get_total_norm = lambda grads: 2 * total_norm(grads)
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    (folder / f"rank-{dist.rank}").write_text(hashlib.sha256(weights.numpy().tobytes()).hexdigest())
    close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
