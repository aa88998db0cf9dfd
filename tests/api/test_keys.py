"""Keys: who may do what, what is kept of them, and what is written down about their use."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis

from api import guard, refusals, stream
from tests.api.server import FakeRun, Server, step, train_spec
from tests.conftest import status_changes, wait_until
from trainmaster import Client, TrainmasterError
from trainmaster.mistake import Mistake
from trainmaster.serve import listen
from worker import keyring
from worker.keyring import AUDIT, MARKER, SCOPES, AuditKind, KeyRing, Scope
from worker.settings import Settings
from worker.store import Store

STREAM = {"Accept": "text/event-stream"}
Ask = Callable[..., httpx2.Response]


@pytest.fixture
def ring(settings: Settings) -> Iterator[KeyRing]:
    ring = KeyRing(settings.redis_url, settings.home)
    yield ring
    ring.close()


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


def test_what_each_scope_may(http: httpx2.Client, ring: KeyRing, run: FakeRun) -> None:
    texts: dict[Scope | None, str] = {scope: ring.create(scope, scope)[1] for scope in SCOPES}
    needed = {
        ("GET", f"/jobs/{run.id}"): "read",
        ("GET", f"/jobs/{run.id}/metrics"): "read",
        ("GET", "/docs/oauth2-redirect"): "read",  # what nobody thought of is closed
        ("GET", "/no/such/path"): "read",
        ("POST", "/jobs/plan"): "submit",
        ("POST", f"/jobs/{run.id}/cancel"): "submit",
        ("PATCH", "/workers/node"): "admin",
        ("DELETE", f"/jobs/{run.id}"): "admin",
        ("PUT", "/jobs"): "admin",
        ("GET", "/audit"): "admin",
    }
    for (method, path), scope in needed.items():
        body = {"json": train_spec()} if path.endswith("plan") else {}
        assert http.request(method, path, **body).json()["code"] == "key_missing", path
        for held, text in texts.items():
            answer = http.request(method, path, headers=bearer(text), **body)
            allowed = SCOPES.index(held) >= SCOPES.index(scope)
            assert (answer.status_code not in (401, 403)) == allowed, (method, path, held)
            if not allowed:
                assert answer.json()["code"] == "scope_too_small" and scope in answer.json()["detail"]


def test_what_needs_no_key_tells_nothing_of_runs(http: httpx2.Client, ring: KeyRing) -> None:
    ring.create("a", "read")
    for path in ("/", "/healthz", "/docs", "/openapi.json", "/static/app.js"):
        assert http.get(path).status_code == 200, path
    assert http.get("/static/%2e%2e/jobs").status_code == 404
    assert http.get("/readyz").json()["code"] == "no_worker"


WRONG = ["", "Bearer", "Bearer x", "Bearer tm_{id}_", "Bearer tm_{id}_{other}", "Basic {text}", "Bearer {text}x"]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_key_is_refused_and_says_how(http: httpx2.Client, ring: KeyRing, wrong: str) -> None:
    key, text = ring.create("mine", "admin")
    other = ring.create("other", "admin")[1].split("_", 2)[2]
    header = wrong.format(id=key.id, text=text, other=other)
    answer = http.get("/jobs", headers={"Authorization": header})
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert (
        answer.json()["code"] in ("key_missing", "key_unknown") and "Authorization: Bearer" in answer.json()["detail"]
    )
    assert http.get("/jobs", headers=bearer(text)).status_code == 200


def test_a_revoked_key_opens_nothing_from_then_on(http: httpx2.Client, ring: KeyRing) -> None:
    (key, text), _ = ring.create("lost", "admin"), ring.create("kept", "admin")
    assert http.get("/jobs", headers=bearer(text)).status_code == 200
    assert ring.revoke(key.id) and not ring.revoke(key.id)
    assert http.get("/jobs", headers=bearer(text)).json()["code"] == "key_unknown"


def test_beyond_loopback_nothing_is_open_even_without_a_key(settings: Settings) -> None:
    with Server(settings, open_without_keys=False) as server:
        assert server.http.get("/jobs").status_code == 401
        assert server.http.get("/healthz").status_code == 200


def test_a_server_that_lost_its_keys_serves_nobody_and_says_the_way_out(
    http: httpx2.Client, ring: KeyRing, settings: Settings, redis_url: str
) -> None:
    assert http.get("/jobs").status_code == 200
    ring.create("mine", "admin")
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    refused = http.get("/jobs")
    assert refused.status_code == 401 and MARKER in refused.json()["detail"]
    (settings.home / MARKER).unlink()
    assert http.get("/jobs").status_code == 200


def test_a_server_that_finds_keys_remembers_them(http: httpx2.Client, ring: KeyRing, settings: Settings) -> None:
    _, text = ring.create("made from another home", "admin")
    for headers in ({}, bearer(text)):
        (settings.home / MARKER).unlink(missing_ok=True)
        http.get("/jobs", headers=headers)
        assert (settings.home / MARKER).exists()


@pytest.mark.parametrize(
    "public", [{"url": "https://box.example"}, {"url": "box:8000"}, {"hosts": ("box.example:80",)}]
)
def test_under_a_public_name_nothing_is_open_without_a_key(settings: Settings, public: dict[str, Any]) -> None:
    with Server(replace(settings, **public)) as server:
        assert server.http.get("/jobs").status_code == 401
    with pytest.raises(Mistake, match=r"box.* is reachable from other machines and there is no API key"):
        listen("127.0.0.1", 0, replace(settings, **public))


def test_what_a_proxy_passes_on_needs_a_key(http: httpx2.Client) -> None:
    answer = http.get("/jobs", headers={"X-Forwarded-For": "192.0.2.7"})
    assert answer.status_code == 401 and "X-Forwarded-For" in answer.json()["detail"]


def test_no_key_can_be_read_back_from_redis_logs_events_or_errors(
    http: httpx2.Client, ring: KeyRing, store: Store, run: FakeRun, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    _, text = ring.create("mine", "submit")
    secret = text.split("_", 2)[2]
    answers = [
        http.post("/jobs", json=train_spec(), headers=bearer(text)),
        http.post("/jobs", json={"kind": "?"}, headers=bearer(text)),
        http.get("/audit", headers=bearer(text)),
        http.get("/jobs", headers=bearer(text + "x")),
        http.post(f"/jobs/{run.id}/cancel", headers=bearer(text)),
    ]
    assert [answer.status_code for answer in answers] == [201, 422, 403, 401, 200]
    assert all(secret not in answer.text and secret not in str(answer.headers) for answer in answers)
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        dump = "".join(str(_everything(client, name)) for name in client.scan_iter())
    assert "mine" in dump and secret not in dump
    assert secret not in caplog.text and secret not in repr(Settings(home=run.log_file, api_key=text))


def _everything(client: redis.Redis, name: str) -> object:
    match client.type(name):
        case "hash":
            return client.hgetall(name)
        case "stream":
            return client.xrange(name)
        case "zset":
            return client.zrange(name, 0, -1)
        case "list":
            return client.lrange(name, 0, -1)
        case kind:
            return client.get(name) if kind == "string" else client.smembers(name)


def test_the_audit_says_who_did_what(http: httpx2.Client, ring: KeyRing, store: Store, run: FakeRun) -> None:
    key, text = ring.create("mine", "admin")
    http.post(f"/jobs/{run.id}/cancel", headers=bearer(text))
    http.post("/jobs", json={}, headers=bearer(text))
    ring.revoke(ring.create("b", "read")[0].id)
    entries = http.get("/audit", headers=bearer(text)).json()
    said = [(entry["who"], entry["what"].split(" (")[0], entry["outcome"]) for entry in entries]
    assert said[2:] == [
        (f"key {key.id}", "POST /jobs", "422"),
        (f"key {key.id}", f"POST /jobs/{run.id}/cancel", "200"),
        ("command line", f"create key {key.id}", "created"),
    ]
    assert [outcome for _, _, outcome in said[:2]] == ["revoked", "created"]
    assert status_changes(store, run.id)[-1].who == f"key {key.id}"


def test_a_job_belongs_to_the_name_of_the_key_that_submitted_it(
    http: httpx2.Client, ring: KeyRing, store: Store
) -> None:
    nobodys = http.post("/jobs", json=train_spec()).json()
    key, text = ring.create("ci", "submit")
    http.headers.update(bearer(text))
    owned = http.post("/jobs", json=train_spec(evaluate={"final_tasks": ["val_loss"]})).json()
    assert (nobodys["owner"], owned["owner"]) == ("local", "ci")
    listed = http.get("/jobs", params={"owner": "ci"}).json()["data"]
    assert [job["kind"] for job in listed] == ["eval", "train"]
    assert status_changes(store, owned["id"])[0].who == f"key {key.id}"


def test_nobody_without_a_key_writes_the_audit(http: httpx2.Client, ring: KeyRing) -> None:
    ring.create("a", "read")
    kinds: tuple[AuditKind, ...] = ("administration", "requests")
    before = len(ring.audit(kinds))
    for path in ("/", "/healthz", "/static/app.js", "/jobs"):
        assert http.post(path).status_code in (401, 405)
    assert len(ring.audit(kinds)) == before


def test_the_audit_names_the_job_that_was_submitted_or_changed(http: httpx2.Client, ring: KeyRing) -> None:
    _, text = ring.create("mine", "admin")
    job_id = http.post("/jobs", json=train_spec(), headers=bearer(text)).json()["id"]
    http.post(f"/jobs/{job_id}/cancel", headers=bearer(text))
    http.delete(f"/jobs/{job_id}", headers=bearer(text))
    entries = http.get("/audit", headers=bearer(text)).json()
    assert [(entry["kind"], entry["job_id"]) for entry in entries] == [
        ("administration", job_id),
        ("requests", job_id),
        ("requests", job_id),
        ("administration", None),
    ]


def test_a_submit_key_cannot_push_administration_out_of_the_audit(
    http: httpx2.Client, ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "SECONDS", 0.1)
    monkeypatch.setattr(keyring, "AUDIT", {kind: (name, 10) for kind, (name, _) in AUDIT.items()})
    admin, text = ring.create("mine", "admin")[1], ring.create("other", "submit")[1]
    http.patch("/workers/none", json={"schedulable": False}, headers=bearer(admin))
    for _ in range(250):
        ring.record("requests", "key of scope submit", "POST /jobs/plan", "200")
    for _ in range(30):
        assert http.patch("/workers/none", json={"schedulable": True}, headers=bearer(text)).status_code == 403
    entries = http.get("/audit?kind=administration", headers=bearer(admin)).json()
    assert [entry["what"].partition(" ")[0] for entry in entries] == ["PATCH", "create", "create"]
    assert len(http.get("/audit", params={"kind": "requests", "limit": 1000}, headers=bearer(admin)).json()) < 250


def test_refused_requests_are_counted_together_in_the_audit(
    http: httpx2.Client, ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "SECONDS", 0.3)
    key, text = ring.create("mine", "read")
    for path in [*["/jobs"] * 20, "/workers"]:
        http.get(path)
    http.post("/jobs", json=train_spec(), headers=bearer(text))
    http.get("/jobs", headers={"Host": "evil.example"})
    wait_until(lambda: sum(entry.count for entry in ring.audit(["refusals"])) == 23)
    newest = {(entry.who, entry.outcome): entry.what for entry in reversed(ring.audit(["refusals"]))}
    assert newest == {
        ("127.0.0.1", "401 key_missing"): "GET /workers",
        (f"key {key.id}", "403 scope_too_small"): "POST /jobs",
        ("127.0.0.1", "403 foreign_host"): "GET /jobs",
    }
    assert len(ring.audit(["refusals"])) <= 6  # of three kinds, in at most two spans of time


def test_a_key_is_checked_while_slow_requests_hold_every_thread(
    server: Server, ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    thaws, asked = threading.Event(), []
    monkeypatch.setattr(Store, "get_job", lambda *_: asked.append(1) or thaws.wait(20))
    headers = bearer(ring.create("mine", "read")[1])
    limits = httpx2.Limits(max_connections=None)
    with httpx2.Client(base_url=server.url, headers=headers, timeout=30, trust_env=False, limits=limits) as http:
        with ThreadPoolExecutor(60) as pool:
            waiting = [pool.submit(http.get, "/jobs/job-0/artifacts/x") for _ in range(60)]
            try:
                wait_until(lambda: len(asked) >= 40)
                assert http.get("/no/such/path", timeout=5).status_code == 404
                assert http.get("/no/such/path", timeout=5, headers=bearer("tm_x_y")).status_code == 401
            finally:
                thaws.set()
    assert {one.result().status_code for one in waiting} == {404}


def test_a_stream_ends_once_its_key_is_revoked(
    http: httpx2.Client, ring: KeyRing, run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "RECHECK_SECONDS", 0.0)
    run.write(step(1))
    (key, text), _ = ring.create("lost", "read"), ring.create("kept", "read")
    with http.stream("GET", f"/jobs/{run.id}/events", headers=bearer(text) | STREAM) as answer:
        read = httpx2.EventSource(answer)
        types = []
        for event in read:
            types.append(event.event)
            if event.event == "step":
                ring.revoke(key.id)
                run.write(step(2))
    assert types.count("step") == 1 and "end" not in types


def test_a_quiet_stream_ends_once_its_key_is_revoked(
    http: httpx2.Client, ring: KeyRing, run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "RECHECK_SECONDS", 0.0)
    monkeypatch.setattr(stream, "KEEPALIVE_SECONDS", 0.2)
    run.log_file.write_text("a line\n")
    (key, text), _ = ring.create("lost", "read"), ring.create("kept", "read")
    with http.stream("GET", f"/jobs/{run.id}/logs", headers=bearer(text) | STREAM) as answer:
        lines = answer.iter_lines()
        assert next(line for line in lines if line.startswith("data")) == "data: a line"
        assert next(line for line in lines if line.startswith(":"))  # kept alive
        ring.revoke(key.id)
        assert "event: end" not in list(lines)  # closed with the next sign of life


def test_the_first_key_is_made_once(ring: KeyRing, tmp_path: Path) -> None:
    file = tmp_path / "api-key"
    ring.create_first(file)
    [first] = ring.all()
    assert ring.find(file.read_text().strip()) == first
    ring.create_first(file)
    assert ring.all() == [first]
    ring.revoke(first.id)
    ring.create_first(file)  # who revokes the last key closes the server
    assert ring.is_empty()


def test_the_client_sends_the_key_of_the_environment(
    server: Server, ring: KeyRing, monkeypatch: pytest.MonkeyPatch, run: FakeRun
) -> None:
    _, text = ring.create("mine", "read")
    with Client(server.url) as client, pytest.raises(TrainmasterError, match="keys create") as caught:
        client.jobs()
    assert (caught.value.status, caught.value.code) == (401, "key_missing")
    monkeypatch.setenv("TRAINMASTER_API_KEY", f"{text}\n")  # as `cat` of a file gives it
    run.end()
    with Client(server.url) as client:
        assert client.jobs()["data"] and list(client.events(run.id))


def test_openapi_says_which_scope_an_operation_needs(http: httpx2.Client) -> None:
    schema = http.get("/openapi.json").json()
    assert schema["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert schema["paths"]["/jobs"]["get"]["security"] == [{"key": ["read"]}]
    assert schema["paths"]["/workers/{node_id}"]["patch"]["security"] == [{"key": ["admin"]}]
    assert "security" not in schema["paths"]["/healthz"]["get"]
