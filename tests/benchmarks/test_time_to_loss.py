"""The recipes that are timed against each other are what they are called."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.table import ROOT
from benchmarks.time_to_loss import Text, random_batches, read_text, recipes, without_norm_biases
from gptcore.model import GPT
from tests.benchmarks import nanogpt

STEPS = 24


@pytest.fixture
def text(tmp_path: Path) -> Text:
    some = sorted((ROOT / "gptcore").glob("*.py"))[:10]
    (tmp_path / "text").write_text("".join(path.read_text() for path in some))
    return read_text(tmp_path / "text", tmp_path)


def same_weights(theirs: nanogpt.NanoGPT, ours: GPT) -> None:
    """Give theirs what ours begins with."""
    given, (characters, positions) = dict(ours.named_parameters()), theirs.tables
    characters.weight.data = given["wte.weight"][: len(characters.weight)].clone()
    positions.weight.data = given["wpe.weight"].clone()
    for index, layer in enumerate(theirs.layers):
        block = f"blocks.{index}."
        layer["qkv"].weight.data = torch.cat([given[f"{block}attn.{name}.weight"] for name in "qkv"])
        layer["out"].weight.data = given[f"{block}attn.o.weight"].clone()
        layer["up"].weight.data = given[f"{block}mlp.up.weight"].clone()
        layer["down"].weight.data = given[f"{block}mlp.down.weight"].clone()


def test_the_reference_trains_as_nanogpts_recipe_does(text: Text) -> None:
    reference, _ = recipes(ROOT / "examples" / "nanochat-tiny.json")
    optim = reference.spec.optim.model_copy(update={"warmup_steps": 0})
    spec = reference.spec.model_copy(update={"optim": optim, "max_steps": STEPS, "seed": 3})
    theirs = nanogpt.NanoGPT(text.vocab_size, gelu="tanh")

    def adapt(model: GPT) -> None:
        without_norm_biases(model)
        same_weights(theirs, model)

    ours = replace(reference, spec=spec, adapt=adapt).run(text, 3, compiled=False)
    nanogpt.train(theirs, random_batches(spec, text), STEPS, 0)
    with torch.no_grad():
        expected = theirs(*text.val.read(np.arange(text.val.count))).item()
    assert ours.end.loss == pytest.approx(expected, abs=1e-4)  # another rate, decay or moment: 7e-4 and more
