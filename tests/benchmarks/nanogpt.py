"""nanoGPT's recipe for CPUs in plain torch, from its published settings: what `time_to_loss.py`'s reference is held to.

    python -m tests.benchmarks.nanogpt TEXT SEED [SEED ...]

Random numbers are drawn in nanoGPT's order (weights, then batches, the evaluations' between them), so that seed 1337
is its run: the loss that its README tells, an estimate from 20 batches, comes out, and beside it the loss over all of
the validation text.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 128, 4, 4, 64, 12
STEPS, WARMUP_STEPS, EVALUATED_EVERY, EVALUATED_BATCHES = 2000, 100, 250, 20
LR, MIN_LR, DECAY, BETAS, CLIP = 1e-3, 1e-4, 0.1, (0.9, 0.99), 1.0


class NanoGPT(nn.Module):
    def __init__(self, characters: int, gelu: str = "none"):
        super().__init__()
        self.gelu = gelu  # "none": by the error function, as nanoGPT's
        self.tables = nn.ModuleList([nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)])
        shapes = {"qkv": (1, 3), "out": (1, 1), "up": (1, 4), "down": (4, 1)}  # times WIDTH: in, out
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(a * WIDTH, b * WIDTH, bias=False) for name, (a, b) in shapes.items()})
            for _ in range(LAYERS)
        )
        self.gains = nn.ParameterList(torch.ones(WIDTH) for _ in range(2 * LAYERS + 1))
        head = nn.Linear(WIDTH, characters, bias=False)
        self.tables[0].weight = head.weight
        products = [layer[name] for layer in self.layers for name in shapes]
        for module in (*self.tables, *products, head):
            nn.init.normal_(module.weight, std=0.02)
        for layer in self.layers:
            for name in ("out", "down"):
                nn.init.normal_(layer[name].weight, std=0.02 / math.sqrt(2 * LAYERS))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens, targets (B, T) → mean cross-entropy (), nats a character."""
        B, T = tokens.shape
        x = self.tables[0](tokens) + self.tables[1].weight[:T]
        for index, layer in enumerate(self.layers):
            heads = layer["qkv"](self._norm(x, 2 * index)).view(B, T, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + layer["out"](mixed.transpose(1, 2).reshape(B, T, WIDTH))
            x = x + layer["down"](F.gelu(layer["up"](self._norm(x, 2 * index + 1)), approximate=self.gelu))
        logits = self._norm(x, 2 * LAYERS) @ self.tables[0].weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _norm(self, x: Tensor, index: int) -> Tensor:
        return F.layer_norm(x, (WIDTH,), self.gains[index], eps=1e-5)


def lr_at(step: int, steps: int, warmup_steps: int) -> float:
    if step < warmup_steps:
        return LR * (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / (steps - 1 - warmup_steps)  # its last update is number max_iters, counted from 0
    return MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * done)) / 2


def train(model: NanoGPT, batches: Iterable[tuple[Tensor, Tensor]], steps: int, warmup_steps: int) -> None:
    """One update for each batch, of a schedule over `steps`."""
    parameters = list(model.parameters())
    matrices, vectors = ([p for p in parameters if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, steps, warmup_steps)
        model(*batch).backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss_over_all(model: NanoGPT, characters: Tensor) -> float:
    """The mean over all whole windows."""
    count = (len(characters) - 1) // CONTEXT
    tokens, targets = (characters[first : first + count * CONTEXT].view(count, CONTEXT) for first in (0, 1))
    losses = [model(tokens[i : i + 128], targets[i : i + 128]).item() * len(tokens[i : i + 128])
              for i in range(0, count, 128)]  # fmt: skip
    return sum(losses) / count


def random_batch(characters: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.randint(len(characters) - CONTEXT, (BATCH,))[:, None] + torch.arange(CONTEXT + 1)
    return characters[rows[:, :-1]], characters[rows[:, 1:]]


@torch.no_grad()
def estimated_loss(model: NanoGPT, training: Tensor, validation: Tensor) -> float:
    """nanoGPT's estimate: some batches of both parts are drawn, the mean of the second's is told."""
    of_each = [[model(*random_batch(part)).item() for _ in range(EVALUATED_BATCHES)] for part in (training, validation)]
    return sum(of_each[1]) / EVALUATED_BATCHES


def run(seed: int, character_count: int, training: Tensor, validation: Tensor) -> tuple[float, float]:
    """→ the loss over all of the validation text, and nanoGPT's estimate of it."""
    torch.manual_seed(seed)
    model = NanoGPT(character_count)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        upcoming = random_batch(training)  # drawn ahead
        for step in range(STEPS):
            if step % EVALUATED_EVERY == 0:
                estimated_loss(model, training, validation)
            batch, upcoming = upcoming, random_batch(training)
            yield batch

    train(model, batches(), STEPS, WARMUP_STEPS)
    estimate = estimated_loss(model, training, validation)
    return loss_over_all(model, validation), estimate


def main() -> None:
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    characters = torch.tensor([numbers[character] for character in text])
    training, validation = characters.split([cut := int(0.9 * len(text)), len(text) - cut])
    for seed in map(int, sys.argv[2:]):
        whole, estimate = run(seed, len(numbers), training, validation)
        print(f"seed {seed}: {whole:.4f} over all of the validation text, {estimate:.4f} by 20 batches", flush=True)


if __name__ == "__main__":
    main()
