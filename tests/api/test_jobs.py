"""Submitting, planning, finding and cancelling jobs over HTTP."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx2
import pytest

from gptcore.native import native_config
from gptcore.spec import ModelSpec
from tests.api.server import FakeRun, Server, node, train_spec
from tests.gptcore.hub_server import Handler
from worker.job import Node
from worker.place import runs_root_id
from worker.settings import Settings
from worker.store import Store


def test_a_submitted_job_is_queued_and_found_where_location_says(http: httpx2.Client) -> None:
    answer = http.post("/jobs", json=train_spec(labels={"who": "me"}))
    assert answer.status_code == 201
    job = answer.json()
    assert http.get(answer.headers["location"]).json() == job
    assert (job["status"], job["queue_position"], job["total_steps"]) == ("queued", 1, 12)
    assert job["created_at"].endswith("Z")
    assert [other["id"] for other in http.get("/jobs", params={"label": "who=me"}).json()["data"]] == [job["id"]]
    assert http.get("/jobs", params={"status": "running"}).json()["data"] == []


def test_what_is_stored_is_explicit(http: httpx2.Client) -> None:
    model = http.post("/jobs", json=train_spec()).json()["spec"]["model"]
    assert (model["vocab_size"], model["n_layer"], model["mlp"]) == (256, 4, "swiglu")


def test_a_plan_has_the_numbers_of_the_job_and_queues_nothing(http: httpx2.Client, store: Store) -> None:
    planned = http.post("/jobs/plan", json=train_spec()).json()
    assert store.list_jobs().data == []
    job = http.post("/jobs", json=train_spec()).json()
    assert (job["spec"], job["plan"]) == (planned["spec"], planned["plan"])
    assert planned["plan"]["total_tokens"] == 12 * 256


def test_without_a_worker_a_job_is_queued_with_a_warning(http: httpx2.Client, store: Store) -> None:
    def warnings() -> str:
        return " ".join(http.post("/jobs/plan", json=train_spec()).json()["plan"]["warnings"])

    assert "pool default has no live worker" in warnings()
    store.register_node(node(1))
    assert "worker" not in warnings()


def gpu_node(ranks: int, name: str) -> Node:
    """A node whose one slot has that many GPUs."""
    slot = node(ranks, name=name).slots[0]
    hardware = slot.hardware.model_copy(update={"device": "cuda"})
    return node(ranks, name=name).model_copy(update={"slots": [slot.model_copy(update={"hardware": hardware})]})


@pytest.mark.parametrize("gpu_name", ["a", "z"])
def test_a_job_runs_on_the_device_that_its_plan_is_for(http: httpx2.Client, store: Store, gpu_name: str) -> None:
    """Whatever the order of the nodes, and although a CPU is idle."""
    store.register_node(node(1, name="m"))
    store.register_node(gpu_node(1, gpu_name))
    changes = {"evaluate": {"final_tasks": ["val_loss"]}}
    for number in range(10):
        job = http.post("/jobs", json=train_spec(**(changes if number else {}))).json()
        assert job["plan"]["device"] == "cuda"
        assert store.reserve("default") == 1
        assert [part.node for part in store.get_job(job["id"]).nodes] == [gpu_name]
        assert store.reserve("default") == 0
        store.request_cancel(job["id"])
    wanted = {job.kind: store.record(job.id)["wanted_device"] for job in store.list_jobs(limit=100).data}
    assert wanted == {"train": "cuda", "eval": "cuda"}


def test_a_job_says_that_the_device_of_its_plan_left_the_pool(http: httpx2.Client, store: Store) -> None:
    for name in "ab":
        store.register_node(node(1, name=name))
        store.register_node(gpu_node(1, f"gpu-{name}"))
    job_id = http.post("/jobs", json=train_spec()).json()["id"]
    wide_id = http.post("/jobs", json=train_spec(resources={"nodes": 2})).json()["id"]
    for name in "ab":
        store.retire_node(f"gpu-{name}")
    assert store.reserve("default") == 0
    for waiting in (job_id, wide_id):
        why = store.get_job(waiting).status_reason
        assert "0 live with a GPU as planned; start such a worker, or submit the job again" in why
    again = http.post("/jobs", json=train_spec()).json()
    assert again["plan"]["device"] == "cpu" and store.reserve("default") == 1


def test_without_a_live_worker_a_job_runs_on_whatever_joins(http: httpx2.Client, store: Store) -> None:
    job_id = http.post("/jobs", json=train_spec()).json()["id"]
    assert http.post("/jobs/plan", json=train_spec()).json()["device"] is None
    store.register_node(gpu_node(1, "gpu"))
    assert store.reserve("default") == 1 and store.get_job(job_id).nodes[0].node == "gpu"


def test_workers_whose_runs_the_server_cannot_show_are_warned_of(
    http: httpx2.Client, store: Store, settings: Settings
) -> None:
    def warnings() -> str:
        return " ".join(http.post("/jobs/plan", json=train_spec()).json()["plan"]["warnings"])

    store.register_node(node(1).model_copy(update={"runs_root": "elsewhere"}))
    assert f"no worker of pool default shares this server's TRAINMASTER_HOME, {settings.home}" in warnings()
    store.register_node(node(1, name="other").model_copy(update={"runs_root": runs_root_id(settings)}))
    assert "this server's" not in warnings()


BAD = {
    "an unknown field": (train_spec(max_step=3), "/max_step", ["max_step is no field", "max_steps"]),
    "an unknown kind": (train_spec(kind="trian"), "/kind", ["kind 'trian'", "train, prepare"]),
    "no kind": ({"name": "x"}, "/kind", ["missing", "train, prepare"]),
    "a text for a number": (train_spec(max_steps="12"), "/max_steps", ["max_steps '12'", "integer"]),
    "a truth for a number": (train_spec(max_steps=True), "/max_steps", ["max_steps True", "integer"]),
    "a missing field": ({"kind": "train", "name": "x"}, "/model", ["model is missing"]),
    "n_embd not divisible by n_head": (
        train_spec(model={"preset": "llama-tiny", "n_embd": 100, "n_head": 3}),
        "/model/n_embd",
        ["n_embd 100", "n_head 3", "use n_head 1, 2, 4"],
    ),
    "tokens_per_step not divisible": (
        train_spec(tokens_per_step=300),
        "/tokens_per_step",
        ["tokens_per_step 300", "block_size 32", "use 288 or 320"],
    ),
    "an unknown dataset": (
        train_spec(data={"dataset": "python-stdlbi"}),
        "/data/dataset",
        ["dataset 'python-stdlbi'", "did you mean python-stdlib"],
    ),
    "more ranks than any slot has": (
        train_spec(tokens_per_step=512, resources={"ranks_per_node": 4}),
        "/resources/ranks_per_node",
        ["ranks_per_node 4", "use 2 or fewer"],
    ),
    "a device the pool has not": (
        train_spec(resources={"device": "cuda"}),
        "/resources/device",
        ["device cuda", "use cpu or auto"],
    ),
    "an unknown preset": (
        train_spec(model={"preset": "lama-tiny"}),
        "/model/preset",
        ["preset 'lama-tiny'", "llama-tiny"],
    ),
    "a text that is not there": (
        {"kind": "prepare", "name": "p", "dataset": "d", "source": {"format": "text", "path": "no.txt"}},
        "/source/path",
        ["'no.txt'", "put the text there"],
    ),
    "a path out of the data root": (
        {"kind": "prepare", "name": "p", "dataset": "d", "source": {"format": "text", "path": "../x"}},
        "/source/path",
        ["'../x'", "relative path"],
    ),
    "a built-in dataset's name": (
        {"kind": "prepare", "name": "p", "dataset": "fineweb-10bt", "source": {"format": "text", "path": "x"}},
        "/dataset",
        ["'fineweb-10bt' is the name of a built-in dataset; use another name"],
    ),
    "a name of another purpose": (
        {"kind": "prepare", "name": "p", "dataset": "sources", "source": {"format": "shards", "path": "x"}},
        "/dataset",
        ["'sources' is the name of a folder with another purpose"],
    ),
    "more tokens than a shard's header can count": (
        {
            "kind": "prepare",
            "name": "p",
            "dataset": "d",
            "source": {"format": "text", "path": "x"},
            "shard_tokens": 2**31,
        },
        "/shard_tokens",
        ["2147483648", "less than 2147483648"],
    ),
    "an address that ends with a line": (
        train_spec(init_from={"source": "hf://a/b\n"}),
        "/init_from/source",
        ["has control characters"],
    ),
    "a name too long for a file": (
        {"kind": "prepare", "name": "p", "dataset": "d", "source": {"format": "text", "path": "x" * 300}},
        "/source/path",
        ["put the text there"],
    ),
    "a source too long for a folder": (
        {"kind": "eval", "name": "e", "source": "x" * 300, "tasks": ["val_loss"]},
        "/source",
        ["is no job"],
    ),
    "first weights of no job": (
        train_spec(init_from={"source": "job-nowhere"}),
        "/init_from/source",
        ["'job-nowhere'", "is no job"],
    ),
    "the Hub's optimiser": (
        train_spec(init_from={"source": "hf://someone/gpt", "optimizer": True}),
        "/init_from/source",
        ["hf://someone/gpt", "leave optimizer out"],
    ),
    "a source with a NUL": (
        {"kind": "eval", "name": "e", "source": "a\0b", "tasks": ["val_loss"]},
        "/source",
        ["has control characters"],
    ),
}


@pytest.mark.parametrize("path", ["/jobs", "/jobs/plan"])
@pytest.mark.parametrize(("spec", "pointer", "words"), BAD.values(), ids=BAD)
def test_a_spec_that_cannot_run_is_refused_with_field_value_and_way_out(
    http: httpx2.Client,
    store: Store,
    settings: Settings,
    path: str,
    spec: dict[str, Any],
    pointer: str,
    words: list[str],
) -> None:
    for folder in (settings.runs, settings.datasets / "sources"):
        folder.mkdir(parents=True)
    store.register_node(node(2))
    answer = http.post(path, json=spec)
    problem = answer.json()
    assert (answer.status_code, problem["status"], problem["code"]) == (422, 422, "invalid_spec")
    assert answer.headers["content-type"] == "application/problem+json"
    error = next(error for error in problem["errors"] if error["pointer"] == pointer)
    assert [word for word in words if word not in error["message"]] == [], error
    assert error["message"] in problem["detail"]
    assert store.list_jobs().data == []


def test_first_weights_are_looked_at_before_a_job_is_queued(http: httpx2.Client, settings: Settings) -> None:
    spec = train_spec(init_from={"source": "first"})
    model = http.post("/jobs/plan", json=train_spec()).json()["spec"]["model"]
    checkpoint = settings.runs / "first" / "checkpoints" / "step-00000004-a0001"
    checkpoint.mkdir(parents=True)
    (error,) = http.post("/jobs", json=spec).json()["errors"]
    assert error["pointer"] == "/init_from/source" and "has no checkpoint yet" in error["message"]
    (checkpoint / "state.json").write_text(
        json.dumps({"sizes": {}, "spec": train_spec(model=model, optim={"name": "adamw"})})
    )
    assert http.post("/jobs", json=spec).status_code == 201
    (error,) = http.post("/jobs", json=spec | {"model": spec["model"] | {"n_layer": 3}}).json()["errors"]
    assert "n_layer is 4 there, 3 here" in error["message"]
    other = {"data": {"dataset": "python-stdlib-gpt2"}, "model": model | {"vocab_size": 50257}}
    meta = json.loads((checkpoint / "state.json").read_text())
    meta["spec"]["model"]["vocab_size"] = 50257
    (checkpoint / "state.json").write_text(json.dumps(meta))
    (error,) = http.post("/jobs", json=spec | other).json()["errors"]
    assert "first has another tokenizer than dataset python-stdlib-gpt2: bytes there (256" in error["message"]


class FakeHub(Handler):
    """Gives the files in `files`, as the Hub does, through a redirect on its own host."""

    files: dict[str, bytes]

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            self.send_bytes(b"", 307, {"Location": self.path.replace("/resolve/", "/cached/")})
        elif (name := self.path.rpartition("/")[2]) in self.files:
            self.send_bytes(self.files[name], 200, {})
        else:
            self.send_json({"error": "Entry not found"}, 404)


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    files: dict[str, bytes] = {}
    hub = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (FakeHub,), {"files": files}))
    Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    yield files
    hub.shutdown()
    hub.server_close()


def test_a_config_is_compared_before_a_job_is_queued_wherever_it_lies(
    http: httpx2.Client, settings: Settings, fake_hub: dict[str, bytes]
) -> None:
    model = http.post("/jobs/plan", json=train_spec()).json()["spec"]["model"]
    config = json.dumps(native_config(ModelSpec.model_validate(model), "bytes")).encode()
    folder = settings.runs / "theirs"
    folder.mkdir(parents=True)
    shorter = train_spec(model=model | {"block_size": model["block_size"] // 2})
    for source in ("theirs", "hf://someone/gpt@main"):
        fake_hub.pop("tokenizer.json", None)
        for content, changes, said in (
            (config, {"model": model | {"n_layer": 3}}, "n_layer is 4 there, 3 here"),
            (b"[1]", {}, "is not a JSON object"),
            (config, shorter, ""),
            (config, {"model": model}, "'a' is 64 there, 97 in bytes; name a dataset prepared with the tokenizer of"),
        ):
            if said.startswith("'a'"):
                fake_hub["tokenizer.json"] = json.dumps({"model": {"vocab": {"a": 64, "Z": 90, "Ġ": 32}}}).encode()
                (folder / "tokenizer.json").write_bytes(fake_hub["tokenizer.json"])
            (folder / "config.json").write_bytes(content)
            fake_hub["config.json"] = content
            answer = http.post("/jobs/plan", json=train_spec(**changes) | {"init_from": {"source": source}})
            assert answer.status_code == (422 if said else 200), answer.json()
            assert said in str(answer.json().get("errors")), source


def test_a_hub_that_never_answers_delays_a_submission_by_seconds(
    http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptcore.init_check.HUB_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        began = time.monotonic()
        assert http.post("/jobs/plan", json=train_spec(init_from={"source": "hf://a/b"})).status_code == 200
        assert time.monotonic() - began < 5


def test_who_resumes_a_job_that_ended_is_told_how_to_go_on_from_its_checkpoint(
    http: httpx2.Client, settings: Settings
) -> None:
    job = http.post("/jobs", json=train_spec()).json()
    http.post(f"/jobs/{job['id']}/cancel")
    refused = http.post(f"/jobs/{job['id']}/resume")
    assert (refused.status_code, refused.json()["code"]) == (409, "not_possible")
    said, _, body = refused.json()["detail"].partition(" submit ")
    assert "is cancelled" in said
    assert "is no job with a run directory" in http.post("/jobs", json=json.loads(body)).json()["detail"]
    checkpoint = settings.runs / job["id"] / "checkpoints" / "step-00000004-a0001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"sizes": {}, "spec": job["spec"]}))
    more = http.post("/jobs", json=json.loads(body))
    assert more.status_code == 201
    changed = more.json()["spec"]["init_from"]
    assert {**more.json()["spec"], "init_from": None} == job["spec"]
    assert changed == {"source": job["id"], "optimizer": True}


def test_every_problem_of_a_spec_is_named_at_once(http: httpx2.Client) -> None:
    problem = http.post("/jobs", json=train_spec(max_steps=0, name="", typo=1)).json()
    assert {error["pointer"] for error in problem["errors"]} == {"/max_steps", "/name", "/typo"}


def test_a_prepare_job_is_accepted_once_its_text_is_there(http: httpx2.Client, settings: Settings) -> None:
    (settings.datasets / "sources").mkdir(parents=True)
    (settings.datasets / "sources" / "my.txt").write_text("once upon a time")
    spec = {"kind": "prepare", "name": "p", "dataset": "mine", "source": {"format": "text", "path": "my.txt"}}
    job = http.post("/jobs", json=spec).json()
    assert (job["kind"], job["plan"], job["total_steps"]) == ("prepare", None, None)
    spec["source"] = {"format": "hub", "repo": "someone/texts", "path": "data/*.parquet"}
    assert http.post("/jobs", json=spec).status_code == 201  # a path on the Hub is no path of ours


def test_posts_with_one_key_make_one_job(server: Server, store: Store) -> None:
    def post(spec: dict[str, Any], key: str) -> httpx2.Response:
        return server.http.post("/jobs", json=spec, headers={"Idempotency-Key": key})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(train_spec(), "k"), range(24)))
    assert {(answer.status_code, answer.json()["id"]) for answer in answers} == {(201, store.list_jobs().data[0].id)}
    assert {answer.headers["location"] for answer in answers} == {f"/jobs/{store.list_jobs().data[0].id}"}
    conflict = post(train_spec(name="other"), "k")
    assert (conflict.status_code, conflict.json()["code"]) == (422, "idempotency_conflict")
    assert "use a new key" in conflict.json()["detail"]
    assert post(train_spec(name="other"), "k2").status_code == 201
    assert len(store.list_jobs().data) == 2


def test_a_repeated_request_gets_its_first_answer_though_the_pool_has_shrunk(server: Server, store: Store) -> None:
    store.register_node(node(2, name="big"))
    spec = train_spec(resources={"ranks_per_node": 2})
    first = server.http.post("/jobs", json=spec, headers={"Idempotency-Key": "k"})
    assert first.status_code == 201
    store.retire_node("big")
    store.register_node(node(1, name="small"))
    again = server.http.post("/jobs", json=spec, headers={"Idempotency-Key": "k"})
    assert (again.status_code, again.json()["id"]) == (201, first.json()["id"])
    assert server.http.post("/jobs", json=spec, headers={"Idempotency-Key": "k2"}).status_code == 422


def test_a_page_of_jobs_leads_to_the_next(http: httpx2.Client) -> None:
    made = [http.post("/jobs", json=train_spec(name=f"n{i}")).json()["id"] for i in range(5)]
    seen, query = [], {"limit": "2"}
    while True:
        page = http.get("/jobs", params=query).json()
        seen += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            break
        query["after"] = page["next"]
    assert seen == made[::-1]


def test_cancelling_again_changes_nothing(http: httpx2.Client, new_run: Callable[..., FakeRun]) -> None:
    queued = http.post("/jobs", json=train_spec()).json()["id"]
    first, second = (http.post(f"/jobs/{queued}/cancel") for _ in range(2))
    assert first.json()["status"] == "cancelled" and first.json() == second.json()
    running = new_run().id
    first, second = (http.post(f"/jobs/{running}/cancel") for _ in range(2))
    assert (first.status_code, first.json()["status"]) == (200, "cancelling")
    assert first.json() == second.json()


def test_a_job_is_paused_and_resumed_and_what_is_not_possible_says_why(
    http: httpx2.Client, new_run: Callable[..., FakeRun]
) -> None:
    waiting = http.post("/jobs", json=train_spec()).json()["id"]
    assert [http.post(f"/jobs/{waiting}/pause").json()["status"] for _ in range(2)] == ["paused"] * 2
    assert [http.post(f"/jobs/{waiting}/resume").json()["status"] for _ in range(2)] == ["queued"] * 2
    http.post(f"/jobs/{waiting}/cancel")
    run = new_run()
    assert http.post(f"/jobs/{run.id}/pause").json()["status"] == "pausing"
    too_early = http.post(f"/jobs/{run.id}/resume")
    assert (too_early.status_code, too_early.json()["code"]) == (409, "not_possible")
    assert too_early.json()["detail"] == f"{run.id} is pausing; resume it once it is paused"
    for action in ("pause", "resume"):
        assert http.post(f"/jobs/{waiting}/{action}").status_code == 409
        assert http.post(f"/jobs/job-none/{action}").json()["code"] == "job_not_found"


def test_a_job_wider_than_its_pool_is_accepted_with_a_warning(http: httpx2.Client, store: Store) -> None:
    store.register_node(node(2))
    planned = http.post("/jobs/plan", json=train_spec(resources={"nodes": 2, "ranks_per_node": 2})).json()
    assert planned["plan"]["world_size"] == 4
    assert "pool default has 1 live nodes of 2; the job waits until more join" in planned["plan"]["warnings"]


def test_a_node_is_drained_and_used_again(http: httpx2.Client, store: Store) -> None:
    store.register_node(node(1))
    assert http.patch("/workers/node", json={"schedulable": False}).json()["schedulable"] is False
    assert http.get("/workers").json()[0]["schedulable"] is False
    assert http.patch("/workers/node", json={"schedulable": True}).json()["schedulable"] is True
    assert http.patch("/workers/none", json={"schedulable": True}).json()["code"] == "worker_not_found"


def test_datasets_presets_and_workers_say_what_a_spec_may_name(http: httpx2.Client, store: Store) -> None:
    store.register_node(node(2, 1))
    assert {"llama-tiny", "gpt2-124m"} <= http.get("/presets").json().keys()
    assert next(d["name"] for d in http.get("/datasets").json() if not d["prepared"]) == "python-stdlib"
    (only,) = http.get("/workers").json()
    assert only["live"] and [slot["hardware"]["ranks"] for slot in only["slots"]] == [2, 1]


def test_ready_means_redis_and_a_live_worker(http: httpx2.Client, store: Store) -> None:
    assert http.get("/healthz").json() == {"status": "ok"}
    assert (http.head("/healthz").status_code, http.head("/readyz").status_code) == (200, 503)
    assert (http.get("/readyz").status_code, http.get("/readyz").json()["code"]) == (503, "no_worker")
    store.register_node(node(1))
    assert http.get("/readyz").status_code == 200
    store.retire_node("node")
    assert http.get("/readyz").status_code == 503


def test_a_damaged_record_makes_no_page_fail(http: httpx2.Client, store: Store) -> None:
    job_id = http.post("/jobs", json=train_spec()).json()["id"]
    store._redis.hset(f"trainmaster:job:{job_id}", mapping={"status": "resting", "labels": "{"})
    for answer in (http.get("/jobs"), http.get(f"/jobs/{job_id}"), http.post(f"/jobs/{job_id}/cancel")):
        assert answer.status_code == 200 and "damaged" in answer.text
    assert http.get("/jobs").json()["data"][0]["damaged"] == ["labels"]  # cancelling mended its status
    assert http.get("/metrics").status_code == 200
