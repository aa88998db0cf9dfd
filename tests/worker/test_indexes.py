"""Lists, counts and deletions cost what they show, and the indexes behind them say what the records say."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from gptcore.spec import parse_spec
from tests.conftest import status_changes
from tests.worker.conftest import node, start, train_spec
from worker import agent, schema
from worker import store as store_module
from worker.job import TRANSITIONS, Job
from worker.keys import KEYS
from worker.schema import Schema, SchemaTooNew
from worker.settings import Settings
from worker.store import NotPossible, Store


def submit(store: Store, owner: str = "local", parent: str | None = None, **changes: Any) -> str:
    return store.create_job(parse_spec(train_spec(**changes)), None, owner=owner, parent_job_id=parent)[0].id


def succeed(store: Store, job_id: str) -> None:
    start(store, job_id)
    store.finish(job_id, 1, "succeeded", "", who="t", fields={})


@pytest.fixture
def jobs(store: Store) -> list[Job]:
    """Thirty jobs of two owners in several statuses, newest first."""
    store.register_node(node("a", 1))
    chance = random.Random(7)
    for number in range(30):
        labels = {"team": chance.choice("ab"), "number": str(number)}
        parent = chance.choice(made) if number % 4 == 3 and (made := [job.id for job in everything(store)]) else None
        job_id = submit(store, chance.choice(["ci", "laptop"]), parent, name=f"n{number % 3}", labels=labels)
        if store.get_job(job_id).status == "queued" and chance.random() < 0.5:
            store.request_cancel(job_id)
    running = store._redis.zrange(KEYS["queue"] + "default", 0, 0)[0]
    succeed(store, running)
    start(store, store._redis.zrange(KEYS["queue"] + "default", 0, 0)[0])
    store.delete_job(next(job.id for job in everything(store) if job.status == "cancelled"))
    return everything(store)


def everything(store: Store) -> list[Job]:
    """By the records themselves, newest first."""
    numbers: dict[str, float] = dict(store._redis.zrange(KEYS["jobs"], 0, -1, withscores=True))
    return [store.get_job(job_id) for job_id in sorted(numbers, key=lambda job_id: -numbers[job_id])]


FILTERS: dict[str, tuple[dict[str, str], Callable[[Job], bool]]] = {
    "status": ({"status": "queued"}, lambda job: job.status == "queued"),
    "label": ({"label": "number"}, lambda job: "number" in job.labels),
    "label and owner": ({"label": "team=a", "owner": "ci"}, lambda job: job.labels["team"] + job.owner == "aci"),
    "kind and name": ({"kind": "train", "name": "n1"}, lambda job: job.name == "n1"),
    "all": (
        {"status": "cancelled", "kind": "train", "name": "n2", "owner": "laptop", "label": "team=b"},
        lambda job: (job.status, job.name, job.owner, job.labels["team"]) == ("cancelled", "n2", "laptop", "b"),
    ),
    "none": ({"status": "failed", "owner": "ci"}, lambda _: False),
}


def listed(store: Store, **filters: Any) -> Iterator[str]:
    after: str | None = None
    while True:
        page = store.list_jobs(after=after, limit=4, **filters)
        yield from (job.id for job in page.data)
        if not page.has_more:
            return
        after = page.next


@pytest.mark.parametrize("looked_at", [10_000, 3])
def test_every_filter_finds_the_jobs_that_fit_however_few_are_looked_at(
    store: Store, jobs: list[Job], looked_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "LOOKED_AT", looked_at)
    monkeypatch.setattr(store_module, "LOOKED_AT_ONCE", min(looked_at, 1000))
    for name, (filters, fits) in FILTERS.items():
        assert [*listed(store, **filters)] == [job.id for job in jobs if fits(job)], name
    for parent in {job.parent_job_id for job in jobs if job.parent_job_id}:
        assert [*listed(store, parent_job_id=parent)] == [job.id for job in jobs if job.parent_job_id == parent]
    counted = {status: sum(job.status == status for job in jobs) for status in TRANSITIONS}
    assert store.census().statuses == {status: count for status, count in counted.items() if count}


def test_a_deleted_job_is_in_no_index(store: Store) -> None:
    empty = {key for key in store._redis.scan_iter() if "index" in key}
    job_id = submit(store, labels={"team": "a"}, init_from={"source": "job-x"})
    waits = submit(store, parent=job_id)
    for ended in (waits, job_id):
        store.request_cancel(ended)
        store.delete_job(ended)
    kinds = ("index", "readers", "alike", "waiting", "pools", "jobs")
    left = {key for key in store._redis.scan_iter() if any(key.startswith(KEYS[kind]) for kind in kinds)}
    assert left == empty == set()


def test_the_cost_of_a_question_does_not_grow_with_the_jobs_there_are(store: Store) -> None:
    store.register_node(node("a", 1))
    parent, ended = submit(store), [submit(store), submit(store)]
    submit(store, parent=parent)
    for job_id in ended:
        store.request_cancel(job_id)

    def calls(question: Callable[[], object]) -> int:
        store._redis.config_resetstat()
        question()
        return sum(command["calls"] for command in store._redis.info("commandstats").values())

    questions: dict[str, Callable[[], object]] = {
        "a label": lambda: store.list_jobs(label="nothing"),
        "children": lambda: store.list_jobs(parent_job_id=parent),
        "census": store.census,
        "delete": lambda: store.delete_job(ended.pop()),
    }
    few = {name: calls(question) for name, question in questions.items()}
    for _ in range(40):
        submit(store)
    assert {name: calls(question) for name, question in questions.items()} == few


def test_only_a_job_that_has_not_ended_and_reads_a_run_keeps_it(store: Store) -> None:
    store.register_node(node("a", 1))
    run = submit(store)
    succeed(store, run)
    submit(store, labels={"about": run}, name=run)
    reader = submit(store, init_from={"source": f"./{run}/export"})
    with pytest.raises(NotPossible, match=reader):
        store.delete_job(run)
    store.request_cancel(reader)
    store.delete_job(run)


def test_jobs_of_an_older_version_are_listed_after_an_upgrade_that_was_killed(
    store: Store, jobs: list[Job], redis_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = ("index", "readers", "alike", "waiting", "pools", "totals", "ended")
    keys = [key for key in store._redis.scan_iter() if any(key.startswith(KEYS[kind]) for kind in kinds)]
    changes_before = {job.id: status_changes(store, job.id) for job in jobs}
    listed_before = {key: store._redis.dump(key) for key in keys if KEYS["index"] + "owner" not in key}
    store._redis.delete(*keys)
    for job in jobs:
        entries = store._redis.xrange(KEYS["changes"] + job.id)
        store._redis.delete(KEYS["changes"] + job.id)
        for _, fields in entries:
            store._redis.xadd(KEYS["changes"] + job.id, fields)
        store._redis.hdel(KEYS["job"] + job.id, "owner", "likeness", "reads")
    monkeypatch.setattr(schema, "BATCH", 5)

    def kill(record: logging.LogRecord) -> bool:
        if len(caplog.records) == 3:
            raise KeyboardInterrupt
        return True

    schema.log.addFilter(kill)
    with closing(Schema(redis_url)) as one, caplog.at_level("INFO"):
        with pytest.raises(KeyboardInterrupt):
            one.bring_up_to_date()
        schema.log.removeFilter(kill)
        one.bring_up_to_date()
        one.bring_up_to_date()
    assert {key: store._redis.dump(key) for key in listed_before} == listed_before
    assert {job.id: status_changes(store, job.id) for job in jobs} == changes_before
    assert {job.owner for job in store.list_jobs(owner="local", limit=100).data} == {"local"}
    assert store._redis.hgetall(KEYS["schema"]) == {"version": str(schema.VERSION)}


def test_an_older_version_refuses_to_run_beside_a_newer_one(
    settings: Settings, redis_url: str, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store._redis.hset(KEYS["schema"], "version", schema.VERSION + 1)
    with closing(Schema(redis_url)) as mine, pytest.raises(SchemaTooNew, match="update Trainmaster here"):
        mine.bring_up_to_date()
    settings = replace(settings, home=settings.home / "agent")
    assert agent.main(settings) == 1 and "update Trainmaster here" in caplog.text
    assert store.list_nodes() == []
