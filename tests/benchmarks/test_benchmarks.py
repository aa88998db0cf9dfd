"""The GPU benchmarks at toy sizes on the CPU: each part runs and says what it lacks. Their figures mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gradients, recipes
from benchmarks.recipes import LR_SCALES, recipe_spec
from benchmarks.training import NO_GPU, missing_gpu, peer_missing
from gptcore.spec import TrainSpec, parse_spec

# RMSNorm's own words in bf16 with float32 gains, eager
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
ROOT = Path(__file__).parents[2]
ON_CPU = ["--device", "cpu", "--tiny", "--size", "124m"]


def rows_of(part: str, file: Path, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--part", part, "--json", str(file), *ON_CPU, *arguments])
    assert gpu.main() == 0
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return rows


@pytest.mark.parametrize("part", gpu.PARTS)
def test_without_a_gpu_it_says_so_in_one_line_and_loads_no_torch(part: str, tmp_path: Path) -> None:
    if not missing_gpu():
        pytest.skip("this machine has a GPU")
    command = [sys.executable, "-X", "importtime", "benchmarks/gpu.py", "--part", part, "--json", str(tmp_path / "x")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert (done.returncode, done.stdout, len(said)) == (NO_GPU, "", 1)
    assert said[0].startswith("gpu.py: no GPU to measure: ")
    assert "| torch" not in done.stderr and not (tmp_path / "x").exists()


def test_compiled_gradients_are_held_against_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of("correctness", tmp_path / "x.json", "--family", "qwen3", monkeypatch=monkeypatch)
    assert [row["verdict"] for row in rows] == ["met"] * 8
    assert all(row["value"] > 0 for row in rows if "gradient" in row["what"])


def test_a_wrong_gradient_misses_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = gradients.gradients

    def wrong(case: gpu.Case, dtype: str, compiled: bool) -> tuple[float, dict[str, Any]]:
        loss, found = exact(case, dtype, compiled=False)  # what compiling gives is the test above
        if compiled:
            found["blocks.0.attn.k.weight"] *= 1.2
        return loss, found

    monkeypatch.setattr(gradients, "gradients", wrong)
    file = tmp_path / "x.json"
    command = ["gpu.py", "--part", "correctness", "--json", str(file), *ON_CPU, "--family", "gpt2"]
    monkeypatch.setattr(sys, "argv", command)
    assert gpu.main() == 1
    missed = [row["what"] for row in json.loads(file.read_text())["rows"] if row["verdict"] == "MISSED"]
    assert len(missed) == 2 and all("compiled: worst gradient (blocks.0.attn.k.weight)" in what for what in missed)


def test_speed_is_measured_over_micro_batches_and_what_is_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, family = tmp_path / "x.json", ["--family", "nanochat"]
    rows = rows_of("ours", file, *family, "--budget-seconds", "-1", monkeypatch=monkeypatch)
    assert [row["what"] for row in rows if row.get("left")] == [
        f"nanochat-124m micro-batch {n}: no time left, call again with --resume" for n in (2, 1)
    ]
    rows = rows_of("ours", file, *family, "--resume", monkeypatch=monkeypatch)
    speeds = {row["case"]: row["value"] for row in rows if row["unit"] == "tokens/s"}
    assert set(speeds) == {"nanochat-124m micro-batch 2", "nanochat-124m micro-batch 1"}
    assert not any(row.get("left") for row in rows)
    again = rows_of("ours", file, *family, "--resume", monkeypatch=monkeypatch)
    assert {row["case"]: row["value"] for row in again if row["unit"] == "tokens/s"} == speeds


@pytest.mark.parametrize("recipe", ["homework", "qwen3", "nanochat"])
@pytest.mark.parametrize("scale", LR_SCALES)
def test_a_recipe_keeps_its_proportions_on_another_length(recipe: str, scale: float) -> None:
    given = json.loads((ROOT / "examples" / f"{recipe}-124m.json").read_text())
    spec = parse_spec(recipe_spec(recipe, scale, 150_000_000, tiny=False))
    assert isinstance(spec, TrainSpec)
    assert spec.optim.lr == pytest.approx(scale * given["optim"]["lr"])
    assert spec.optim.min_lr == pytest.approx(scale * given["optim"]["min_lr"])
    assert spec.max_steps == 150_000_000 // 131_072
    share = given["optim"]["warmup_steps"] / given["max_steps"]
    assert spec.optim.warmup_steps / spec.max_steps == pytest.approx(share, abs=0.5 / spec.max_steps)


@pytest.mark.slow
def test_peers_take_the_same_step_and_a_missing_one_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    rows = rows_of("peers", tmp_path / "x.json", "--family", "gpt2", monkeypatch=monkeypatch)
    loss = {row["what"].rpartition(": ")[2]: row["first_loss"] for row in rows if "first_loss" in row}
    assert loss["ours"] == pytest.approx(loss["transformers"], abs=1e-3)
    assert [row["missing"] for row in rows if "missing" in row] == ["litgpt"] and peer_missing("litgpt", "gpt2")


@pytest.mark.slow
def test_recipes_go_on_where_the_budget_ended_them_and_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(recipes, "LR_SCALES", (1.0, 2.0))
    text = tmp_path / "some.txt"
    text.write_text("".join(path.read_text() for path in sorted(Path(os.__file__).parent.glob("[a-d]*.py"))))
    given = ["--text", str(text), "--home", str(tmp_path / "home"), "--tokens", "5120"]
    file, rows = tmp_path / "x.json", []
    rows = rows_of("recipes", file, *given, "--recipe", "homework", "--budget-seconds", "1", monkeypatch=monkeypatch)
    assert [row["left"] for row in rows] == [True] * 2
    for recipe in ("homework", "nanochat"):
        rows = rows_of("recipes", file, *given, "--recipe", recipe, "--resume", monkeypatch=monkeypatch)
    finished = [row for row in rows if "case" in row]
    assert len(finished) == 4 and not any(row.get("left") for row in rows)
    assert all(row["val_losses"][-1][0] == row["tokens"] == 5120 for row in finished)
    compared = [row for row in rows if row.get("comparison")]
    assert [row["what"].partition(":")[0] for row in compared] == ["homework", "nanochat"]
    assert compared[0]["of_homework"] == 1.0
