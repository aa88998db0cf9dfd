"""Ended jobs whose records leave Redis for their run directories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest

from gptcore.rundir import RunDir
from gptcore.spec import parse_spec
from tests.api.server import FakeRun, Server, evaluated, train_spec
from tests.api.test_stream import raw_stream
from tests.conftest import wait_until
from worker import retention
from worker.archive import Archive
from worker.deletion import delete_job
from worker.job import Job
from worker.keys import KEYS
from worker.settings import Settings
from worker.store import Store


@pytest.fixture
def sweep(store: Store, settings: Settings) -> Callable[[], int]:
    """Archive what has ended, as if that were long ago."""

    def run() -> int:
        for job_id in store._redis.zrange(KEYS["ended"], 0, -1):
            store._redis.zadd(KEYS["ended"], {job_id: 1.0})
        store._redis.delete(KEYS["sweep"])
        return retention.sweep(store, replace(settings, retention_days=1))

    return run


def answers(http: httpx2.Client, job_id: str) -> dict[str, object]:
    """What the API tells of a job, but for `archived`."""
    paths = ("", "/metrics", "/events", "/events?limit=2", "/events?after=1-1", "/checkpoints", "/samples", "/logs")
    found = {path: http.get(f"/jobs/{job_id}{path}") for path in paths}
    assert all(answer.status_code == 200 for answer in found.values()), found
    return {path: answer.text.replace('"archived":true', '"archived":false') for path, answer in found.items()}


def streamed(http: httpx2.Client, job_id: str) -> list[tuple[str, str, str]]:
    with raw_stream(http, f"/jobs/{job_id}/events") as messages:
        return [(message.id, message.event, message.data) for message in messages]


def end_with_a_log(run: FakeRun, settings: Settings) -> None:
    run.write(evaluated(1, 2.0), evaluated(2, 1.5))
    run.end()
    RunDir(settings.runs / run.id).attempt(1).log.write_text("done\n")


def test_an_archived_job_answers_as_before_and_leaves_nothing_in_redis(
    http: httpx2.Client, run: FakeRun, store: Store, settings: Settings, sweep: Callable[[], int]
) -> None:
    end_with_a_log(run, settings)
    before, sent = answers(http, run.id), streamed(http, run.id)
    assert sweep() == 1 and sweep() == 0
    assert http.get(f"/jobs/{run.id}").json()["archived"] is True
    assert answers(http, run.id) == before and streamed(http, run.id) == sent and sent[-1][1] == "end"
    assert http.get("/jobs").json()["data"] == []
    left = [key for key in store._redis.scan_iter() if run.id in key and key != KEYS["deleted"] + run.id]
    listed = [key for key in store._redis.scan_iter(_type="zset") if store._redis.zscore(key, run.id) is not None]
    assert left == [] == listed
    assert http.post(f"/jobs/{run.id}/cancel").json()["status"] == "succeeded"
    for wish in ("pause", "resume"):
        refused = http.post(f"/jobs/{run.id}/{wish}")
        assert (refused.status_code, refused.json()["code"]) == (409, "not_possible")


@pytest.mark.parametrize("mark_expired", [False, True])
def test_an_archived_job_is_repeated_and_deleted(
    http: httpx2.Client, run: FakeRun, store: Store, settings: Settings, sweep: Callable[[], int], mark_expired: bool
) -> None:
    end_with_a_log(run, settings)
    sweep()
    if mark_expired:
        store._redis.delete(KEYS["deleted"] + run.id)
    again = http.post("/jobs", json={"from": run.id, "overrides": {"name": "again"}})
    assert again.status_code == 201, again.text
    reader, _ = store.create_job(parse_spec(train_spec(init_from={"source": run.id})), None, parent_job_id=run.id)
    assert store.get_job(reader.id).status_reason.startswith("waits for a worker")
    assert reader.id in http.delete(f"/jobs/{run.id}").json()["detail"]
    assert http.get(f"/jobs/{run.id}/logs").text == "done\n"
    store.request_cancel(reader.id)
    assert http.delete(f"/jobs/{run.id}").status_code == 204
    assert not (settings.runs / run.id).exists()
    assert http.get(f"/jobs/{run.id}").status_code == 404
    assert http.delete(f"/jobs/{run.id}").status_code == 204  # as where the first answer was lost


def test_a_sweep_killed_before_it_removes_the_record_loses_nothing(
    http: httpx2.Client,
    run: FakeRun,
    store: Store,
    settings: Settings,
    sweep: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    end_with_a_log(run, settings)
    before = http.get(f"/jobs/{run.id}").json()

    def be_killed(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "archive", be_killed)
        with pytest.raises(KeyboardInterrupt):
            sweep()
    assert Archive(settings.runs).read(run.id) is not None
    assert http.get("/jobs").json()["data"] == [before]
    assert sweep() == 1
    assert http.get(f"/jobs/{run.id}").json() == before | {"archived": True}


def test_a_job_deleted_as_it_is_archived_does_not_come_back(
    store: Store, settings: Settings, sweep: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = store.create_job(parse_spec(train_spec()), None)
    store.request_cancel(job.id)
    really = Archive.write

    def late(archive: Archive, job_id: str, what: object) -> None:
        store.delete_job(job_id)
        really(archive, job_id, what)  # type: ignore[arg-type]

    monkeypatch.setattr(Archive, "write", late)
    assert sweep() == 0 and not (settings.runs / job.id).exists()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_job_archived_as_it_is_deleted_is_deleted(
    run: FakeRun,
    store: Store,
    settings: Settings,
    sweep: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    end_with_a_log(run, settings)
    really, done = Path.rename, list[int]()

    def rename(path: Path, target: Path) -> Path:
        if when == "before" and not done:
            done.append(sweep())
        moved = really(path, target)
        if when == "after" and not done:
            done.append(sweep())
        return moved

    monkeypatch.setattr(Path, "rename", rename)
    delete_job(store, settings.runs, run.id)
    assert done == [1] and not [one for one in settings.runs.iterdir() if run.id in one.name]
    assert Archive(settings.runs).read(run.id) is None and not store.exists(run.id)


def test_what_others_still_need_or_another_home_has_stays_in_redis(
    new_run: Callable[..., FakeRun], store: Store, sweep: Callable[[], int]
) -> None:
    def ended(**fields: str) -> str:
        job, _ = store.create_job(parse_spec(train_spec()), None)
        store.request_cancel(job.id)
        store._redis.hset(KEYS["job"] + job.id, mapping={"name": "ended"} | fields)
        return job.id

    read, parent, elsewhere, unshipped = ended(), ended(), ended(root="another"), ended()
    store._redis.sadd(KEYS["unshipped"], unshipped)
    reader, _ = store.create_job(parse_spec(train_spec(init_from={"source": read})), None)
    store._redis.hset(KEYS["job"] + parent, "status", "succeeded")
    child, _ = store.create_job(parse_spec(train_spec()), None, parent_job_id=parent)
    kept: set[str] = {read, parent, elsewhere, unshipped, reader.id, child.id}
    assert sweep() == 0 and {job.id for job in store.list_jobs().data} == kept
    assert store.ended_before(86400.0, 100) == []  # looked at again in a day, so they hold up no other
    for one in (reader.id, child.id):
        store.request_cancel(one)
    assert sweep() == 4 and {job.id for job in store.list_jobs().data} == {elsewhere, unshipped}


def test_a_job_that_changed_since_it_was_read_stays(store: Store) -> None:
    job, _ = store.create_job(parse_spec(train_spec()), None)
    store.request_cancel(job.id)
    seen = store.whole_job(job.id)
    store._redis.hset(KEYS["job"] + job.id, "results", "{}")
    assert not store.archive(job.id, seen) and store.exists(job.id)
    assert store.archive(job.id, store.whole_job(job.id)) and not store.exists(job.id)


def test_without_a_retention_nothing_is_archived_and_one_process_sweeps_at_a_time(
    store: Store, settings: Settings
) -> None:
    jobs: list[Job] = [store.create_job(parse_spec(train_spec()), None)[0] for _ in range(2)]
    for job in jobs:
        store.request_cancel(job.id)
        store._redis.zadd(KEYS["ended"], {job.id: 1.0})
    assert retention.sweep(store, settings) == 0
    store.take_sweep(60)
    assert retention.sweep(store, replace(settings, retention_days=1)) == 0 and len(store.list_jobs().data) == 2


def test_a_server_with_a_retention_archives_by_itself(store: Store, settings: Settings) -> None:
    job, _ = store.create_job(parse_spec(train_spec()), None)
    store.request_cancel(job.id)
    store._redis.zadd(KEYS["ended"], {job.id: store._now() - 86401})
    with Server(replace(settings, retention_days=1)) as server:
        wait_until(lambda: not store.exists(job.id))
        assert server.http.get(f"/jobs/{job.id}").json()["archived"] is True
