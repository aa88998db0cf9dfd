"""What follows a train job: evaluations of its best checkpoint and its way to the Hub, all through the API."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptcore.prepare import prepare
from gptcore.sources import text_files
from tests.api.server import Server, node
from tests.conftest import wait_until
from tests.gptcore.hellaswag_items import write_items, write_task
from tests.gptcore.test_publish import BREAK, Hub
from tests.worker.conftest import Worker, train_spec
from tests.worker.test_end_to_end import TEXTS
from worker.job import Job
from worker.settings import Settings
from worker.store import Store

StartWorker = Callable[[Settings], Worker]


@pytest.fixture
def hub(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A home with a dataset and HellaSwag's items, and a Hub that its workers' environment names."""
    prepare(settings.datasets, "tiny", text_files(TEXTS), "bytes", val_fraction=0.2)
    write_task(settings.datasets / "lm_eval", write_items(settings.datasets, val=40))
    hub = Hub(settings.home)
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_DISABLE_XET", "HF_HOME"):
        monkeypatch.setenv(name, hub.environment()[name])
    yield hub
    hub.close()


@pytest.fixture
def server(hub: Hub, settings: Settings) -> Iterator[Server]:
    with Server(replace(settings, hf_namespaces=("me",))) as server:
        yield server


def submit(server: Server, body: dict[str, Any]) -> str:
    answer = server.http.post("/jobs", json=body)
    assert answer.status_code == 201, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def about(server: Server, job_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.http.get("/jobs", params={"parent_job_id": job_id}).json()["data"]
    return found


def refused(server: Server, body: dict[str, Any]) -> dict[str, str]:
    answer = server.http.post("/jobs", json=body)
    assert answer.status_code == 422, answer.text
    return {error["pointer"]: error["message"] for error in answer.json()["errors"]}


def ended(store: Store, job_id: str) -> Job:
    wait_until(lambda: store.get_job(job_id).ended, seconds=150, pause=0.1)
    return store.get_job(job_id)


def training(**changes: Any) -> dict[str, Any]:
    model = {"preset": "llama-tiny", "n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 128}
    return train_spec(data={"dataset": "tiny"}, model=model, **changes)


def test_a_run_is_evaluated_and_published_by_jobs_that_follow_it(
    store: Store, settings: Settings, server: Server, hub: Hub, start_worker: StartWorker
) -> None:
    start_worker(replace(settings, hf_namespaces=("me",)))
    wait_until(lambda: store.pool_hardware("default"))
    evaluate = {"every_steps": 6, "eval_tokens": 2048, "final_tasks": ["val_loss", "hellaswag"]}
    job_id = submit(server, training(evaluate=evaluate, publish={"repo": "me/tiny", "dtype": "fp32"}))
    children = {job["kind"]: store.get_job(job["id"]) for job in about(server, job_id)}
    assert children.keys() == {"eval", "publish"}
    assert all(child.status_reason == f"waits for {job_id}" for child in children.values())
    assert ended(store, job_id).status == "succeeded"

    evaluated = ended(store, children["eval"].id)
    assert evaluated.status == "succeeded", evaluated.error
    best = store.get_job(job_id).best_checkpoint
    assert best is not None and evaluated.results["val_loss"] == pytest.approx(best.val_loss, abs=1e-4)
    assert 0 <= evaluated.results["hellaswag_acc_norm"] <= 1
    series = server.http.get(f"/jobs/{evaluated.id}/metrics").json()["series"]
    assert series["hellaswag_acc_norm"] == {"step": [best.step], "value": [evaluated.results["hellaswag_acc_norm"]]}

    published = ended(store, children["publish"].id)
    assert published.status == "succeeded", published.error
    assert published.published is not None and published.published["repo"] == "me/tiny"
    assert published.results["publish_hellaswag_items_differing"] == 0
    files = hub.state.repos["me/tiny"].files
    assert b"`hellaswag_acc_norm`" in files["README.md"] and ".eval_results/hellaswag.yaml" in files


def test_a_corrupted_export_fails_the_publish_alone_with_the_numbers(
    store: Store, settings: Settings, server: Server, hub: Hub, start_worker: StartWorker,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "sitecustomize.py").write_text(BREAK.replace("{part}", "q_proj"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start_worker(replace(settings, hf_namespaces=("me",)))
    wait_until(lambda: store.pool_hardware("default"))
    job_id = submit(server, training())
    assert ended(store, job_id).status == "succeeded"
    publish = {"kind": "publish", "name": "p", "source": job_id, "repo": "me/broken"}
    failed = ended(store, submit(server, publish))
    assert failed.status == "failed" and failed.error is not None and failed.error.reason == "mismatch"
    assert "logits_128_difference" in failed.error.message
    assert failed.results["publish_logits_128_difference"] > 1e-4
    assert failed.parent_job_id == job_id and failed.attempt == 1
    assert hub.state.repos == {}
    assert store.get_job(job_id).status == "succeeded"


def test_what_cannot_be_evaluated_or_published_is_refused_when_submitted(
    store: Store, settings: Settings, server: Server
) -> None:
    job_id = submit(server, training())
    about = {"name": "x", "source": job_id}
    assert "no job" in refused(server, {**about, "kind": "eval", "tasks": ["val_loss"]})["/source"]
    (settings.runs / job_id).mkdir(parents=True)
    assert "no checkpoint" in refused(server, {**about, "kind": "eval", "tasks": ["val_loss"]})["/source"]
    assert "is no task" in refused(server, {**about, "kind": "eval", "tasks": ["arc_easy"]})["/tasks"]
    assert "/source" in refused(server, {"kind": "eval", "name": "x", "source": "../..", "tasks": ["val_loss"]})
    assert "no name the Hub accepts" in refused(server, {**about, "kind": "publish", "repo": "me/a--b"})["/repo"]
    assert "TRAINMASTER_HF_NAMESPACES" in refused(server, {**about, "kind": "publish", "repo": "you/a"})["/repo"]
    assert "jobs may publish as me" in refused(server, training(publish={"repo": "you/a"}))["/publish/repo"]
    may_not = node(2).model_copy(update={"publishes_as": ["somebody"]})
    store.register_node(may_not)
    for pointer, body in (
        ("/publish/repo", training(publish={"repo": "me/a"})),
        ("/repo", {**about, "kind": "publish", "repo": "me/a"}),
    ):
        said = refused(server, body)[pointer]
        assert said.startswith("no live worker of pool default publishes as me; start one with HF_TOKEN"), said
    store.register_node(node(2, name="other").model_copy(update={"publishes_as": ["me"]}))
    assert "no checkpoint" in refused(server, {**about, "kind": "publish", "repo": "me/a"})["/source"]
    strange = {**training()["model"], "norm_placement": "post"}
    assert "no stock" in refused(server, {**training(publish={"repo": "me/a"}), "model": strange})["/publish"]
    assert [job.id for job in store.list_jobs().data] == [job_id]


@pytest.mark.parametrize(("token", "owners"), [("", []), ("hf_writes", ["me"])])
def test_a_node_says_as_whom_it_publishes(
    store: Store, settings: Settings, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch,
    token: str, owners: list[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", token)
    start_worker(replace(settings, hf_namespaces=("me",)))
    assert wait_until(lambda: [node.publishes_as for node in store.list_nodes() if node.live]) == [owners]
