from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from gptcore.spec import parse_spec
from tests.api.server import FakeRun, Server, train_spec
from trainmaster import Client
from worker.settings import Settings
from worker.store import Store


@pytest.fixture
def server(settings: Settings) -> Iterator[Server]:
    with Server(settings) as server:
        yield server


@pytest.fixture
def http(server: Server) -> httpx2.Client:
    return server.http


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


@pytest.fixture
def new_run(settings: Settings, store: Store) -> Iterator[Callable[..., FakeRun]]:
    """Makes jobs whose first attempt has begun."""
    runs: list[FakeRun] = []

    def make(**changes: Any) -> FakeRun:
        job, _ = store.create_job(parse_spec(train_spec(**changes)), None)
        runs.append(FakeRun(settings, store, job))
        runs[-1].begin_attempt()
        return runs[-1]

    yield make
    for run in runs:
        run.stop_writing()


@pytest.fixture
def run(new_run: Callable[..., FakeRun]) -> FakeRun:
    return new_run()
