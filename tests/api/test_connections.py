"""Slow clients and many connections, on real sockets."""

from __future__ import annotations

import logging
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx2
import pytest

from api import connections
from gptcore.procs import die_with_parent
from tests.api.server import FakeRun, Server, step
from tests.conftest import wait_until
from worker.settings import Settings

HEAD = b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SLOW = {
    "sends nothing": (b"", b""),
    "sends its head a byte at a time": (b"", b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 100),
    "sends its body a byte at a time": (HEAD + b"Content-Length: 1000\r\n\r\n", b" " * 1000),
    "sends its chunks a byte at a time": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 200),
    "stops in its second request": (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /heal"),
}


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=5)


@pytest.mark.parametrize(("at_once", "slowly"), SLOW.values(), ids=SLOW)
def test_a_client_is_cut_that(
    server: Server, at_once: bytes, slowly: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(connections, "BODY_SECONDS", 0.3)
    with connect(server) as client:
        client.sendall(at_once)
        client.settimeout(0.02)
        answer, began = b"", time.monotonic()
        for byte in [*slowly[:400], *[None] * 200]:
            try:
                if byte is not None:
                    client.sendall(bytes([byte]))
                if (received := client.recv(10_000)) == b"":
                    break
                answer += received
            except TimeoutError:
                continue
            except ConnectionError:
                break
        assert time.monotonic() - began < 3, "not cut"
    assert b"408 Request Timeout" in answer and b"request_timeout" in answer
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_client_that_reads_nothing_is_cut(server: Server, run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "READ_SECONDS", 0.3)
    (run.directory.path / "large").write_bytes(bytes(30_000_000))
    with connect(server) as client:
        client.sendall(f"GET /jobs/{run.id}/artifacts/large HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert client.recv(100)
        began = time.monotonic()
        wait_until(lambda: not server.connections, 5)
        assert time.monotonic() - began > 0.2


def test_a_quiet_stream_and_a_connection_in_use_stay_open(
    server: Server, run: FakeRun, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(connections, "BODY_SECONDS", 0.2)
    run.write(step(1))
    with http.stream("GET", f"/jobs/{run.id}/events", headers={"Accept": "text/event-stream"}) as answer:
        events = (event.event for event in httpx2.EventSource(answer))
        while next(events) != "step":
            pass
        time.sleep(0.5)
        run.write(step(2))
        assert next(events) == "step"


@pytest.fixture
def small_server(settings: Settings) -> Iterator[str]:
    """The URL of a server in a process of its own, which may have no more than 1,024 open files."""

    def limited() -> None:
        die_with_parent()
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 1024))  # the server raises the first to the second

    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-m", "trainmaster.serve", str(listener.fileno())],
            env=settings.to_environment(), pass_fds=[listener.fileno()], preexec_fn=limited,
        )  # fmt: skip
    yield url
    process.terminate()
    assert process.wait(20) in (0, -signal.SIGTERM)


def test_a_thousand_idle_connections_keep_nobody_else_out(small_server: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    address = ("127.0.0.1", int(small_server.rpartition(":")[2]))
    try:
        with ExitStack() as idle, httpx2.Client(base_url=small_server, timeout=10, trust_env=False) as http:
            for _ in range(1_100):
                idle.enter_context(socket.create_connection(address, timeout=10))
            for _ in range(20):
                assert http.get("/jobs", headers={"Connection": "close"}).status_code == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_where_every_connection_is_at_work_another_is_refused_in_words(
    server: Server, run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "most_connections", lambda: 1)
    with connect(server) as watcher:
        watcher.sendall(
            f"GET /jobs/{run.id}/events HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n".encode()
        )
        assert watcher.recv(10_000).startswith(b"HTTP/1.1 200")
        refused = httpx2.get(f"{server.url}/healthz", trust_env=False)
        assert (refused.status_code, refused.json()["code"]) == (503, "too_many_connections")
