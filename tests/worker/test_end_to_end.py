"""The whole way with the real trainer: a spec is queued, an agent starts torchrun, its events come back."""

from __future__ import annotations

import json
import sysconfig
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptcore.events import read_lines
from gptcore.plan import plan, resolve
from gptcore.prepare import prepare
from gptcore.rundir import RunDir
from gptcore.sources import text_files
from gptcore.spec import TrainSpec, parse_spec
from tests.conftest import wait_until
from tests.worker.conftest import Worker, living, train_spec
from tests.worker.test_launch import OUTER_LAUNCHER
from worker.job import Job
from worker.settings import Settings
from worker.store import Store

StartWorker = Callable[[Settings], Worker]
TEXTS = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-h]*.py"))  # over a megabyte, so each split gets some


@pytest.fixture
def home(settings: Settings) -> Settings:
    """A home with the dataset "tiny"."""
    prepare(settings.datasets, "tiny", text_files(TEXTS), "bytes", val_fraction=0.2)
    return settings


def submit(store: Store, settings: Settings, **changes: Any) -> str:
    wait_until(lambda: store.pool_hardware("default"))
    spec = parse_spec(train_spec(data={"dataset": "tiny"}, **changes))
    assert isinstance(spec, TrainSpec)
    spec = resolve(spec, settings.datasets)
    hardware = store.pool_hardware("default")
    assert hardware is not None
    return store.create_job(spec, plan(spec, hardware))[0].id


def ended(store: Store, job_id: str) -> Job:
    wait_until(lambda: store.get_job(job_id).ended, seconds=90, pause=0.1)
    return store.get_job(job_id)


def events(store: Store, job_id: str) -> list[dict[str, Any]]:
    return [json.loads(line) for _, line in store.read_events(job_id)]


def trainer_process(job_id: str, name: str) -> psutil.Process:
    return next(p for p in living(job_id) if name in " ".join(p.cmdline()))


def test_text_becomes_a_dataset_and_a_model_on_two_ranks_in_an_outer_launchers_environment(
    store: Store, settings: Settings, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in OUTER_LAUNCHER.items():  # a rank 1 that would meet three others at a host that is not there
        monkeypatch.setenv(name, value)
    start_worker(settings)
    sources = settings.datasets / "sources"
    sources.mkdir(parents=True)
    (sources / "some.txt").write_text("".join(path.read_text() for path in TEXTS))
    spec = {
        "kind": "prepare",
        "name": "tiny",
        "dataset": "tiny",
        "tokenizer": "gpt2",
        "val_fraction": 0.2,
        "source": {"format": "text", "path": "some.txt"},
    }
    prepared = ended(store, store.create_job(parse_spec(spec), None)[0].id)
    assert prepared.status == "succeeded", prepared.error

    model = {field: value for field, value in train_spec()["model"].items() if field != "vocab_size"}
    posted = time.monotonic()
    job_id = submit(store, settings, resources={"ranks_per_node": 2}, model=model)
    wait_until(lambda: store.get_job(job_id).step > 0, seconds=60)
    print(f"from POST to the first step: {time.monotonic() - posted:.1f} s")
    job = ended(store, job_id)
    assert job.status == "succeeded", job.error
    seen = events(store, job_id)
    assert seen[0]["type"] == "started" and seen[0]["world_size"] == 2
    assert [e["step"] for e in seen if e["type"] == "step"] == list(range(1, 13))
    attempt = RunDir(settings.runs / job_id).attempt(1)
    assert store.read_events(job_id) == [
        (f"1-{seq}", line) for seq, (_, line) in enumerate(read_lines(attempt.events), 1)
    ]
    assert (job.step, job.total_steps, job.tokens_seen, job.attempt) == (12, 12, 12 * 256, 1)
    val_losses = {e["step"]: e["val_loss"] for e in seen if e["type"] == "evaluated"}
    assert job.best_checkpoint is not None and job.best_checkpoint.val_loss == min(val_losses.values())
    export = RunDir(settings.runs / job_id).export
    assert AutoTokenizer.from_pretrained(export)("Hello world")["input_ids"] == [15496, 995]
    assert AutoModelForCausalLM.from_pretrained(export).config.vocab_size == 50257
    assert living(job_id) == []


@pytest.mark.slow
def test_cancel_stops_a_real_run_after_a_checkpoint(store: Store, home: Settings, start_worker: StartWorker) -> None:
    start_worker(home)
    job_id = submit(store, home, max_steps=100_000)
    wait_until(lambda: store.get_job(job_id).step > 5, seconds=60)
    store.request_cancel(job_id)
    job = ended(store, job_id)
    assert job.status == "cancelled" and living(job_id) == []
    last = events(store, job_id)[-2:]
    assert [e["type"] for e in last] == ["checkpointed", "stopped"]
    assert last[0]["step"] == last[1]["step"]


@pytest.mark.slow
def test_a_killed_torchrun_is_followed_by_an_attempt_that_resumes(
    store: Store, home: Settings, start_worker: StartWorker
) -> None:
    start_worker(home)
    changes = {"evaluate": {"every_steps": 150, "eval_tokens": 2048}, "checkpoint": {"every_steps": 10, "keep": 2}}
    job_id = submit(store, home, max_steps=300, resources={"ranks_per_node": 2}, **changes)
    wait_until(lambda: store.get_job(job_id).step > 8, seconds=60)
    trainer_process(job_id, "torch.distributed.run").kill()
    killed = time.monotonic()
    wait_until(lambda: store.get_job(job_id).attempt == 2 and events(store, job_id)[-1]["type"] == "step", 60)
    assert time.monotonic() - killed < 30
    job = ended(store, job_id)
    assert job.status == "succeeded", job.error
    seen = events(store, job_id)
    (resumed,) = [e for e in seen if e["type"] == "resumed"]
    assert resumed["step"] >= 8 and resumed["difference"] == 0
    assert {e["step"] for e in seen if e["type"] in ("step", "skipped")} == set(range(1, 301))


@pytest.mark.slow
def test_a_trainer_that_is_killed_says_so_and_the_service_goes_on(
    store: Store, home: Settings, start_worker: StartWorker
) -> None:
    start_worker(replace(home, max_attempts=1))
    job_id = submit(store, home, max_steps=100_000)
    wait_until(lambda: store.get_job(job_id).step > 0, seconds=60)
    trainer_process(job_id, "gptcore.train").kill()
    job = ended(store, job_id)
    assert job.status == "failed" and job.error is not None
    assert job.error.message == "the trainer ended without a word by SIGKILL, as where the machine has no memory left"
    assert ended(store, submit(store, home)).status == "succeeded"
