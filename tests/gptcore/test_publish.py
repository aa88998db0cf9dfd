"""A publish job's process against a server that speaks the Hub's protocol, through the Hub's real client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from gptcore.events import Evaluated, Failed, Finished, Notice, Published, Scored, Verified
from gptcore.rundir import RunDir, write_atomically
from gptcore.spec import PublishTarget, parse_spec
from tests.conftest import wait_until
from tests.gptcore.conftest import Trainers, prepare_small, tiny_spec
from tests.gptcore.hellaswag_items import write_items
from tests.gptcore.hub_models import ModelHub


class Hub:
    """The server, and a publish job's processes that talk to it."""

    def __init__(self, home: Path):
        self.home = home
        state = {
            "repos": {},
            "objects": {},
            "statuses": [],
            "commit_statuses": [],
            "hold": threading.Event(),
            "requests": [],
        }
        self.state: Any = type("OwnHub", (ModelHub,), state)
        self.state.hold.set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.state)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.state.hold.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self, **changes: str) -> dict[str, str]:
        given = {
            "TRAINMASTER_HOME": str(self.home), "OMP_NUM_THREADS": "1", "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_writes", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(self.home / "hf"),
        }  # fmt: skip
        return {**os.environ, **given, **changes}

    def start(self, run: RunDir, attempt: int = 1, **environment: str) -> subprocess.Popen[str]:
        run.attempt(attempt).path.mkdir(parents=True)
        command = [sys.executable, "-m", "gptcore.publish_job", str(run.path), "--attempt", str(attempt)]
        given, output = self.environment(**environment), subprocess.PIPE
        return subprocess.Popen(command, env=given, stdout=output, stderr=subprocess.STDOUT, text=True)

    def publish(self, run: RunDir, attempt: int = 1, **environment: str) -> list[Any]:
        output, _ = self.start(run, attempt, **environment).communicate(timeout=120)
        events = [e for e in run.events() if getattr(e, "attempt", 0) == attempt]
        assert events, output
        return events


@pytest.fixture(scope="module")
def published_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with HellaSwag's items and a finished run "source"."""
    home = tmp_path_factory.mktemp("publishing")
    prepare_small(home / "datasets")
    write_items(home / "datasets")
    done = Trainers(home, home / "runs")(tiny_spec(precision="bf16"), "source")
    assert isinstance(list(done.run.events())[-1], Finished), done.output
    return home


@pytest.fixture
def hub(published_home: Path) -> Iterator[Hub]:
    hub = Hub(published_home)
    yield hub
    hub.close()


def job(hub: Hub, name: str, **changes: Any) -> RunDir:
    run = RunDir(hub.home / "runs" / name)
    body = {"kind": "publish", "name": "p", "source": "source", "repo": "me/tiny", **changes}
    write_atomically(run.spec, parse_spec(body).model_dump_json())
    return run


def test_a_model_is_published_whole_and_a_repeat_changes_nothing(hub: Hub, tmp_path: Path) -> None:
    run = job(hub, "whole")
    events = hub.publish(run)
    assert isinstance(events[-1], Finished), events[-1]
    repo = hub.state.repos["me/tiny"]
    assert repo.private and len(repo.commits) == 2
    [published] = [e for e in events if isinstance(e, Published)]
    assert published.commit == repo.commits[-1][0] == repo.tags[f"step-{published.step}"]
    local = {str(p.relative_to(run.export)): p.read_bytes() for p in run.export.rglob("*") if p.is_file()}
    assert repo.files == local
    assert local.keys() == {
        "README.md", "config.json", "dataset.json", "generation_config.json", "loss.png", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "trainmaster.json",
    }  # fmt: skip
    [verified] = [e for e in events if isinstance(e, Verified)]
    assert verified.problems == [] and verified.numbers["hellaswag_items"] == 200

    again = hub.publish(job(hub, "again"))
    assert isinstance(again[-1], Finished)
    assert len(repo.commits) == 2 and list(repo.tags) == [f"step-{published.step}"]


@pytest.mark.slow
def test_the_card_says_how_the_model_was_made(hub: Hub) -> None:
    source = RunDir(hub.home / "runs" / "source")
    step = json.loads((sorted(source.checkpoints.iterdir())[-1] / "state.json").read_text())["state"]["best_step"]
    scored = {"step": step, "seconds": 1.0, "items": 200, "time": "2026-01-01T00:00:00Z"}
    results = [
        {**scored, "task": "hellaswag@10", "results": {"hellaswag_acc_norm@10": 0.25}},
        {**scored, "task": "lm_eval:arc_easy", "results": {"lm_eval:arc_easy/acc": 0.5}},
    ]
    write_atomically(source.evaluations / "job-x.json", json.dumps(results))
    hub.publish(job(hub, "card", license="mit", private=False))
    repo = hub.state.repos["me/tiny"]
    assert not repo.private
    readme = repo.files["README.md"].decode()
    front = yaml.safe_load(readme.split("---")[1])
    assert front["license"] == "mit" and front["library_name"] == "transformers"
    metrics = {m["type"]: m["value"] for r in front["model-index"][0]["results"] for m in r["metrics"]}
    assert metrics["hellaswag_acc_norm@10"] == 0.25 and metrics["lm_eval:arc_easy/acc"] == 0.5 and metrics["loss"] > 0
    [entry] = yaml.safe_load(repo.files[".eval_results/hellaswag.yaml"])
    assert entry["dataset"]["id"] == "Rowan/hellaswag" and entry["value"] == 25.0 and "10-shot" in entry["notes"]
    assert f"the weights are those of step {step}." in readme and "base_model" not in front
    assert "trainmaster submit hf://me/tiny" in readme and "LlamaForCausalLM" in readme and "sha256" in readme
    assert repo.files["loss.png"].startswith(b"\x89PNG")
    assert parse_spec(json.loads(repo.files["trainmaster.json"])).kind == "train"
    (source.evaluations / "job-x.json").unlink()


@pytest.mark.slow
def test_a_model_published_without_hellaswags_items_leaves_no_scores_of_one_before(hub: Hub) -> None:
    source, items = RunDir(hub.home / "runs" / "source"), hub.home / "datasets" / "hellaswag"
    step = json.loads((sorted(source.checkpoints.iterdir())[-1] / "state.json").read_text())["state"]["best_step"]
    scored = {"task": "hellaswag", "results": {"hellaswag_acc_norm": 0.25}, "step": step, "seconds": 1.0}
    write_atomically(source.evaluations / "job-y.json", json.dumps([scored]))
    hub.publish(job(hub, "scored"))
    assert ".eval_results/hellaswag.yaml" in hub.state.repos["me/tiny"].files
    (source.evaluations / "job-y.json").unlink()
    items.rename(items.with_name("away"))
    try:
        events = hub.publish(job(hub, "unscored"))
    finally:
        items.with_name("away").rename(items)
    assert isinstance(events[-1], Finished), events[-1]
    assert any(isinstance(e, Notice) and "HellaSwag was left out" in e.message for e in events)
    files = hub.state.repos["me/tiny"].files
    assert ".eval_results/hellaswag.yaml" not in files and "model.safetensors" in files


@pytest.mark.slow
def test_a_published_model_is_evaluated_from_the_hub(hub: Hub) -> None:
    hub.publish(job(hub, "for-eval", dtype="fp32"))
    run = RunDir(hub.home / "runs" / "of-hub")
    body = {"kind": "eval", "name": "e", "source": "hf://me/tiny", "dataset": "small", "eval_tokens": 1024}
    write_atomically(run.spec, parse_spec({**body, "tasks": ["val_loss", "hellaswag"]}).model_dump_json())
    command = [sys.executable, "-m", "gptcore.eval_job", str(run.path), "--attempt", str(run.claim_attempt().number)]
    done = subprocess.run(command, env=hub.environment(), capture_output=True, text=True, timeout=120)
    scored = [e for e in run.events() if isinstance(e, Scored)]
    source = RunDir(hub.home / "runs" / "source")
    logged = min(e.val_loss for e in source.events() if isinstance(e, Evaluated))
    assert scored, done.stderr
    assert scored[0].results["val_loss"] == pytest.approx(logged, abs=5e-3)  # logged in bf16
    assert scored[1].items == 200


@pytest.mark.slow
def test_killed_in_the_middle_and_tried_again_it_is_one_commit(hub: Hub, tmp_path: Path) -> None:
    run = job(hub, "killed")
    hub.state.hold.clear()
    process = hub.start(run)
    wait_until(lambda: any(path.endswith("objects/batch") for path in hub.state.requests), 60)
    process.kill()
    process.communicate()
    hub.state.hold.set()
    assert len(hub.state.repos["me/tiny"].commits) == 1  # the empty one it was created with
    assert isinstance(hub.publish(run, attempt=2)[-1], Finished)
    repo = hub.state.repos["me/tiny"]
    assert len(repo.commits) == 2
    assert repo.files["model.safetensors"] == (run.export / "model.safetensors").read_bytes()
    for name, data in repo.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(data)
    AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.slow
def test_a_hub_that_is_away_for_a_moment_is_asked_again(hub: Hub) -> None:
    hub.state.commit_statuses += [503, 503]
    events = hub.publish(job(hub, "away"))
    assert sum(isinstance(e, Notice) and "trying again" in e.message for e in events) == 2
    assert isinstance(events[-1], Finished), events[-1]
    assert len(hub.state.repos["me/tiny"].commits) == 2


@pytest.mark.parametrize(
    ("token", "said"),
    [("", "HF_TOKEN is not in"), ("hf_reads", "may only read"), ("hf_bad", "401"), ("hf_écrit", "character 4 of 8")],
)
def test_a_token_that_cannot_write_is_known_before_any_work(hub: Hub, token: str, said: str) -> None:
    run = job(hub, f"token-{token}")
    failed = hub.publish(run, HF_TOKEN=token)[-1]
    assert isinstance(failed, Failed) and failed.reason == "user_error" and said in failed.message
    assert not run.export.exists() and hub.state.repos == {}
    assert token not in ("hf_reads", "hf_bad") or token not in run.attempt(1).events.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("status", [403, 412])
def test_what_the_hub_refuses_for_good_is_not_tried_again(hub: Hub, status: int) -> None:
    hub.state.statuses += [status]
    failed = hub.publish(job(hub, f"refused-{status}"))[-1]
    assert isinstance(failed, Failed) and failed.reason == "user_error" and str(status) in failed.message
    assert hub.state.statuses == []


BREAK = """
import sys
if "gptcore.publish_job" in sys.orig_argv:
    import gptcore.export as export
    right = export.native_weights
    def wrong(spec, weights):
        tensors = right(spec, weights)
        name = next(name for name in tensors if "{part}" in name)
        tensors[name] = tensors[name].flip(0)
        return tensors
    export.native_weights = wrong
"""


BREAK_TOKENIZER = """
import sys
if "gptcore.publish_job" in sys.orig_argv:
    import gptcore.export as export
    right = export.byte_alphabet
    def wrong():
        alphabet = right()
        alphabet[0xC3], alphabet[0xC4] = alphabet[0xC4], alphabet[0xC3]
        return alphabet
    export.byte_alphabet = wrong
"""


@pytest.mark.slow
def test_an_export_that_reads_text_otherwise_is_stopped_at_the_gate(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BREAK_TOKENIZER)  # only letters that English has not
    failed = hub.publish(job(hub, "misread"), PYTHONPATH=str(tmp_path))[-1]
    assert isinstance(failed, Failed) and failed.reason == "mismatch" and "tokens_differing" in failed.message


@pytest.mark.parametrize("part", ["q_proj", pytest.param("layernorm", marks=pytest.mark.slow)])
def test_a_corrupted_export_is_stopped_at_the_gate(hub: Hub, tmp_path: Path, part: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(BREAK.replace("{part}", part))
    events = hub.publish(job(hub, f"corrupted-{part}"), PYTHONPATH=str(tmp_path))
    [verified] = [e for e in events if isinstance(e, Verified)]
    assert verified.problems and verified.numbers["logits_32_difference"] > 1e-4
    failed = events[-1]
    assert isinstance(failed, Failed) and failed.reason == "mismatch"
    assert "logits_32_difference" in failed.message and "nothing was uploaded" in failed.message
    assert hub.state.repos == {}


PARTS = st.text("ab-._A1é /", min_size=0, max_size=8)


@given(owner=PARTS, name=PARTS)
def test_a_repo_name_that_passes_here_passes_at_the_hub(owner: str, name: str) -> None:
    try:
        PublishTarget(repo=f"{owner}/{name}")
    except ValueError:
        return
    try:
        validate_repo_id(f"{owner}/{name}")
    except HFValidationError as error:
        raise AssertionError(f"{owner}/{name}: {error}") from error
