"""A server and launchers beside a Redis of an older or a newer version."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

from gptcore.spec import parse_spec
from tests.api.server import Server, train_spec
from tests.conftest import wait_until
from tests.worker.conftest import node
from worker import launch, schema
from worker.keys import KEYS
from worker.place import slot_lock
from worker.settings import Settings
from worker.store import Store


def test_the_first_server_of_a_newer_version_migrates(store: Store, settings: Settings) -> None:
    job, _ = store.create_job(parse_spec(train_spec()), None)
    store.request_cancel(job.id)
    store._redis.delete(KEYS["schema"], KEYS["ended"])
    with Server(settings):
        wait_until(lambda: store._redis.hgetall(KEYS["schema"]) == {"version": str(schema.VERSION)})
    assert store._redis.zrange(KEYS["ended"], 0, -1) == [job.id]


def test_a_server_of_an_older_version_ends_and_says_why(store: Store, settings: Settings) -> None:
    store._redis.hset(KEYS["schema"], "version", schema.VERSION + 1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = subprocess.run(
            [sys.executable, "-m", "trainmaster.serve", str(listener.fileno())],
            env={**os.environ, **settings.to_environment()},
            pass_fds=[listener.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode in (0, -signal.SIGTERM), done
    assert "update Trainmaster here" in done.stdout + done.stderr
    assert store._redis.hget(KEYS["schema"], "version") == str(schema.VERSION + 1)


def test_a_launcher_of_an_older_version_takes_no_ticket(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.register_node(node("a", 1))
    job, _ = store.create_job(parse_spec(train_spec()), None)
    assert store.reserve("default") == 1
    (ticket,) = store.outbox()
    store._redis.hset(KEYS["schema"], "version", schema.VERSION + 1)
    for name, value in settings.to_environment().items():
        monkeypatch.setenv(name, value)
    slot_lock(settings, ticket.slot).parent.mkdir(parents=True, exist_ok=True)
    launch.run(ticket.job_id, ticket.attempt, ticket.node_rank, ticket.slot)
    assert "the ticket is not taken" in caplog.text and "update Trainmaster here" in caplog.text
    assert store.get_job(job.id).status == "starting" and "claim:1:0" not in store.record(job.id)
