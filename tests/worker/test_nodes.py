"""Jobs on several nodes: several agents on this machine, each a node of its own name in one home."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from gptcore.prepare import prepare
from gptcore.rundir import RunDir, write_atomically
from gptcore.sources import text_files
from gptcore.spec import parse_spec
from tests.conftest import status_changes, wait_until
from tests.worker.conftest import Worker, living, node, train_spec
from tests.worker.test_end_to_end import TEXTS
from tests.worker.test_launch import at_step, ended, shipped, statuses, written
from worker.hold import Hold
from worker.job import Job
from worker.member import Member
from worker.processes import SLOT
from worker.settings import Settings
from worker.store import Store

StartWorker = Callable[[Settings], Worker]


def start_nodes(settings: Settings, start_worker: StartWorker, store: Store, *names: str) -> dict[str, Worker]:
    workers = {
        name: start_worker(replace(settings, node=name, slots=str(index % 2))) for index, name in enumerate(names)
    }
    wait_until(lambda: [node.id for node in store.list_nodes() if node.live] == sorted(names))
    return workers


def submit_wide(store: Store, **changes: Any) -> str:
    spec = train_spec(**{"max_steps": 5000, "resources": {"nodes": 2}} | changes)
    return store.create_job(parse_spec(spec), None)[0].id


def all_at_work(store: Store, job_id: str) -> None:
    """Step 5, and a trainer on every node: the fake one of the first waits for no other."""
    at_step(store, job_id, 5)
    slots = {part.slot for part in store.get_job(job_id).nodes}
    wait_until(lambda: {process.environ()[SLOT] for process in living(job_id)} == slots, 40)


def launchers(job: Job) -> list[psutil.Process]:
    """By node rank: the horses that started the job's trainers."""
    by_slot = {process.environ()[SLOT]: process.parent() for process in living(job.id)}
    found = [by_slot.get(part.slot) for part in job.nodes]
    assert all(found), by_slot
    return [process for process in found if process]


def processes_of(settings: Settings, name: str) -> list[psutil.Process]:
    """Everything that runs on a node."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environment = process.environ()
            if (environment.get("TRAINMASTER_NODE"), environment.get("TRAINMASTER_HOME")) == (name, str(settings.home)):
                found.append(process)
    return found


def test_a_job_on_two_nodes_runs_and_ends_on_both(store: Store, fake: Settings, start_worker: StartWorker) -> None:
    start_nodes(fake, start_worker, store, "a", "b")
    job = ended(store, submit_wide(store, max_steps=12))
    assert job.status == "succeeded" and [part.node for part in job.nodes] in (["a", "b"], ["b", "a"])
    assert shipped(store, job.id) == written(fake, job.id) and living(job.id) == []
    assert store.members_left(job.id) == []
    assert [slot.job_id for node in store.list_nodes() for slot in node.slots] == [None, None]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_launcher_of_either_node_is_followed_by_an_attempt_on_both(
    store: Store, fake: Settings, start_worker: StartWorker, rank: int
) -> None:
    start_nodes(fake, start_worker, store, "a", "b")
    job_id = submit_wide(store)
    all_at_work(store, job_id)
    launchers(store.get_job(job_id))[rank].kill()
    wait_until(lambda: store.get_job(job_id).attempt == 2 and store.get_job(job_id).status == "running")
    assert statuses(store, job_id)[3:] == ["recovering", "starting", "running"]
    at_step(store, job_id, 5)
    store.request_cancel(job_id)
    assert ended(store, job_id).status == "cancelled" and living(job_id) == []
    assert shipped(store, job_id) == written(fake, job_id)


def test_a_member_whose_trainer_breaks_is_named(store: Store, fake: Settings, start_worker: StartWorker) -> None:
    start_nodes(replace(fake, max_attempts=1), start_worker, store, "a", "b")
    job = ended(store, submit_wide(store, labels={"member_dies": "9"}))
    assert job.status == "failed" and job.error is not None
    assert job.error.message == f"node rank 1 in slot {job.nodes[1].slot}: torchrun ended with 1"


def test_a_member_waits_for_files_that_its_file_system_shows_late(
    store: Store, fake: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.member.FILES_SECONDS", 0.5)
    for name in "ab":
        store.register_node(node(name, 1))
    job_id = submit_wide(store)
    assert store.reserve("default") == 1
    first, second = store.outbox()
    assert store.claim(first, "boot") and store.claim(second, "boot")
    member = Member(fake, Hold(store, second, grace_seconds=1.0))
    run = RunDir(fake.runs / job_id)

    def appear() -> None:
        run.claim_attempt()
        write_atomically(run.spec, "{}")

    late = threading.Timer(0.2, appear)
    late.start()
    assert member._await_files()
    late.join()
    run.spec.unlink()
    store.report(job_id, 1, {"rendezvous": "127.0.0.1 1"})
    member.run()
    broken = store.renew(job_id, 1)
    assert broken.startswith(f"broken: node rank 1 in slot {second.slot}: {run.spec} did not appear within 0.5 s")


def test_the_log_of_each_node_is_found_by_its_rank(tmp_path: Path) -> None:
    attempt = RunDir(tmp_path).claim_attempt()
    assert attempt.node_logs() == {}
    for rank in (11, 0, 2):
        attempt.node_log(rank).touch()
    for other in ("train-.log", "train-x.log", "train.log.old"):
        (attempt.path / other).touch()
    assert [*attempt.node_logs()] == [0, 2, 11] and attempt.log == attempt.path / "train.log"


def test_a_drained_member_stops_the_whole_job_with_a_checkpoint(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    workers = start_nodes(fake, start_worker, store, "a", "b")
    job_id = submit_wide(store)
    all_at_work(store, job_id)
    member = store.get_job(job_id).nodes[1].node
    assert workers[member].stop() == []
    wait_until(lambda: store.get_job(job_id).status == "queued")
    assert '"type":"stopped"' in shipped(store, job_id)[-1] and living(job_id) == []
    wait_until(lambda: ", 1 live since" in store.get_job(job_id).status_reason)
    workers[member].start()
    wait_until(lambda: store.get_job(job_id).attempt == 2)
    at_step(store, job_id, 5)
    store.request_cancel(job_id)
    assert ended(store, job_id).status == "cancelled"


@pytest.mark.slow
def test_a_lost_node_is_named_and_the_job_goes_on_with_another(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    start_nodes(fake, start_worker, store, "a", "b", "c")
    job_id = submit_wide(store)
    all_at_work(store, job_id)
    lost = store.get_job(job_id).nodes[1].node
    stopped = processes_of(fake, lost)
    for process in stopped:  # as when its power fails: it neither goes on nor says so
        process.suspend()
    try:
        wait_until(lambda: store.get_job(job_id).attempt == 2 and store.get_job(job_id).status == "running", 60)
        assert f"attempt 1: node {lost} was lost" in [change.why for change in status_changes(store, job_id)]
        assert lost not in [part.node for part in store.get_job(job_id).nodes]
    finally:
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.resume()
    at_step(store, job_id, 20)
    store.request_cancel(job_id)
    assert ended(store, job_id).status == "cancelled"
    wait_until(lambda: not living(job_id))


@pytest.mark.slow
def test_torchrun_over_two_nodes_trains_and_resumes(
    store: Store, settings: Settings, start_worker: StartWorker
) -> None:
    prepare(settings.datasets, "tiny", text_files(TEXTS), "bytes", val_fraction=0.2)
    start_nodes(settings, start_worker, store, "a", "b")
    changes = {"data": {"dataset": "tiny"}, "max_steps": 300, "evaluate": {"every_steps": 150, "eval_tokens": 2048}}
    job_id = submit_wide(store, **changes, checkpoint={"every_steps": 10, "keep": 2})
    wait_until(lambda: store.get_job(job_id).step > 20, 60)
    (rank,) = [p for p in living(job_id) if p.environ().get("RANK") == "1"]
    rank.kill()
    wait_until(lambda: store.get_job(job_id).ended, 90)
    job = store.get_job(job_id)
    assert (job.status, job.attempt) == ("succeeded", 2), (job.error, status_changes(store, job_id))
    seen = [json.loads(line) for line in shipped(store, job_id)]
    assert all(e["world_size"] == 2 for e in seen if e["type"] == "started")
    assert any("all 2 ranks answer; 8 MiB to a node and back: node rank 1" in e.get("message", "") for e in seen)
    (resumed,) = [e for e in seen if e["type"] == "resumed"]
    assert resumed["step"] >= 10 and resumed["difference"] == 0
    assert {e["step"] for e in seen if e["type"] in ("step", "skipped")} == set(range(1, 301))
    assert living(job_id) == []
