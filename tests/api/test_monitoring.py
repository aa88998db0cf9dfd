"""Numbers for Prometheus, and log lines that name request and job."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from api.monitoring import JsonLines
from tests.api.server import FakeRun, step, train_spec
from tests.api.test_stream import stream
from tests.conftest import wait_until
from worker.progress import Progress
from worker.store import Store

Numbers = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def numbers(http: httpx2.Client) -> Numbers:
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(answer.text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_numbers_say_how_jobs_stand(http: httpx2.Client, new_run: Callable[..., FakeRun]) -> None:
    run = new_run()
    run.write(step(1, 3.0), step(2, 2.5))
    progress = Progress(None)
    for event in (step(1, 3.0), step(2, 2.5)):
        run.report(**progress.take(event))
    run.report(tokens_per_second=1000.0, mfu=0.25)
    http.post("/jobs", json=train_spec(resources={"pool": "other"}))
    found, job = numbers(http), (("job", run.id),)
    assert found["trainmaster_jobs", (("status", "running"),)] == 1
    assert found["trainmaster_jobs", (("status", "queued"),)] == 1
    assert found["trainmaster_jobs", (("status", "failed"),)] == 0
    assert found["trainmaster_queue_seconds_count", ()] == 1
    assert 0 <= found["trainmaster_queue_seconds_sum", ()] < 5
    assert found["trainmaster_oldest_waiting_seconds", (("pool", "other"),)] >= 0
    assert found["trainmaster_job_train_loss", job] == 2.5
    assert found["trainmaster_job_tokens_per_second", job] == 1000
    assert found["trainmaster_job_mfu", job] == 0.25
    assert ("trainmaster_job_recovery_seconds", job) not in found
    time.sleep(0.1)
    run.begin_attempt()
    assert 0 < numbers(http)["trainmaster_job_recovery_seconds", job] < 5
    run.end()
    found = numbers(http)
    assert found["trainmaster_jobs", (("status", "succeeded"),)] == 1
    assert ("trainmaster_job_mfu", job) not in found


def test_numbers_say_how_requests_and_streams_fare(http: httpx2.Client, run: FakeRun) -> None:
    http.post("/jobs", json=train_spec())
    http.post("/jobs", json={})
    http.get("/no/such/path")
    for word in ("PROPFIND", "X1", "X2"):
        http.request(word, "/jobs")
    with stream(http, f"/jobs/{run.id}/events") as messages:
        wait_until(lambda: run.write(step(1)) or True)
        next(messages)
    found = numbers(http)

    def count(method: str, route: str, status: str) -> float:
        labels = (("method", method), ("route", route), ("status", status))
        return found["trainmaster_request_seconds_count", labels]

    assert count("POST", "/jobs", "201") == count("POST", "/jobs", "422") == count("GET", "none", "404") == 1
    assert count("other", "/jobs", "405") == 3  # nor are words that anyone may make up
    assert count("GET", "/jobs/{job_id}/events", "200") == 1  # ids are no labels


def test_a_live_event_counts_with_its_age(http: httpx2.Client, run: FakeRun) -> None:
    run.write(step(1))
    with stream(http, f"/jobs/{run.id}/events") as messages:
        next(messages)
        time.sleep(0.5)  # by now its reader waits for what comes
        run.write(step(2))
        next(messages)
        found = numbers(http)
    assert found["trainmaster_stream_lag_seconds_count", ()] == 1
    assert 0 < found["trainmaster_stream_lag_seconds_sum", ()] < 2


def test_a_fault_of_the_server_is_answered_counted_and_logged_as_all_else(
    http: httpx2.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    caplog.set_level(logging.INFO, logger="api.monitoring")
    monkeypatch.setattr(Store, "list_jobs", fail)
    answer = http.get("/jobs", headers={"X-Request-Id": "mine"})
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert (answer.headers["x-request-id"], answer.headers["x-frame-options"]) == ("mine", "DENY")
    labels = (("method", "GET"), ("route", "/jobs"), ("status", "500"))
    assert numbers(http)["trainmaster_request_seconds_count", labels] == 1
    assert [record.levelname for record in caplog.records if record.exc_info] == ["ERROR"]  # with its traceback, once
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if record.name == "api.monitoring"]
    assert [(line["path"], line["status"]) for line in lines] == [("/jobs", 500)]


def test_a_request_is_logged_with_its_id_and_job(http: httpx2.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="api.monitoring")
    answer = http.post("/jobs?secret=1", json=train_spec(), headers={"X-Request-Id": "mine-1"})
    job_id = answer.json()["id"]
    assert answer.headers["x-request-id"] == "mine-1"
    assert http.get("/jobs").headers["x-request-id"] != http.get("/jobs").headers["x-request-id"]
    assert http.get("/jobs", headers={"X-Request-Id": "a\tb" * 99}).headers["x-request-id"].isalnum()
    assert http.post(f"/jobs/{job_id}/cancel").status_code == 200
    assert http.get("/jobs/job-0").status_code == 404
    records = [record for record in caplog.records if record.name == "api.monitoring"]
    lines = [json.loads(JsonLines().format(record)) for record in records]
    assert [(line["method"], line["path"], line["status"], line["job_id"]) for line in lines] == [
        ("POST", "/jobs", 201, job_id),
        ("POST", f"/jobs/{job_id}/cancel", 200, job_id),
        ("GET", "/jobs/job-0", 404, "job-0"),
    ]
    assert all(line["who"] == "anyone" and line["level"] == "info" for line in lines)
    assert "secret" not in json.dumps(lines)
