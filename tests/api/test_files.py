"""What a run left behind, and how a job is deleted or done again."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gptcore.events import Sampled
from gptcore.locks import shared
from gptcore.spec import parse_spec
from tests.api.server import FakeRun, evaluated, train_spec
from tests.api.test_stream import stream
from tests.conftest import status_changes
from trainmaster import Client
from worker.deletion import delete_job
from worker.job import BestCheckpoint
from worker.settings import Settings
from worker.store import NotPossible, Store


def save_checkpoint(run_dir: Path, step: int, attempt: int = 1, *, torn: bool = False) -> Path:
    folder = run_dir / "checkpoints" / f"step-{step:08d}-a{attempt:04d}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"w" * 100)
    (folder / "state.json").write_text(json.dumps({"sizes": {"model.safetensors": 101 if torn else 100}}))
    return folder


def test_checkpoints_are_listed_with_their_losses(http: httpx2.Client, run: FakeRun, settings: Settings) -> None:
    run.write(evaluated(4, 2.5))
    run.report(best_checkpoint=BestCheckpoint(step=4, val_loss=2.5))
    for step, torn in ((8, False), (4, False), (12, True)):
        save_checkpoint(settings.runs / run.id, step, torn=torn)
    first, second = http.get(f"/jobs/{run.id}/checkpoints").json()
    assert (first["step"], first["val_loss"], first["best"]) == (4, 2.5, True)
    assert (second["step"], second["val_loss"], second["best"]) == (8, None, False)
    weights = http.get(f"/jobs/{run.id}/artifacts/{first['path']}/model.safetensors")
    assert weights.content == b"w" * 100 and first["bytes"] > 100


def test_a_checkpoints_loss_that_is_no_number_is_told_from_none(
    http: httpx2.Client, run: FakeRun, settings: Settings
) -> None:
    run.write(evaluated(4, math.nan))
    save_checkpoint(settings.runs / run.id, 4)
    assert [one["val_loss"] for one in http.get(f"/jobs/{run.id}/checkpoints").json()] == ["NaN"]


@pytest.mark.parametrize("listing", ["checkpoints", "artifacts"])
def test_what_a_run_removes_while_it_is_listed_is_passed_over(
    http: httpx2.Client, run: FakeRun, settings: Settings, listing: str
) -> None:
    root, enough = settings.runs / run.id, threading.Event()
    save_checkpoint(root, 1)

    def rotate() -> None:
        for step in itertools.count(2):
            save_checkpoint(root, step)
            shutil.rmtree(root / "checkpoints" / f"step-{step:08d}-a0001")
            if enough.is_set():
                return

    rotation = threading.Thread(target=rotate)
    rotation.start()
    try:
        answers = [http.get(f"/jobs/{run.id}/{listing}") for _ in range(40)]
    finally:
        enough.set()
        rotation.join()
    assert {answer.status_code for answer in answers} == {200}
    assert all("step-00000001-a0001" in answer.text for answer in answers)


def test_samples_come_by_step_and_of_a_repeated_step_the_newest(http: httpx2.Client, run: FakeRun) -> None:
    run.write(*(Sampled(step=step, prompt="a", text=f"old {step}") for step in (2, 4)))
    run.begin_attempt()
    run.write(Sampled(step=4, prompt="a", text="new 4"))
    samples = http.get(f"/jobs/{run.id}/samples").json()
    assert [(sample["step"], sample["text"]) for sample in samples] == [(2, "old 2"), (4, "new 4")]


def test_a_file_of_a_run_is_offered_for_download_never_shown(
    http: httpx2.Client, run: FakeRun, settings: Settings
) -> None:
    file = settings.runs / run.id / "export" / "page.html"
    file.parent.mkdir()
    file.write_text("<script>alert(1)</script>")
    listed = {one["path"]: one["bytes"] for one in http.get(f"/jobs/{run.id}/artifacts").json()["data"]}
    assert listed["export/page.html"] == 25
    answer = http.get(f"/jobs/{run.id}/artifacts/export/page.html")
    assert answer.text == file.read_text()
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment")
    part = http.get(f"/jobs/{run.id}/artifacts/export/page.html", headers={"Range": "bytes=1-6"})
    assert (part.status_code, part.text) == (206, "script")
    for bad in ("bytes=99-", "lines=1-2", "bytes=", "bytes=3-1"):
        refused = http.get(f"/jobs/{run.id}/artifacts/export/page.html", headers={"Range": bad})
        assert (refused.status_code, refused.json()["code"]) == (416, "bad_range"), bad
        assert refused.headers["content-range"] == "bytes */25"


def test_a_run_of_very_many_files_is_listed_page_by_page(http: httpx2.Client, run: FakeRun, settings: Settings) -> None:
    root = settings.runs / run.id
    for name in ("b/2", "b/1/x", "b-", "a", "c/1", "b/10", os.fsdecode(b"b/odd-\xff")):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name[:1])
    listed, after = [], ""
    while after is not None:
        page = http.get(f"/jobs/{run.id}/artifacts", params={"limit": 2, "after": after}).json()
        listed += [one["path"] for one in page["data"]]
        assert page["has_more"] == (page["next"] is not None) and len(page["data"]) <= 2
        after = page["next"]
    expected = ["a", "attempts/0001/events.jsonl", "b/1/x", "b/10", "b/2", "b/odd-\\xff", "b-", "c/1"]
    assert listed == expected


@pytest.mark.parametrize("state", ["[]", "1", '{"sizes": []}', '{"sizes": {"\\u0000": 1}}', "[" * 9999, "\udcff"])
def test_a_damaged_checkpoint_is_passed_over(http: httpx2.Client, run: FakeRun, settings: Settings, state: str) -> None:
    save_checkpoint(settings.runs / run.id, 4)
    checkpoint = save_checkpoint(settings.runs / run.id, 8)
    (checkpoint / "state.json").write_text(state, errors="surrogateescape")
    assert [one["step"] for one in http.get(f"/jobs/{run.id}/checkpoints").json()] == [4]


def test_a_log_that_is_a_link_out_of_the_run_is_not_shown(
    http: httpx2.Client, run: FakeRun, settings: Settings
) -> None:
    (settings.home / "secret").write_text("secret\n")
    run.log_file.symlink_to(settings.home / "secret")
    assert http.get(f"/jobs/{run.id}/logs").status_code == 404
    run.end()
    stream = http.get(f"/jobs/{run.id}/logs", headers={"Accept": "text/event-stream"}).text
    assert "secret" not in stream and "event: end" in stream


CLIMBING = [
    "../secret", "%2e%2e/secret", "..%2fsecret", "export/../../../secret", "%2Fetc/passwd", "//etc/passwd", "link",
    "folder/secret", "circle", "", ".", "export", "a%00b", "a" * 300, "..%5csecret",
]  # fmt: skip


@pytest.mark.parametrize("path", CLIMBING)
def test_no_path_leads_out_of_a_run(http: httpx2.Client, run: FakeRun, settings: Settings, path: str) -> None:
    root = settings.runs / run.id
    (settings.runs / "secret").write_text("secret")
    (root / "export").mkdir()
    (root / "link").symlink_to(settings.runs / "secret")
    (root / "folder").symlink_to(settings.runs)
    (root / "circle").symlink_to(root / "circle")
    # a client that leaves paths as they are
    with closing(HTTPConnection(str(http.base_url.host), http.base_url.port)) as connection:
        connection.request("GET", f"/jobs/{run.id}/artifacts/{path}")
        answer = connection.getresponse()
        text = answer.read().decode()
    assert answer.status in (307, 404), path
    assert "root:" not in text and text != "secret"
    assert not {"link", "circle"} & {one["path"] for one in http.get(f"/jobs/{run.id}/artifacts").json()["data"]}
    inside = root / "export" / "real"
    inside.write_text("mine")
    (root / "alias").symlink_to(inside)
    assert http.get(f"/jobs/{run.id}/artifacts/alias").text == "mine"


def test_an_ended_job_is_deleted_with_all_that_it_left(
    http: httpx2.Client, client: Client, run: FakeRun, settings: Settings, store: Store, redis_url: str
) -> None:
    refused = http.delete(f"/jobs/{run.id}")
    assert (refused.status_code, refused.json()["code"]) == (409, "not_possible")
    assert "running: cancel it" in refused.json()["detail"]
    run.write(evaluated(1, 2.0))
    run.end()
    with shared(settings.runs / run.id / "attempts" / "0001" / "lock"):
        assert "still ending" in http.delete(f"/jobs/{run.id}").json()["detail"]
    assert (settings.runs / run.id).exists()
    client.delete(run.id)
    assert not (settings.runs / run.id).exists()
    assert http.get(f"/jobs/{run.id}").status_code == http.delete("/jobs/job-0").status_code == 404
    client.delete(run.id)  # as where the first answer was lost
    assert http.get("/jobs").json()["data"] == [] and store.read_events(run.id) == [] == status_changes(store, run.id)


@pytest.mark.parametrize(("where", "what"), [(Path, "rename"), (shutil, "rmtree")], ids=["rename", "rmtree"])
def test_a_job_deleted_twice_at_a_time_is_gone_for_both(
    run: FakeRun, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch, where: Any, what: str
) -> None:
    run.write(evaluated(1, 2.0))
    run.end()
    really = getattr(where, what)

    def outrun(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(where, what, really)
        delete_job(store, settings.runs, run.id)
        return really(*args, **options)

    monkeypatch.setattr(where, what, outrun)
    delete_job(store, settings.runs, run.id)
    assert list(settings.runs.iterdir()) == [] == store.list_jobs().data


def test_a_job_that_another_reads_from_stays_until_that_has_ended(
    http: httpx2.Client, run: FakeRun, store: Store
) -> None:
    run.end()
    child, _ = store.create_job(parse_spec(train_spec(init_from={"source": run.id})), None, parent_job_id=run.id)
    assert child.id in http.delete(f"/jobs/{run.id}").json()["detail"]
    http.post(f"/jobs/{child.id}/cancel")
    assert http.delete(f"/jobs/{run.id}").status_code == 204
    assert http.get(f"/jobs/{child.id}").json()["parent_job_id"] == run.id


def test_files_are_back_where_a_job_that_reads_them_came_as_they_were_deleted(
    run: FakeRun, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.write(evaluated(1, 2.0))
    run.end()
    really = Path.rename

    def slowly(path: Path, target: Path) -> Path:
        store.create_job(parse_spec(train_spec(init_from={"source": run.id})), None)
        return really(path, target)

    monkeypatch.setattr(Path, "rename", slowly)
    with pytest.raises(NotPossible, match="reads its files"):
        delete_job(store, settings.runs, run.id)
    assert (settings.runs / run.id / "attempts" / "0001" / "events.jsonl").exists()


def test_a_late_repeat_of_a_deleted_jobs_submission_starts_nothing(http: httpx2.Client) -> None:
    headers = {"Idempotency-Key": "k"}
    job_id = http.post("/jobs", json=train_spec(), headers=headers).json()["id"]
    http.post(f"/jobs/{job_id}/cancel")
    assert http.delete(f"/jobs/{job_id}").status_code == 204
    answer = http.post("/jobs", json=train_spec(), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_conflict")
    assert "was deleted" in answer.json()["detail"] and http.get("/jobs").json()["data"] == []


# ---- again, with changes

REPEATS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"max_steps": 99, "name": "again"}, {"max_steps": 99, "name": "again"}),
    ({"optim": {"lr": 0.1, "min_lr": 0.05}}, {"optim": {"lr": 0.1, "min_lr": 0.05}}),
    ({"model": {"n_layer": 2}}, {"model": {"preset": "llama-tiny", "block_size": 32, "n_layer": 2}}),
    # widths that follow from n_embd follow again; another preset replaces the model
    ({"model": {"n_embd": 96}}, {"model": {"preset": "llama-tiny", "block_size": 32, "n_embd": 96}}),
    ({"model": {"preset": "gpt2-tiny"}}, {"model": {"preset": "gpt2-tiny"}}),
    ({"labels": {"a": "2", "b": None}}, {"labels": {"a": "2"}}),
    ({"labels": None}, {"labels": {}}),
    ({"init_from": {"source": "hf://me/it", "optimizer": None}}, {"init_from": {"source": "hf://me/it"}}),
]


@pytest.mark.parametrize(("overrides", "change"), REPEATS)
def test_a_job_done_again_has_the_spec_that_its_changes_make(
    http: httpx2.Client, overrides: dict[str, Any], change: dict[str, Any]
) -> None:
    spec = train_spec(labels={"a": "1", "b": "2"}, tokens_per_step=2048)
    first = http.post("/jobs", json=spec).json()
    body = {"from": first["id"], "overrides": overrides}
    again = http.post("/jobs", json=body)
    assert again.status_code == 201, again.text
    assert again.json()["id"] != first["id"]
    if overrides == {"labels": {"a": "2", "b": None}}:
        assert again.json()["spec"]["labels"] == {"a": "2"}
    wanted = http.post("/jobs/plan", json={**spec, **change}).json()["spec"]
    assert again.json()["spec"] == wanted == http.post("/jobs/plan", json=body).json()["spec"]


DEEP: Any = 1
for _ in range(400):
    DEEP = {"a": DEEP}

BAD_REPEATS: dict[str, tuple[dict[str, Any], str]] = {
    "no such job": ({"from": "job-0"}, "/from"),
    "no id": ({"from": 3}, "/from"),
    "an unknown field": ({"from": "x", "override": {}}, "/override"),
    "a bad value": ({"from": "", "overrides": {"optim": {"lr": -1}}}, "/overrides/optim/lr"),
    "a missing field": ({"from": "", "overrides": {"data": None}}, "/overrides/data"),
    "of another kind": ({"from": "", "overrides": {"kind": "eval"}}, "/overrides/kind"),
    "what cannot run": ({"from": "", "overrides": {"tokens_per_step": 100}}, "/overrides/tokens_per_step"),
    "no characters": ({"from": "", "overrides": {"labels": {"a": "\ud800"}}}, "/overrides/labels/a"),
    "another kind": ({"from": "", "overrides": {"kind": "trian"}}, "/overrides/kind"),
    "too deep": ({"from": "", "overrides": {"labels": DEEP}}, "/overrides"),
}


@pytest.mark.parametrize(("body", "pointer"), BAD_REPEATS.values(), ids=BAD_REPEATS)
def test_a_bad_repeat_is_refused_by_field(http: httpx2.Client, body: dict[str, Any], pointer: str) -> None:
    job = http.post("/jobs", json=train_spec()).json()
    text = json.dumps(body | ({"from": job["id"]} if body["from"] == "" else {}))
    answer = http.post("/jobs", content=text, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_spec"), answer.text
    assert any(error["pointer"].startswith(pointer) for error in answer.json()["errors"]), answer.json()
    assert len(http.get("/jobs").json()["data"]) == 1


def test_jobs_are_found_by_name(http: httpx2.Client) -> None:
    for name in ("a", "b", "a"):
        http.post("/jobs", json=train_spec(name=name))
    assert [job["name"] for job in http.get("/jobs", params={"name": "a"}).json()["data"]] == ["a", "a"]
    assert http.get("/jobs", params={"name": "a", "status": "failed"}).json()["data"] == []


# ---- logs as they come


def test_a_log_is_followed_line_by_line_over_attempts_to_its_end(
    http: httpx2.Client, new_run: Callable[..., FakeRun]
) -> None:
    run = new_run()
    run.log_file.write_bytes("één\ntwo\n\n50 %\r100 %\nthr".encode())
    with stream(http, f"/jobs/{run.id}/logs") as messages:
        first = next(messages)
        assert (first.event, first.id, first.data) == ("log", "1-22", "één\ntwo\n\n50 %\n100 %")
        with run.log_file.open("ab") as file:
            file.write(b"ee\nfour")
        assert next(messages).data == "three"
        run.begin_attempt()
        assert next(messages).data == "four"  # no more of it will come
        run.log_file.write_text("soon in the older part\n")
        assert next(messages).data == "soon in the older part"
        run.log_file.write_text("again\nlast")
        again = next(messages)
        assert again.data == "again"
        run.end()
        assert [(m.event, m.data) for m in messages] == [("log", "last"), ("end", '{"status": "succeeded"}')]
    with stream(http, f"/jobs/{run.id}/logs", **{"Last-Event-ID": again.id}) as messages:
        assert [m.data for m in messages] == ["last", '{"status": "succeeded"}']
    with stream(http, f"/jobs/{run.id}/logs", **{"Last-Event-ID": first.id}) as messages:
        assert [m.data for m in messages][:2] == ["three", "four"]
