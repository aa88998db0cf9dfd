"""An eval job's process on a run's checkpoint and on the folder it exported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore.dist import Dist
from gptcore.eval_job import _score_val_loss
from gptcore.events import Evaluated, Failed, Finished, Scored
from gptcore.failure import Interrupted
from gptcore.prepare import prepare
from gptcore.rundir import RunDir, write_atomically
from gptcore.sources import jsonl_files
from gptcore.spec import EvalSpec, parse_spec
from gptcore.subject import find_subject
from tests.conftest import wait_until
from tests.gptcore.conftest import Trainers, prepare_small, tiny_spec
from tests.gptcore.hellaswag_items import write_items, write_task

OURS = ["val_loss", "hellaswag", "hellaswag@3"]
SLOW = pytest.mark.slow
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.fixture(scope="module")
def evaluated_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with HellaSwag's items, the harness's task "hellaswag_local" and a finished run "source"."""
    home = tmp_path_factory.mktemp("evaluating")
    prepare_small(home / "datasets")
    (home / "rows.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(20)))
    prepare(home / "datasets", "short", jsonl_files([home / "rows.jsonl"], "text"), "bytes", val_fraction=0.5)
    write_task(home / "datasets" / "lm_eval", write_items(home / "datasets", val=40))
    model = {"preset": "llama-tiny", "block_size": 128, "n_layer": 2, "n_embd": 32, "n_head": 4}
    done = Trainers(home, home / "runs")(tiny_spec(model=model), "source")
    assert isinstance(list(done.run.events())[-1], Finished), done.output
    return home


def evaluate(
    home: Path, name: str, ranks: int = 1, after_a_score: Callable[[], object] | None = None, **body: Any
) -> list[Any]:
    run = RunDir(home / "runs" / name)
    spec = parse_spec({"kind": "eval", "name": "e", "source": "source", **body})
    write_atomically(run.spec, spec.model_dump_json())
    attempt = run.claim_attempt()
    head = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *head, "-m", "gptcore.eval_job", str(run.path), "--attempt", str(attempt.number)]
    given = {"TRAINMASTER_HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HOME": str(home / "hf"), **OFFLINE}
    process = subprocess.Popen(command, env=os.environ | given, stderr=subprocess.PIPE, text=True)
    if after_a_score is not None:
        wait_until(lambda: process.poll() is not None or any(isinstance(e, Scored) for e in run.events()), 200)
        after_a_score()
    errors = process.communicate(timeout=200)[1]
    events = list(run.events())
    assert events, errors
    return events


def results(events: list[Any]) -> dict[str, float]:
    assert isinstance(events[-1], Finished), events[-1]
    return {name: value for e in events if isinstance(e, Scored) for name, value in e.results.items()}


def test_a_checkpoint_its_export_and_the_harness_agree(evaluated_home: Path) -> None:
    source = RunDir(evaluated_home / "runs" / "source")
    kept, dropped = source.checkpoints, evaluated_home / "dropped"
    # what a run still in training does with a checkpoint that is the best no more
    drop = {"after_a_score": lambda: kept.rename(dropped)}
    of_job = results(evaluate(evaluated_home, "of-job", tasks=[*OURS, "lm_eval:hellaswag_local@3"], **drop))
    dropped.rename(kept)
    logged = min(e.val_loss for e in source.events() if isinstance(e, Evaluated))
    assert of_job["val_loss"] == pytest.approx(logged, abs=1e-5)
    assert of_job["lm_eval:hellaswag_local/acc_norm@3"] == of_job["hellaswag_acc_norm@3"]
    assert not (evaluated_home / "runs" / "of-job" / "model").exists()
    scores = json.loads((source.evaluations / "of-job.json").read_text())
    assert [event["task"] for event in scores] == [*OURS, "lm_eval:hellaswag_local@3"]

    folder = {"source": "source/export", "dataset": "small", "eval_tokens": 1024}
    of_folder = results(evaluate(evaluated_home, "of-folder", tasks=OURS, **folder))
    for name, value in of_folder.items():
        assert value == pytest.approx(of_job[name], abs=1e-4), name


@pytest.mark.slow
def test_validation_keeps_nothing_for_gradients(evaluated_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's activations over its largest batch would fit no GPU that it was trained on."""
    kept = []

    def validation_loss(*_: object) -> float:
        kept.append(torch.is_grad_enabled())
        return 1.0

    monkeypatch.setenv("TRAINMASTER_HOME", str(evaluated_home))
    monkeypatch.setattr("gptcore.eval_job.validation_loss", validation_loss)
    spec = parse_spec({"kind": "eval", "name": "e", "source": "source", "tasks": ["val_loss"]})
    assert isinstance(spec, EvalSpec)
    subject = find_subject(spec, evaluated_home / "runs", evaluated_home / "datasets")
    cpu = torch.device("cpu")
    _score_val_loss(spec, subject, subject.scorer(cpu), Dist(0, 0, 1, cpu), 0)
    assert kept == [False]


def test_a_stop_is_heeded_in_the_middle_of_a_validation(evaluated_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINMASTER_HOME", str(evaluated_home))
    spec = parse_spec({"kind": "eval", "name": "e", "source": "source", "tasks": ["val_loss"]})
    assert isinstance(spec, EvalSpec)
    subject = find_subject(spec, evaluated_home / "runs", evaluated_home / "datasets")
    cpu = torch.device("cpu")
    with pytest.raises(Interrupted):
        _score_val_loss(spec, subject, subject.scorer(cpu), Dist(0, 0, 1, cpu), 0, lambda: True)
    monkeypatch.setattr(Dist, "sum", lambda self, tensor: tensor + 1)  # another rank saw the stop
    with pytest.raises(Interrupted):
        _score_val_loss(spec, subject, subject.scorer(cpu), Dist(0, 0, 2, cpu), 0, lambda: False)


def test_two_ranks_give_what_one_gives(evaluated_home: Path) -> None:
    one = results(evaluate(evaluated_home, "one", tasks=OURS))
    two = results(evaluate(evaluated_home, "two", ranks=2, tasks=OURS))
    assert two == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"tasks": ["lm_eval:no_such_task"]}, "/tasks: lm-evaluation-harness knows no lm_eval:no_such_task"),
        ({"tasks": ["val_loss"], "dataset": "short"}, "/dataset: no shard of dataset 'short' to validate on holds 129"),
        ({"tasks": ["val_loss"], "step": 7}, "/step: step 7 has no checkpoint in source; it has"),
        pytest.param(
            {"tasks": ["val_loss"], "source": "source/export"}, "/dataset: dataset is missing", marks=pytest.mark.slow
        ),
        pytest.param(
            {"tasks": ["val_loss"], "dataset": "nowhere"},
            "/dataset: dataset 'nowhere' is not prepared",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"tasks": ["val_loss"], "source": "elsewhere"}, "/source: elsewhere is no folder", marks=pytest.mark.slow
        ),
    ],
)
def test_what_cannot_be_evaluated_is_said_at_its_field(evaluated_home: Path, body: dict[str, Any], said: str) -> None:
    failed = evaluate(evaluated_home, f"bad-{len(said)}-{len(str(body))}", **body)[-1]
    assert isinstance(failed, Failed) and failed.reason == "user_error"
    assert failed.message.startswith(said), failed.message


@pytest.mark.slow
def test_the_harness_runs_on_an_exported_folder_as_it_is(evaluated_home: Path, tmp_path: Path) -> None:
    export, own = evaluated_home / "runs" / "source" / "export", evaluated_home / "datasets" / "lm_eval"
    command = ["run", "--model", "hf", "--model_args", f"pretrained={export}", "--tasks", "hellaswag_local"]
    options = ["--include_path", str(own), "--device", "cpu", "--output_path", str(tmp_path)]
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lm_eval"), *command, *options],
        env=os.environ | OFFLINE | {"HF_HOME": str(tmp_path / "hf")}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "trust_remote_code" not in (export / "config.json").read_text()
    [answer] = tmp_path.glob("**/results_*.json")
    assert json.loads(answer.read_text())["results"]["hellaswag_local"]["acc_norm,none"] >= 0
