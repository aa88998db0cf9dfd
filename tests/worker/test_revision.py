"""Answers about jobs are kept by the store's revision: whatever changes a job changes it too."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gptcore.spec import parse_spec
from tests.api.server import node, train_spec
from worker import keys
from worker.job import Ticket
from worker.store import Store


@pytest.fixture
def job_id(store: Store) -> str:
    return store.create_job(parse_spec(train_spec()), None)[0].id


def start(store: Store, job_id: str) -> None:
    store.register_node(node(2))
    assert store.reserve("default") == 1
    slot = store.get_job(job_id).nodes[0].slot
    assert store.claim(Ticket(job_id=job_id, attempt=1, node_rank=0, slot=slot), "boot")


def seen(store: Store, job_id: str) -> object:
    return store.list_jobs().model_dump_json(), store.statuses([job_id])


def test_each_change_of_a_job_changes_the_revision(store: Store, job_id: str) -> None:
    changes: list[Callable[[], object]] = [
        lambda: store.reserve("default"),  # no worker: says so as what the job waits for
        lambda: store.request_pause(job_id),
        lambda: store.resume(job_id),
        lambda: start(store, job_id),
        lambda: store.report(job_id, 1, {"step": 1}, status="running"),
        lambda: store.report(job_id, 1, {"step": 2}),
        lambda: store.ship(job_id, 1, "0-0", [("1-1", "{}")], {"step": 3}),
        lambda: store.create_job(parse_spec(train_spec()), None),
        lambda: store.request_cancel(job_id),
        lambda: store.finish(job_id, 1, "cancelled", "", who="test", fields={}),
        lambda: store.delete_job(job_id),
    ]
    for number, change in enumerate(changes):
        before = store.revision(), seen(store, job_id)
        change()
        assert seen(store, job_id) != before[1], f"change {number} shows nothing"
        assert store.revision() != before[0], f"change {number}"


def test_looking_and_holding_a_lease_leave_the_revision(store: Store, job_id: str) -> None:
    start(store, job_id)
    before = store.revision()
    store.list_jobs()
    store.census()
    store.renew(job_id, 1, 0)
    store.register_node(node(2))
    assert store.reserve("default", only_if_due=True) < 0
    assert store.revision() == before


def test_every_script_says_whether_it_changes_jobs() -> None:
    scripts = keys.scripts()
    assert set(keys.SHOW_NOTHING) <= set(scripts)
    for name, text in scripts.items():
        assert ("\ntouch()\n" in text) == (name not in keys.SHOW_NOTHING or name == "reserve"), name
