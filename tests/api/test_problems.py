"""Every error is problem+json, whoever refuses: a route, the framework, or the guard before both."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice, product
from string import ascii_letters
from typing import Any

import httpx2
import pytest

from api.guard import KEY_THREADS, MAX_BODY_BYTES
from tests.api.server import FakeRun, Server, train_spec
from tests.conftest import free_port, wait_until
from worker.keyring import KeyRing
from worker.settings import Settings
from worker.store import Store

JSON = {"Content-Type": "application/json"}


def chunks() -> Iterator[bytes]:
    """A body too large that does not say its length."""
    for _ in range(MAX_BODY_BYTES // 65_536 + 1):
        yield b" " * 65_536


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "no such path": ({"method": "GET", "url": "/nothing"}, 404, "not_found"),
    "no such static file": ({"method": "GET", "url": "/static/../app.py"}, 404, "not_found"),
    "a climbing static path": ({"method": "GET", "url": "/static/%2e%2e/app.py"}, 404, "not_found"),
    "another method": ({"method": "PUT", "url": "/jobs"}, 405, "method_not_allowed"),
    "no such job": ({"method": "GET", "url": "/jobs/job-0"}, 404, "job_not_found"),
    "an id that climbs": ({"method": "GET", "url": "/jobs/%2e%2e/metrics"}, 404, "job_not_found"),
    "an id with a slash": ({"method": "GET", "url": "/jobs/%2Fetc/metrics"}, 404, "not_found"),
    "no such job to cancel": ({"method": "POST", "url": "/jobs/job-0/cancel"}, 404, "job_not_found"),
    "no such job to stream": (
        {"method": "GET", "url": "/jobs/job-0/events", "headers": {"Accept": "text/event-stream"}},
        404,
        "job_not_found",
    ),
    "a limit out of range": ({"method": "GET", "url": "/jobs?limit=0"}, 422, "invalid_parameter"),
    "an unknown status": ({"method": "GET", "url": "/jobs?status=done"}, 422, "invalid_parameter"),
    "an unknown kind": ({"method": "GET", "url": "/jobs?kind=trian"}, 422, "invalid_parameter"),
    "a cursor in other digits": ({"method": "GET", "url": "/jobs?after=%D9%A3"}, 422, "invalid_parameter"),
    "a cursor from elsewhere": ({"method": "GET", "url": "/jobs?after=abc"}, 422, "invalid_parameter"),
    "an unknown curve": ({"method": "GET", "url": "/jobs/x/metrics?keys=loss"}, 422, "invalid_parameter"),
    "an event id that is none": (
        {"method": "GET", "url": "/jobs/x/events", "headers": {"Last-Event-ID": "$"}},
        422,
        "invalid_parameter",
    ),
    "broken JSON": ({"method": "POST", "url": "/jobs", "content": '{"kind"', "headers": JSON}, 400, "invalid_json"),
    "not UTF-8": ({"method": "POST", "url": "/jobs", "content": b'"\xff"', "headers": JSON}, 400, "invalid_json"),
    "a number too long": (
        {"method": "POST", "url": "/jobs", "content": "9" * 5000, "headers": JSON},
        400,
        "invalid_json",
    ),
    "an id of no characters": (
        {"method": "POST", "url": "/jobs", "content": r'{"from": "\ud800"}', "headers": JSON},
        422,
        "invalid_spec",
    ),
    "a field of no characters": (
        {"method": "POST", "url": "/jobs", "content": r'{"kind": "train", "\ud800": 1}', "headers": JSON},
        422,
        "invalid_spec",
    ),
    "deep JSON": (
        {"method": "POST", "url": "/jobs", "content": "[" * 1_900, "headers": JSON},
        400,
        "invalid_json",
    ),
    "no body": ({"method": "POST", "url": "/jobs", "headers": JSON}, 422, "invalid_spec"),
    "a list": ({"method": "POST", "url": "/jobs", "json": []}, 422, "invalid_spec"),
    "no type": ({"method": "POST", "url": "/jobs", "content": "{}"}, 415, "unsupported_media_type"),
    "a form": ({"method": "POST", "url": "/jobs", "data": {"kind": "train"}}, 415, "unsupported_media_type"),
    "a large body": (
        {"method": "POST", "url": "/jobs", "content": b" " * (MAX_BODY_BYTES + 1), "headers": JSON},
        413,
        "content_too_large",
    ),
    "a large body in chunks": (
        {"method": "POST", "url": "/jobs", "content": chunks, "headers": JSON},
        413,
        "content_too_large",
    ),
    "a long key": (
        {"method": "POST", "url": "/jobs", "json": train_spec(), "headers": {"Idempotency-Key": "k" * 201}},
        422,
        "invalid_parameter",
    ),
}


@pytest.mark.parametrize(("request_", "status", "code"), REFUSED.values(), ids=REFUSED)
def test_every_refusal_is_problem_json(
    http: httpx2.Client, store: Store, request_: dict[str, Any], status: int, code: str
) -> None:
    if callable(request_.get("content")):
        request_ = request_ | {"content": request_["content"]()}
    answer = http.request(**request_)
    problem = answer.json()
    assert (answer.status_code, problem["status"], problem["code"]) == (status, status, code), problem
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["title"] and problem["detail"] and problem["type"] == "about:blank"
    assert store.list_jobs().data == []


def test_a_bad_parameter_is_named_with_its_value(http: httpx2.Client) -> None:
    (error,) = http.get("/jobs", params={"limit": "1000"}).json()["errors"]
    assert error["pointer"] == "/query/limit" and "limit '1000'" in error["message"] and "100" in error["message"]


def test_of_a_parameter_that_may_be_repeated_the_name_is_said(http: httpx2.Client) -> None:
    errors = http.get("/jobs/x/metrics?keys=lr&keys=bogus").json()["errors"]
    assert {error["pointer"] for error in errors} == {"/query/keys"}
    assert all(error["message"].startswith("keys 'bogus': ") for error in errors), errors


def test_a_body_that_is_no_spec_is_refused_by_its_field(http: httpx2.Client) -> None:
    (error,) = http.patch("/workers/x", json={"schedulable": "no"}).json()["errors"]
    assert error["pointer"] == "/schedulable" and error["message"].startswith("schedulable 'no': ")


def test_what_the_reader_of_json_gives_up_at_is_said(http: httpx2.Client) -> None:
    said = {
        b'"\xff"': "can't decode byte 0xff",
        b"[" * 1_900: "recursion depth",
        b"9" * 5000: "has 5000 digits",
    }
    for body, why in said.items():
        assert why in http.post("/jobs", content=body, headers=JSON).json()["detail"]


@pytest.mark.parametrize("depth", [50, 300, 900, 20_000])
def test_a_deep_spec_is_refused_at_any_depth(http: httpx2.Client, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    body = json.dumps(train_spec(labels={"deep": 0})).replace('"deep": 0', f'"deep": {nested}')
    answer = http.post("/jobs", content=body, headers=JSON)
    assert answer.status_code in (400, 422), answer.text
    assert answer.headers["content-type"] == "application/problem+json"


MANY_KEYS = ["".join(three) for three in islice(product(ascii_letters, repeat=3), 116_000)]
OVERSIZED: dict[str, dict[str, Any]] = {
    "116,000 unknown keys": {"content": f"{{{','.join(f'{json.dumps(key)}:0' for key in MANY_KEYS)}}}"},
    "350,000 lists": {"content": "[" + "[]," * 340_000 + "[]]"},
    "1,900 unknown keys": {"json": train_spec(**{f"key{n}": 0 for n in range(1_900)})},
    "1,900 labels": {"json": train_spec(labels={f"/{n}": 0 for n in range(1_900)})},
    "1,900 changes": {"json": {"from": "job-0", "overrides": {}} | {f"key{n}": 0 for n in range(1_900)}},
    "1,900 tasks": {"json": {"kind": "eval", "name": "e", "source": "job-0", "tasks": ["x"] * 1_900}},
    "a long kind": {"json": train_spec(kind="x" * 1_000_000)},
    "a long name": {"json": train_spec(name="x" * 1_000_000)},
    "a long preset": {"json": train_spec(model={"preset": "x" * 1_000_000})},
    "a long key": {"json": train_spec(**{"x" * 1_000_000: 0})},
    "a long task": {"json": {"kind": "eval", "name": "e", "source": "job-0", "tasks": ["x" * 1_000_000]}},
    "quotes without an end": {"content": '"' + '\\"' * 500_000},
    "5,500 keys of a query": {"method": "GET", "url": "/jobs/x/metrics?" + "&".join(f"keys={n}" for n in range(5_500))},
    "a long path": {"method": "GET", "url": "/jobs/" + "x" * 60_000},
}


@pytest.mark.parametrize("request_", OVERSIZED.values(), ids=OVERSIZED)
def test_an_oversized_request_is_refused_at_once_in_few_words(http: httpx2.Client, request_: dict[str, Any]) -> None:
    http.get("/healthz")  # the connection is there
    began = time.process_time()  # of client and server
    answer = http.request(**({"method": "POST", "url": "/jobs", "headers": JSON} | request_))
    assert time.process_time() - began < 0.5
    assert answer.status_code in (400, 404, 422) and len(answer.content) < 50_000, len(answer.content)
    assert len(answer.json()["errors"]) <= 20
    assert len(answer.json()["detail"]) <= 5_000


def test_an_oversized_spec_holds_up_nobody_else(http: httpx2.Client, server: Server) -> None:
    body = OVERSIZED["116,000 unknown keys"]["content"]
    with ThreadPoolExecutor() as pool, httpx2.Client(base_url=server.url, trust_env=False) as other:

        def slowest() -> float:
            answer = pool.submit(http.post, "/jobs", content=body, headers=JSON)
            seconds = _seconds(other, "/healthz")
            while not answer.done():
                seconds = max(seconds, _seconds(other, "/healthz"))
            assert answer.result().status_code == 422
            return seconds

        slowest()  # connections are made
        assert min(slowest() for _ in range(5)) < 0.05  # tests beside this one may hold it up now and then


def _seconds(http: httpx2.Client, path: str) -> float:
    began = time.monotonic()
    assert http.get(path).status_code == 200
    return time.monotonic() - began


FOREIGN = [
    {"Host": "evil.example"},
    {"Host": "evil.example:80"},
    {"Host": "127.0.0.1.evil.example"},
    {"Host": "192.168.1.9"},
    {"Host": "["},
    {"Host": ""},
    {"Origin": "http://evil.example"},
    {"Origin": "http://127.0.0.1"},  # another port is another site
    {"Origin": "http://localhost:8000"},
    {"Origin": "null"},
    {"Origin": "http://[::1"},
    {"Origin": ""},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_a_foreign_page_can_neither_cancel_nor_read_a_run(
    http: httpx2.Client, run: FakeRun, headers: dict[str, str]
) -> None:
    for answer in (http.post(f"/jobs/{run.id}/cancel", headers=headers), http.get("/jobs", headers=headers)):
        assert answer.status_code == 403, headers
        assert answer.json()["code"] in ("foreign_host", "foreign_origin")
        assert answer.headers["content-type"] == "application/problem+json"
    assert http.get(f"/jobs/{run.id}").json()["status"] == "running"


def test_the_own_page_and_every_loopback_name_may_call(settings: Settings, run: FakeRun) -> None:
    names = {"url": "https://box.example/", "hosts": ("10.0.0.7", "other.example:8000", "[2001:db8::1]")}
    _, key = KeyRing(settings.redis_url, settings.home).create("mine", "admin")
    with Server(replace(settings, **names)) as server:
        server.http.headers["Authorization"] = f"Bearer {key}"
        port = server.url.rpartition(":")[2]
        for host in (
            f"127.0.0.1:{port}",
            f"localhost:{port}",
            f"[::1]:{port}",
            "LOCALHOST",
            "box.example",
            "127.8.8.8",
            f"10.0.0.7:{port}",
            "Other.example",
            "[2001:db8::1]:80",
        ):
            answer = server.http.post(f"/jobs/{run.id}/cancel", headers={"Host": host, "Origin": f"http://{host}"})
            assert answer.status_code == 200, host


def test_health_is_told_under_any_name(http: httpx2.Client) -> None:
    for host in ("10.0.0.9:8000", "probe.example", ""):
        assert http.get("/healthz", headers={"Host": host}).status_code == 200, host
        assert http.get("/readyz", headers={"Host": host}).json()["code"] == "no_worker", host


def test_the_page_runs_nothing_from_elsewhere_and_is_framed_by_nobody(http: httpx2.Client) -> None:
    answer = http.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy
    assert answer.headers["x-frame-options"] == "DENY"
    script = http.get("/static/app.js")
    assert script.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == script.headers["cache-control"] == "no-cache"


def test_a_file_of_the_page_is_sent_whole_whatever_range_is_asked_for(http: httpx2.Client) -> None:
    for bad in ("bytes=9-1", "bytes=0-3", "lines=1"):
        answer = http.get("/static/app.js", headers={"Range": bad})
        assert answer.status_code == 200 and len(answer.content) > 1000, bad


def test_with_redis_away_the_answer_says_so_and_names_no_password(settings: Settings) -> None:
    url = f"redis://:secret@127.0.0.1:{free_port()}/0"
    with Server(replace(settings, redis_url=url)) as server:
        for answer in (server.http.get("/readyz"), server.http.post("/jobs", json=train_spec())):
            assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
            assert answer.headers["retry-after"] and "secret" not in answer.text
        assert server.http.get("/healthz").status_code == 200


def test_a_redis_that_hangs_does_not_keep_a_process_from_saying_that_it_lives(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more requests waiting for it than the server has threads."""
    thaws, asked = threading.Event(), []
    monkeypatch.setattr(KeyRing, "is_empty", lambda _: asked.append(1) or thaws.wait(20))
    limits = httpx2.Limits(max_connections=None)
    with httpx2.Client(base_url=server.url, timeout=30, trust_env=False, limits=limits) as http:
        with ThreadPoolExecutor(60) as pool:
            waiting = [pool.submit(http.get, "/jobs") for _ in range(60)]
            try:
                wait_until(lambda: len(asked) >= KEY_THREADS)
                assert http.get("/healthz", timeout=2).status_code == 200
            finally:
                thaws.set()
    assert {one.result().status_code for one in waiting} == {200}


def test_with_a_redis_that_takes_no_writes_reading_goes_on_and_the_reason_is_said(
    http: httpx2.Client, store: Store
) -> None:
    store._redis.config_set("maxmemory", 1)
    try:
        refused = http.post("/jobs", json=train_spec())
        assert http.get("/jobs").json()["data"] == []
    finally:
        store._redis.config_set("maxmemory", 0)
    assert (refused.status_code, refused.json()["code"]) == (503, "store_unavailable")
    assert refused.json()["detail"].startswith(
        "Redis takes no writes: command not allowed when used memory > 'maxmemory'"
    )
    assert http.post("/jobs", json=train_spec()).status_code == 201


def test_openapi_describes_the_errors_as_they_are(http: httpx2.Client) -> None:
    schema = http.get("/openapi.json").json()
    assert {"/jobs", "/jobs/plan", "/jobs/{job_id}/metrics", "/jobs/{job_id}/cancel"} <= schema["paths"].keys()
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            for status in ("422", "default"):
                content = operation["responses"][status]["content"]
                assert content == {
                    "application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}
                }, path
    body = schema["paths"]["/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    spec, again = body["oneOf"]
    kinds = {"TrainSpec", "PrepareSpec", "EvalSpec", "PublishSpec"}
    assert {option["$ref"].rpartition("/")[2] for option in spec["oneOf"]} == kinds
    assert again["$ref"].endswith("/Repeat")
    assert http.get("/docs").status_code == 200
