"""The Python client against the real server, also while that is not there."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import trainmaster.client
from tests.api.server import FakeRun, Server, step, train_spec
from tests.conftest import free_port
from trainmaster import Client, TrainmasterError
from worker.settings import Settings
from worker.store import Store


def test_a_job_from_submission_to_cancellation(client: Client) -> None:
    assert client.plan(train_spec())["plan"]["total_steps"] == 12
    job = client.submit(train_spec(labels={"who": "me"}))
    assert client.job(job["id"]) == job
    assert client.jobs(label="who=me", limit=1)["data"] == [job]
    assert client.metrics(job["id"], keys=["val_loss"])["series"] == {"val_loss": {"step": [], "value": []}}
    assert client.cancel(job["id"])["status"] == "cancelled"
    assert [event["to_status"] for event in client.events(job["id"])] == ["queued", "cancelled"]


def test_each_submission_is_its_own_job_unless_a_key_says_otherwise(client: Client) -> None:
    assert client.submit(train_spec())["id"] != client.submit(train_spec())["id"]
    assert client.submit(train_spec(), "mine")["id"] == client.submit(train_spec(), "mine")["id"]


def test_a_refusal_carries_status_code_and_every_error(client: Client) -> None:
    with pytest.raises(TrainmasterError) as caught:
        client.submit(train_spec(max_steps=0, typo=1))
    error = caught.value
    assert (error.status, error.code) == (422, "invalid_spec")
    assert {one["pointer"] for one in error.errors} == {"/max_steps", "/typo"}
    assert "/max_steps: max_steps 0" in str(error) and "/typo: typo is no field" in str(error)
    with pytest.raises(TrainmasterError, match="job-0") as caught:
        list(client.events("job-0"))
    assert (caught.value.status, caught.value.code) == (404, "job_not_found")


def test_the_client_is_imported_beside_files_named_like_the_servers_packages(tmp_path: Path) -> None:
    for name in ("worker", "api", "gptcore"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    code = "from trainmaster import Client; print(Client('http://localhost:1').url)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("http://localhost:1\n", "")


def test_a_server_that_is_not_there_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainmaster.client, "CALL_SECONDS", 0.3)
    url = f"http://127.0.0.1:{free_port()}"
    with Client(url) as client, pytest.raises(TrainmasterError) as caught:
        client.jobs()
    assert (caught.value.status, caught.value.code) == (None, "unreachable")
    assert f"the server at {url} cannot be reached: " in str(caught.value)


def test_a_submission_waits_for_a_server_that_restarts_and_makes_one_job(
    server: Server, client: Client, store: Store
) -> None:
    server.stop()
    back = threading.Timer(0.5, server.start)
    back.start()
    job = client.submit(train_spec())
    back.join()
    assert [one.id for one in store.list_jobs().data] == [job["id"]]


def test_events_come_once_and_in_order_over_a_restart(server: Server, client: Client, run: FakeRun) -> None:
    run.write(*(step(i) for i in range(1, 21)))
    seen = []
    for event in client.events(run.id):
        if event["type"] == "status":
            continue
        seen.append(event["step"])
        if len(seen) == 10:
            server.stop()
            server.start()
        if len(seen) == 20:
            run.write(*(step(i) for i in range(21, 31)))
        if len(seen) == 30:
            server.stop()
            run.write(step(31))
            server.start()
            run.end()
    assert seen == list(range(1, 32))


def test_a_stream_that_was_quiet_for_long_is_taken_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience begins when the server fails, not when it last had something to say."""
    monkeypatch.setattr(trainmaster.client, "STREAM_SECONDS", 0.4)
    asked = []

    class Restarting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for _ in range(0 if len(asked) == 3 else 6):
                self.wfile.write(b": still here\n\n")
                self.wfile.flush()
                time.sleep(0.1)
            self.wfile.write(b"event: end\ndata: {}\n\n" if len(asked) == 3 else b"")

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Restarting) as quiet:
        threading.Thread(target=quiet.serve_forever, daemon=True).start()
        with Client(f"http://127.0.0.1:{quiet.server_port}") as client:
            assert list(client.events("job-1")) == []
        quiet.shutdown()
    assert len(asked) == 3


def test_events_can_begin_behind_a_known_one(client: Client, run: FakeRun) -> None:
    run.write(*(step(i) for i in range(1, 6)))
    run.end()
    *steps, end = client.events(run.id, after="1-3")
    assert ([event["step"] for event in steps], end["to_status"]) == ([4, 5], "succeeded")


def test_the_url_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    monkeypatch.setenv("TRAINMASTER_URL", "http://127.0.0.1:4711/")
    with Client() as client:
        assert client.url == "http://127.0.0.1:4711"


def test_watching_a_long_run_begins_with_its_newest_events(client: Client, run: FakeRun) -> None:
    run.write(*(step(number) for number in range(1, 301)))
    run.end()
    seen = [event["seq"] for event in client.events(run.id, last=200) if event["type"] == "step"]
    assert seen == list(range(101, 301))
