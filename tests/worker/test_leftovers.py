"""Run directories of deleted jobs on nodes that have another home than the server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gptcore.locks import shared
from gptcore.spec import parse_spec
from tests.conftest import wait_until
from tests.worker.conftest import Worker, train_spec
from worker.deletion import delete_job, remove_leftovers
from worker.keys import KEYS
from worker.place import runs_root_id
from worker.settings import Settings
from worker.store import Store


@pytest.fixture
def server(settings: Settings, tmp_path: Path) -> Settings:
    return replace(settings, home=tmp_path / "server")


def ended_job(store: Store, settings: Settings) -> Path:
    """The run directory of a job that ended on a node with these settings."""
    job, _ = store.create_job(parse_spec(train_spec()), None)
    store.request_cancel(job.id)
    store._redis.hset(KEYS["job"] + job.id, "root", runs_root_id(settings))
    folder = settings.runs / job.id
    (folder / "attempts" / "0001").mkdir(parents=True)
    (folder / "attempts" / "0001" / "lock").touch()
    return folder


def test_a_node_removes_what_a_deletion_elsewhere_left_and_nothing_else(
    store: Store, settings: Settings, server: Settings
) -> None:
    deleted, kept, unknown = (ended_job(store, settings) for _ in range(3))
    store._redis.delete(KEYS["job"] + unknown.name)  # Redis lost it: nobody deleted it
    delete_job(store, server.runs, deleted.name)
    assert deleted.exists()
    remove_leftovers(store, server.runs)
    assert deleted.exists()
    remove_leftovers(store, settings.runs)
    assert sorted(settings.runs.glob("job-*")) == sorted([kept, unknown])
    assert not [*settings.runs.glob(".*.deleted")] and not [*store._redis.scan_iter(KEYS["leftovers"] + "*")]


def test_a_server_that_has_the_files_leaves_nothing_to_nodes(store: Store, settings: Settings) -> None:
    folder = ended_job(store, settings)
    delete_job(store, settings.runs, folder.name)
    assert not folder.exists() and not [*store._redis.scan_iter(KEYS["leftovers"] + "*")]


def test_a_deleted_job_that_a_restored_redis_has_again_keeps_its_files(
    store: Store, settings: Settings, server: Settings
) -> None:
    folder = ended_job(store, settings)
    record = store.record(folder.name)
    delete_job(store, server.runs, folder.name)
    store._redis.hset(KEYS["job"] + folder.name, mapping=record)
    remove_leftovers(store, settings.runs)
    assert folder.exists() and store.leftovers(runs_root_id(settings), 10) == []


def test_files_that_a_process_still_uses_are_removed_later(store: Store, settings: Settings, server: Settings) -> None:
    folder, root = ended_job(store, settings), runs_root_id(settings)
    delete_job(store, server.runs, folder.name)
    with shared(folder / "attempts" / "0001" / "lock"):
        remove_leftovers(store, settings.runs)
    assert folder.exists() and store.leftovers(root, 10) == []  # not due: other leftovers come first
    store.postpone_leftover(root, folder.name, 0)
    remove_leftovers(store, settings.runs)
    assert not folder.exists()


def test_an_agent_removes_what_a_deletion_elsewhere_left(
    store: Store, settings: Settings, server: Settings, start_worker: Callable[[Settings], Worker]
) -> None:
    folder = ended_job(store, settings)
    delete_job(store, server.runs, folder.name)
    start_worker(settings)
    wait_until(lambda: not folder.exists(), 30)
