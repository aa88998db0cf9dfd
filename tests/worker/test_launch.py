"""Processes, signals and an absent Redis around a trainer that only pretends; `test_end_to_end.py` trains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from rq import Queue
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from gptcore.events import Finished, JsonlReport, Notice, PhaseChanged, Scored, parse_event, read_lines
from gptcore.plan import Hardware, plan
from gptcore.rotation import older_log
from gptcore.rundir import RunDir
from gptcore.spec import parse_spec
from tests.conftest import status_changes, wait_until
from tests.worker.conftest import Worker, change, living, node, start, train_spec
from tests.worker.fake_trainer import step_event
from worker import launch, trainer
from worker.agent import Agent
from worker.connection import AWAY
from worker.hold import ASK_SECONDS, Hold
from worker.job import Job, JobError, Ticket, new_job_id
from worker.keys import KEYS
from worker.launch import Launcher
from worker.processes import Tree
from worker.progress import Progress
from worker.rest import ship_lost
from worker.settings import Settings
from worker.shipper import Shipper
from worker.store import Store
from worker.tasks import FUNCTION, TicketJob

StartWorker = Callable[[Settings], Worker]


def submit(store: Store, **labels: str) -> str:
    return store.create_job(parse_spec(train_spec(labels=labels)), None)[0].id


def submit_long(store: Store, **changes: Any) -> str:
    return store.create_job(parse_spec(train_spec(max_steps=5000, **changes)), None)[0].id


def ended(store: Store, job_id: str, seconds: float = 20.0) -> Job:
    wait_until(lambda: store.get_job(job_id).ended, seconds)
    return store.get_job(job_id)


def at_step(store: Store, job_id: str, step: int) -> None:
    wait_until(lambda: store.get_job(job_id).step >= step)


def statuses(store: Store, job_id: str) -> list[str]:
    return [change.to_status for change in status_changes(store, job_id)]


def written(settings: Settings, job_id: str) -> list[str]:
    """Every line of every attempt's events.jsonl."""
    attempts = RunDir(settings.runs / job_id).attempts()
    return [line for attempt in attempts if attempt.events.exists() for _, line in read_lines(attempt.events)]


def shipped(store: Store, job_id: str) -> list[str]:
    return [line for _, line in store.read_events(job_id, count=100_000)]


def horse(job_id: str) -> int:
    """The launcher's process: the parent of the trainer."""
    (trainer,) = [p for p in wait_until(lambda: living(job_id)) if "fake_trainer" in " ".join(p.cmdline())]
    return int(trainer.ppid())


def test_one_rank_is_started_without_torchrun_and_several_ranks_or_nodes_by_it(settings: Settings) -> None:
    def command(**resources: int) -> str:
        ticket, meeting = Ticket(job_id="job-1", attempt=1, node_rank=0, slot="a-0"), "127.0.0.1 1"
        spec = parse_spec(train_spec(resources=resources))
        return " ".join(trainer.command(spec, settings, Path("run"), ticket, meeting))

    assert command().endswith("python -u -m gptcore.train run --attempt 1")
    for several in ({"ranks_per_node": 2}, {"nodes": 2}):
        assert "-m torch.distributed.run" in command(**several)
        assert command(**several).endswith("-m gptcore.train run --attempt 1")


def test_a_container_with_less_time_than_cores_gets_as_many_threads_as_it_can_keep_busy(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.trainer.slot_cores", lambda: list(range(8)))
    for most, ranks, threads in ((None, 1, "8"), (3, 1, "3"), (3, 2, "1"), (1, 2, "1"), (16, 2, "4")):
        monkeypatch.setattr("worker.trainer.most_threads", lambda most=most: most)
        spec = parse_spec(train_spec(resources={"ranks_per_node": ranks}))
        assert trainer.environment(spec, settings)["OMP_NUM_THREADS"] == threads


def test_a_trainer_gets_neither_redis_nor_an_api_key(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRAINMASTER_REDIS_URL", "TRAINMASTER_API_KEY"):
        monkeypatch.setenv(name, "secret")
    assert "secret" not in trainer.environment(parse_spec(train_spec()), settings).values()


OUTER_LAUNCHER = {
    "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "1",
    "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "ROLE_RANK": "1", "ROLE_NAME": "default", "ROLE_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "outer",
    "TORCHELASTIC_ERROR_FILE": "/nowhere/error.json", "PET_NNODES": "2", "PET_RDZV_ENDPOINT": "10.255.255.1:29400",
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "PMI_RANK": "1", "PMIX_RANK": "1",
    "MV2_COMM_WORLD_RANK": "1", "MPI_LOCALRANKID": "1", "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_DEEPSPEED": "true", "FSDP_VERSION": "2", "DEEPSPEED_USE_HPU": "1",
    "PARALLELISM_CONFIG_TP_SIZE": "2",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["train", "prepare", "eval", "publish"])
def test_an_outer_launchers_environment_ends_at_the_trainer(
    kind: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = {
        "NCCL_SOCKET_IFNAME": "eth1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "CUDA_HOME": "/opt/cuda",
        "LD_LIBRARY_PATH": "/opt/lib", "UCX_TLS": "tcp", "FI_PROVIDER": "efa", "GLOO_SOCKET_IFNAME": "eth1",
        "HTTPS_PROXY": "http://proxy:3128", "HF_HOME": "/scratch/hf", "MKL_NUM_THREADS": "2", "SLURM_JOB_ID": "7",
        "OMP_PROC_BIND": "true", "MASTER_PLAN": "the user's own",
    }  # fmt: skip
    for name, value in {**OUTER_LAUNCHER, **users}.items():
        monkeypatch.setenv(name, value)
    specs = {
        "train": train_spec(),
        "prepare": {"kind": "prepare", "name": "x", "dataset": "x", "source": {"format": "text", "path": "x.txt"}},
        "eval": {"kind": "eval", "name": "x", "source": "job-1", "tasks": ["hellaswag"]},
        "publish": {"kind": "publish", "name": "x", "source": "job-1", "repo": "me/x"},
    }
    found = trainer.environment(parse_spec(specs[kind]), settings)
    assert not OUTER_LAUNCHER.keys() & found.keys()
    assert found | users == found


def test_a_trainers_threads_wait_as_the_workers_environment_says(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = parse_spec(train_spec())
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert trainer.environment(spec, settings)["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert trainer.environment(spec, settings)["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # which a number of looks would overrule
    assert "GOMP_SPINCOUNT" not in trainer.environment(spec, settings)


def test_a_slots_worker_that_finds_no_redis_ends_with_one_line(settings: Settings) -> None:
    settings.home.mkdir(exist_ok=True)
    away = {**os.environ, **replace(settings, redis_url="redis://127.0.0.1:1/0").to_environment()}
    command = [sys.executable, "-m", "worker.tasks", node("n", 1).slots[0].model_dump_json()]
    done = subprocess.run(command, env=away, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("slot n-0: Redis is away: Error 111") and done.stderr.count("\n") == 1


def test_a_launcher_that_looks_often_asks_redis_seldom(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.register_node(node("a", 1))
    ticket = start(store, submit(store))
    hold, asked = Hold(store, ticket, grace_seconds=1.0), []
    renew = store.renew
    monkeypatch.setattr(store, "renew", lambda *args: asked.append(args) or renew(*args))
    began = time.monotonic()
    while time.monotonic() - began < ASK_SECONDS / 2:
        assert hold.renew() == ""
    assert len(asked) == 1
    store.request_cancel(ticket.job_id)
    wait_until(lambda: hold.renew() == "cancel", 2 * ASK_SECONDS)


def test_a_job_runs_and_the_stream_is_the_file(store: Store, fake: Settings, start_worker: StartWorker) -> None:
    start_worker(fake)
    job = ended(store, submit(store))
    assert (job.status, job.step, job.tokens_seen, job.progress) == ("succeeded", 12, 12 * 256, 1.0)
    assert statuses(store, job.id) == ["queued", "starting", "running", "succeeded"]
    assert shipped(store, job.id) == written(fake, job.id) != []
    assert store.list_nodes()[0].slots[0].job_id is None


def test_a_trainer_that_dies_fails_with_its_last_words_and_the_next_job_runs(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    start_worker(fake)
    dying, next_one = submit(store, dies="9"), submit(store)
    job = ended(store, dying)
    assert (job.status, job.attempt) == ("failed", fake.max_attempts)
    assert job.error is not None and job.error.log[-1] == "the last words"
    assert "3 times in a row" in job.error.message
    assert ended(store, next_one).status == "succeeded"


def test_why_another_rank_broke_is_said_where_the_first_was_killed_over_it(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    """On GPUs the first waits for the others in a kernel that nothing interrupts."""
    start_worker(fake)
    job = ended(store, submit(store, another_rank_fails="out_of_memory"))
    assert (job.status, job.attempt) == ("failed", 1)
    assert job.error is not None and (job.error.reason, job.error.message) == ("out_of_memory", "no room")
    failed = parse_event(shipped(store, job.id)[-1])
    assert (failed.type, failed.seq, failed.rank) == ("failed", 4, 1)
    assert shipped(store, job.id) == written(fake, job.id)


def test_a_rank_that_broke_over_the_end_of_the_first_does_not_explain_it(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    start_worker(fake)
    job = ended(store, submit(store, another_rank_fails="crash"))
    assert (job.status, job.attempt) == ("failed", fake.max_attempts)
    assert job.error is not None and "ended without a word by SIGKILL" in job.error.message


def test_an_attempt_that_saved_a_checkpoint_does_not_count_against_the_next(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    start_worker(fake)
    job = ended(store, submit(store, dies="4", save="9"))
    assert (job.status, job.attempt) == ("succeeded", 5)
    assert shipped(store, job.id) == written(fake, job.id)


def test_an_old_checkpoint_does_not_excuse_new_deaths(store: Store, fake: Settings, start_worker: StartWorker) -> None:
    start_worker(fake)
    job = ended(store, submit(store, dies="9", save="1"))
    assert (job.status, job.attempt) == ("failed", fake.max_attempts)


@pytest.mark.parametrize(("reason", "attempts"), [("user_error", 1), ("crash", 3)])
def test_only_what_another_attempt_may_mend_is_tried_again(
    store: Store, fake: Settings, start_worker: StartWorker, reason: str, attempts: int
) -> None:
    start_worker(fake)
    job = ended(store, submit(store, fails=reason))
    assert (job.status, job.attempt) == ("failed", attempts)
    assert job.error is not None and job.error.reason == reason and "as it was told" in job.error.message


def test_a_run_that_no_checkpoint_has_room_for_waits_and_says_how_much_it_needs(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    start_worker(fake)
    spec = parse_spec(train_spec())
    large = plan(spec, Hardware(device="cpu", ranks=1)).model_copy(update={"checkpoint_bytes": 2**60})
    job_id = store.create_job(spec, large)[0].id
    job = wait_until(lambda: (job := store.get_job(job_id)).status == "recovering" and job)
    assert "needs 1,099,511,627,776 MiB for a checkpoint" in job.status_reason
    assert f"free some space for {fake.runs}, tried again in 20 s" in job.status_reason
    assert (store.record(job_id)["failures"], written(fake, job_id)) == ("0", [])
    store.request_cancel(job_id)


def test_a_trainer_whose_disk_is_full_is_tried_again_later(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    start_worker(fake)
    job_id = submit(store, fails="disk_full")
    job = wait_until(lambda: (job := store.get_job(job_id)).status == "recovering" and job)
    assert job.status_reason == "attempt 1: as it was told, tried again in 20 s"
    assert store.record(job_id)["failures"] == "1"
    store.request_cancel(job_id)


def test_a_drained_run_that_cannot_save_says_that_the_disk_is_full(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    worker = start_worker(fake)
    job_id = submit_long(store, labels={"no_room_at_the_end": "yes"})
    at_step(store, job_id, 2)
    worker.stop()
    job = store.get_job(job_id)
    assert (job.status, job.status_reason) == ("recovering", "attempt 1: no room, tried again in 20 s")


def test_cancel_ends_a_run_and_every_process_of_it(store: Store, fake: Settings, start_worker: StartWorker) -> None:
    start_worker(fake)
    job_id = submit_long(store, labels={"stubborn_child": "yes"})
    at_step(store, job_id, 5)
    assert len(living(job_id)) == 2
    began = time.monotonic()
    assert store.request_cancel(job_id).status == "cancelling"
    job = ended(store, job_id)
    assert job.status == "cancelled" and living(job_id) == []
    assert time.monotonic() - began < fake.grace_seconds + 10
    assert '"type":"stopped"' in shipped(store, job_id)[-1]


@pytest.mark.slow
def test_a_trainer_deaf_to_the_stop_file_is_killed_after_its_grace(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    start_worker(fake)
    job_id = submit_long(store, labels={"deaf": "yes"})
    at_step(store, job_id, 1)
    store.request_cancel(job_id)
    assert ended(store, job_id).status == "cancelled" and living(job_id) == []


def test_a_trainer_that_hangs_shows_where_and_is_followed_by_another_attempt(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    start_worker(replace(fake, hang_seconds=1.0))
    job = ended(store, submit(store, hangs="1"))
    assert (job.status, job.attempt, living(job.id)) == ("succeeded", 2, [])
    why = [change.why for change in status_changes(store, job.id)]
    assert any("no step for" in text and "after step 3" in text for text in why)
    log = RunDir(fake.runs / job.id).attempt(1).log.read_text()
    assert "fake_trainer.py" in log and "in main" in log


def test_a_log_that_grows_too_long_keeps_one_older_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptcore.rotation.LOG_BYTES", 1000)
    log, proceed = tmp_path / "train.log", tmp_path / "proceed"
    program = f"for part in 1 2; do seq -f part-$part-%g 200; until rm {proceed}; do sleep 0.05; done; done; echo end"
    ticket = Ticket(job_id=new_job_id(), attempt=1, node_rank=0, slot="a-0")
    tree = Tree(["sh", "-c", f"({program}) 2>/dev/null"], ticket, os.environ, tmp_path, log, 1.0)
    for part in (1, 2):
        last = f"part-{part}-200\n"
        wait_until(lambda last=last: tree.alive() and older_log(log).exists() and last in older_log(log).read_text())
        proceed.touch()
    wait_until(lambda: not tree.alive())
    assert log.read_text() == "end\n"
    text = older_log(log).read_text()
    assert text.startswith("part-2-1\n") and text.endswith("part-2-200\n")
    assert launch._tail(log, 3) == ["part-2-199", "part-2-200", "end"]


@pytest.mark.slow
def test_a_trainer_that_hangs_is_asked_once_to_leave(store: Store, fake: Settings, start_worker: StartWorker) -> None:
    start_worker(replace(fake, hang_seconds=1.0))
    job_id = submit(store, hangs="1")
    attempt = RunDir(fake.runs / job_id).attempt(1)
    wait_until(lambda: attempt.told() == "pause")
    store.request_cancel(job_id)
    assert ended(store, job_id).status == "cancelled"
    assert attempt.log.read_text().count("in main") == 1


def test_results_of_an_earlier_attempt_stay_when_a_later_one_scores(store: Store, fake: Settings) -> None:
    store.register_node(node("a", 1))
    job_id = submit(store)
    run = RunDir(fake.runs / job_id)
    for number, results in ((1, {"a": 1.0, "b": 1.0}), (2, {"b": 2.0}), (3, {"c": 3.0})):
        ticket = start(store, job_id)
        report = JsonlReport(run.claim_attempt().events, number)
        report(Scored(step=1, task="t", results=results, seconds=1.0))
        report.close()
        if number > 1:  # what the first left is shipped with the second's
            shipper = Shipper(store, job_id, run, number, None)
            while shipper.send():
                pass
        store.lose(job_id, ticket.attempt, 9, JobError(reason="lost", message="killed"), who="t")
        change(store, job_id, "not_before", None)
    assert store.get_job(job_id).results == {"a": 1.0, "b": 2.0, "c": 3.0}


def test_only_a_silence_far_longer_than_any_step_is_a_hang() -> None:
    progress = Progress(None)
    for event in (PhaseChanged(phase="training"), step_event(1).model_copy(update={"step_seconds": 2.0})):
        assert progress.hang(1e6, 10.0) == ""  # before a step there is nothing to judge by
        progress.take(event)
    assert progress.hang(39.0, 10.0) == "" and "for 41 s after step 1" in progress.hang(41.0, 10.0)
    assert progress.hang(41.0, 50.0) == ""
    progress.take(PhaseChanged(phase="evaluating"))
    assert progress.hang(1e6, 10.0) == ""


def test_an_event_that_cannot_be_read_stops_nobody(store: Store, fake: Settings, start_worker: StartWorker) -> None:
    worker = start_worker(fake)
    (ours,) = wait_until(store.list_nodes)
    store.set_schedulable(ours.id, False)
    store.register_node(node("newer", 1).model_copy(update={"runs_root": ours.runs_root}))
    job_id = submit(store)
    ticket = wait_until(lambda: store.get_job(job_id).nodes and Ticket(job_id=job_id, attempt=1, node_rank=0, slot=""))
    assert store.claim(ticket, "boot", ours.runs_root)
    attempt = RunDir(fake.runs / job_id).claim_attempt()
    of_later = '{"type": "averaged", "attempt": 1, "seq": 2, "time": "2026-11-26T00:00:00Z"}\n'
    lines = [step_event(n).model_copy(update={"attempt": 1, "seq": n}).model_dump_json() + "\n" for n in (1, 4)]
    attempt.events.write_text(lines[0] + of_later + "{damaged\n" + lines[1])
    store.set_schedulable(ours.id, True)
    store.retire_node("newer")  # and its launcher is never heard of again
    store._redis.zadd(KEYS["leases"], {job_id: 1.0})
    assert ended(store, job_id).status == "succeeded"
    assert worker.process.poll() is None and "Traceback" not in worker.log()
    assert [line + "\n" for line in shipped(store, job_id)[:2]] == lines


def left_by_a_dead_launcher(store: Store, settings: Settings, events: int) -> str:
    """A job whose first attempt wrote so many steps, none of them shipped. Its node is gone."""
    store.register_node(node("gone", 1))
    job_id = submit_long(store)
    start(store, job_id)
    attempt = RunDir(settings.runs / job_id).claim_attempt()
    steps = (step_event(n).model_copy(update={"attempt": 1, "seq": n}) for n in range(1, events + 1))
    attempt.events.write_text("".join(step.model_dump_json() + "\n" for step in steps))
    return job_id


def test_a_shipper_begins_where_the_last_one_ended(store: Store, fake: Settings) -> None:
    job_id = left_by_a_dead_launcher(store, fake, 700)
    run = RunDir(fake.runs / job_id)

    def sent() -> list[int]:
        shipper = Shipper(store, job_id, run, 1, None)
        return [*iter(shipper.send, 0)]

    assert sent() == [500, 200]
    assert sent() == [1] and shipped(store, job_id) == written(fake, job_id)  # the newest event, read once more
    store._redis.delete(KEYS["events"] + job_id)  # an older state came back, and its record is of another time
    store.ship(job_id, 1, "0-0", [("1-1", written(fake, job_id)[0])], {})
    assert sent() == [500, 200] and shipped(store, job_id) == written(fake, job_id)
    store._redis.hset(KEYS["job"] + job_id, "shipped", "1-700 7")  # not where a line begins
    assert sent() == [500, 200] and shipped(store, job_id) == written(fake, job_id)


def test_a_launcher_holds_its_lease_while_it_ships_and_trains_before_it_has_shipped_all(
    store: Store, fake: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = left_by_a_dead_launcher(store, fake, 1200)
    store.lose(job_id, 1, 3, JobError(reason="lost", message="killed"), who="scheduler")
    hold = Hold(store, start(store, job_id), grace_seconds=1.0)
    renewed: list[float] = []
    renew = store.renew
    monkeypatch.setattr(store, "renew", lambda *args: renewed.append(1) or renew(*args))
    launcher = Launcher(fake, hold)
    launcher._ship_all(0.0)
    assert len(shipped(store, job_id)) == 500 and len(renewed) == 1
    launcher._ship_all()
    assert len(shipped(store, job_id)) == 1200


def test_an_agent_has_the_events_of_a_lost_attempt_shipped_before_the_job_ends(store: Store, fake: Settings) -> None:
    job_id = left_by_a_dead_launcher(store, fake, 3000)
    store.request_cancel(job_id)
    store._redis.zadd(KEYS["leases"], {job_id: 1.0})
    agent = Agent(fake)
    agent._serve()  # it only starts the process that ships
    assert store.get_job(job_id).status == "cancelling"
    assert ended(store, job_id).status == "cancelled"
    assert shipped(store, job_id) == written(fake, job_id) and store._redis.scard(KEYS["unshipped"]) == 0
    assert agent._rest is not None and agent._rest.wait(10) == 0
    agent._store.close()


def test_a_run_that_finished_has_succeeded_though_its_last_launcher_was_lost(store: Store, fake: Settings) -> None:
    job_id = left_by_a_dead_launcher(store, fake, 3)
    report = JsonlReport(RunDir(fake.runs / job_id).attempt(1).events, 1)
    report(Finished(step=3, seconds=1.0))
    report.close()
    store._redis.zadd(KEYS["leases"], {job_id: 1.0})
    assert store.lose_expired(max_attempts=1) == []
    ship_lost(store, replace(fake, max_attempts=1))
    assert store.get_job(job_id).status == "succeeded"
    assert shipped(store, job_id) == written(fake, job_id) and store.unshipped("") == []


def test_an_agent_at_fault_leaves_its_workers_to_the_next(fake: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault() -> None:
        raise ZeroDivisionError

    ended: list[str] = []
    agent = Agent(fake)
    for name, does in (("_keep_workers", lambda: None), ("_serve", fault), ("_end", lambda: ended.append("end"))):
        monkeypatch.setattr(agent, name, does)
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(ZeroDivisionError):
        agent.run()
    for signum, handler in before.items():
        signal.signal(signum, handler)
    assert ended == []


def test_an_agent_that_finds_redis_in_another_life_holds_off_placing(
    store: Store, fake: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = Agent(fake)
    for life in (None, None, "another", "another", ""):  # None: what this Redis says
        if life is not None:
            monkeypatch.setattr(agent._store, "run_id", lambda life=life: life)
        agent._note_redis(redis.ConnectionError())  # as at each lost connection
        store._redis.delete(KEYS["hold"])
        before = agent._redis_run
        agent._serve()
        held = store._redis.get(KEYS["hold"]) is not None
        assert held == (before not in (None, agent._redis_run)), (before, life)
    assert agent._redis_run == ""
    agent._store.close()


@pytest.mark.slow
def test_two_homes_on_one_machine_may_share_a_nodes_name(
    store: Store, fake: Settings, start_worker: StartWorker, tmp_path: Path, redis_url: str
) -> None:
    named = replace(fake, node="box")
    start_worker(named)
    job_id = submit_long(store)
    at_step(store, job_id, 3)
    other = replace(named, home=tmp_path / "other", redis_url=redis_url[:-1] + "1")
    longer = start_worker(replace(other, node="box-2"))  # nor may a name that begins alike
    wait_until(lambda: (other.home / "slots" / "box-2-0.lock").exists())
    start_worker(other)
    at_step(store, job_id, 3 + round((fake.grace_seconds + 2) / 0.02))
    assert store.get_job(job_id).attempt == 1
    assert "of another life" not in longer.log()
    store.request_cancel(job_id)
    ended(store, job_id)


def test_a_full_disk_leaves_no_process_of_a_job_that_is_cancelled(
    store: Store, fake: Settings, start_worker: StartWorker, tmp_path: Path
) -> None:
    disk = fake.runs
    disk.mkdir(parents=True)
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]).returncode:
        pytest.skip("a small disk can be mounted only by root")
    try:
        start_worker(fake)
        job_id = submit(store, hangs="1", stubborn_child="yes")
        at_step(store, job_id, 3)
        with pytest.raises(OSError, match="No space left"), (disk / "full").open("wb", buffering=0) as full:
            while True:
                full.write(bytes(4096))
        store.request_cancel(job_id)
        assert ended(store, job_id).status == "cancelled"
        assert living(job_id) == []
    finally:
        (disk / "full").unlink(missing_ok=True)
        subprocess.run(["umount", "-l", disk], check=True)


def test_max_duration_ends_a_run_and_says_how_far_it_came(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    start_worker(fake)
    job = ended(store, submit_long(store, resources={"max_duration_seconds": 1.0}))
    assert job.status == "failed" and job.error is not None and job.error.reason == "max_duration"
    assert "of 5000 steps" in job.error.message


def test_a_killed_launcher_is_followed_by_another_attempt(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    start_worker(fake)
    job_id = submit_long(store)
    at_step(store, job_id, 5)
    began = time.monotonic()
    os.kill(horse(job_id), signal.SIGKILL)
    wait_until(lambda: store.get_job(job_id).attempt == 2 and store.get_job(job_id).status == "running")
    assert time.monotonic() - began < 10
    assert statuses(store, job_id)[3:] == ["recovering", "starting", "running"]
    at_step(store, job_id, 5)
    # the first attempt, told by the kernel that its launcher died, ended before the second began
    lines = shipped(store, job_id)
    first = [line for line in lines if '"attempt":1,' in line]
    assert '"type":"stopped"' in first[-1] and lines[: len(first)] == first
    store.request_cancel(job_id)
    assert ended(store, job_id).status == "cancelled"
    assert shipped(store, job_id) == written(fake, job_id)


def test_a_launcher_whose_attempt_was_given_up_stops_before_the_next_begins(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    start_worker(fake)
    job_id = submit_long(store)
    at_step(store, job_id, 5)
    store.lose(job_id, 1, 3, JobError(reason="lost", message="nobody heard of it"), who="scheduler")
    wait_until(lambda: store.get_job(job_id).attempt == 2 and store.get_job(job_id).status == "running")
    store.request_cancel(job_id)
    assert ended(store, job_id).status == "cancelled"
    first, second = ([line for line in written(fake, job_id) if f'"attempt":{n},' in line] for n in (1, 2))
    assert parse_event(first[-1]).type == "stopped"
    assert parse_event(first[-1]).time < parse_event(second[0]).time
    assert shipped(store, job_id) == first + second


def test_a_run_that_finished_unseen_is_not_run_again(store: Store, fake: Settings, start_worker: StartWorker) -> None:
    """The launcher died between the trainer's last event and its shipping."""
    store.register_node(node("gone", 1))
    job_id = submit(store)
    start(store, job_id)
    report = JsonlReport(RunDir(fake.runs / job_id).claim_attempt().events, 1)
    report(Finished(step=12, seconds=1.0))
    report.close()
    store.lose(job_id, 1, 3, JobError(reason="lost", message="killed"), who="scheduler")
    store.retire_node("gone")
    start_worker(fake)
    assert ended(store, job_id).status == "succeeded"
    assert shipped(store, job_id) == written(fake, job_id) and len(shipped(store, job_id)) == 1


def test_a_drained_worker_gives_its_job_back_and_leaves_no_process(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    worker = start_worker(fake)
    job_id = submit_long(store)
    at_step(store, job_id, 3)
    began = time.monotonic()
    assert worker.stop() == [] and living(job_id) == []
    assert time.monotonic() - began < fake.grace_seconds + 5  # told, not waited for and killed
    job = store.get_job(job_id)
    assert (job.status, job.status_reason) == ("queued", "its worker was drained")
    assert not any(node.live for node in store.list_nodes())
    worker.start()
    wait_until(lambda: store.get_job(job_id).attempt == 2)
    at_step(store, job_id, 3)
    store.request_cancel(job_id)
    assert ended(store, job_id).status == "cancelled"


@pytest.mark.slow
def test_a_killed_slot_worker_takes_its_launcher_along_and_is_started_again(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    start_worker(fake)
    job_id = submit_long(store)
    at_step(store, job_id, 3)
    launcher = psutil.Process(horse(job_id))
    launcher.parent().kill()
    launcher.wait(10)
    wait_until(lambda: store.get_job(job_id).attempt == 2 and store.get_job(job_id).status == "running")
    assert statuses(store, job_id)[3:] == ["queued", "starting", "running"]
    store.request_cancel(job_id)
    assert ended(store, job_id).status == "cancelled"
    assert shipped(store, job_id) == written(fake, job_id)


def test_a_killed_agent_harms_no_run_and_the_next_one_takes_over(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    worker = start_worker(fake)
    job_id = submit_long(store)
    at_step(store, job_id, 3)
    launcher = horse(job_id)
    worker.process.kill()
    worker.process.wait(5)
    at_step(store, job_id, store.get_job(job_id).step + 20)
    worker.start()
    wait_until(lambda: "goes on" in worker.log())
    at_step(store, job_id, store.get_job(job_id).step + 20)
    assert (store.get_job(job_id).attempt, horse(job_id)) == (1, launcher)
    store.request_cancel(job_id)
    assert ended(store, job_id).status == "cancelled"
    assert ended(store, submit(store)).status == "succeeded"  # by the same worker
    assert "is started again" not in worker.log()


def test_an_agent_ends_what_a_former_life_left_in_slots_that_are_no_more(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    worker = start_worker(replace(fake, slots="0,1"))
    jobs = [submit_long(store) for _ in range(2)]
    for job_id in jobs:
        at_step(store, job_id, 3)
    worker.process.kill()
    worker.process.wait(5)
    worker.settings = fake  # one slot with both cores: neither of the two that there were
    worker.start()
    found = [(1, "queued"), (2, "running")]
    wait_until(lambda: sorted((job.attempt, job.status) for job in map(store.get_job, jobs)) == found)
    assert "is of another life" in worker.log()
    for job_id in jobs:
        store.request_cancel(job_id)
        assert ended(store, job_id).status == "cancelled"


def test_training_goes_on_while_redis_is_away(
    store: Store, fake: Settings, start_worker: StartWorker, redis_url: str
) -> None:
    start_worker(fake)
    job_id = submit_long(store)
    at_step(store, job_id, 3)
    with redis.Redis.from_url(redis_url) as client:
        client.execute_command("CLIENT PAUSE 3500 ALL")
    before = len(written(fake, job_id))
    wait_until(lambda: len(written(fake, job_id)) > before + 50)  # a second's worth of steps
    wait_until(lambda: _answers(store))
    wait_until(lambda: store.get_job(job_id).step > before + 50)
    job = store.get_job(job_id)
    assert (job.status, job.attempt) == ("running", 1)
    store.request_cancel(job_id)
    ended(store, job_id)
    assert shipped(store, job_id) == written(fake, job_id)


@pytest.mark.slow
def test_training_goes_on_while_redis_takes_no_writes(
    store: Store, fake: Settings, start_worker: StartWorker, redis_url: str
) -> None:
    worker = start_worker(fake)
    job_id = submit_long(store)
    at_step(store, job_id, 3)
    with redis.Redis.from_url(redis_url) as client:
        client.config_set("maxmemory", 1)  # a full disk or a replica refuses alike
        with pytest.raises(AWAY, match="maxmemory"):
            store.request_cancel(job_id)
        waiting = store.get_job(job_id)  # what reads goes on
        before = len(written(fake, job_id))
        wait_until(lambda: len(written(fake, job_id)) > before + 150)
        client.config_set("maxmemory", 0)
    second = submit_long(store)  # the slot's worker lives too, or is there again
    wait_until(lambda: store.get_job(job_id).step > before + 150)
    assert (waiting.status, store.get_job(job_id).status, store.get_job(job_id).attempt) == ("running", "running", 1)
    assert "Redis is away" in worker.log() and "Traceback" not in worker.log(), worker.log()
    store.request_cancel(job_id)
    ended(store, job_id)
    assert shipped(store, job_id) == written(fake, job_id)
    at_step(store, second, 3)
    store.request_cancel(second)
    ended(store, second)


def _answers(store: Store) -> bool:
    try:
        store.list_nodes()
    except redis.TimeoutError:
        return False
    return True


def test_a_job_with_no_free_slot_waits_and_two_slots_run_two(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    worker = start_worker(fake)
    first, second = submit_long(store), submit_long(store)
    at_step(store, first, 3)
    assert store.get_job(second).queue_position == 1
    store.request_cancel(first)
    at_step(store, second, 3)
    store.request_cancel(second)
    assert ended(store, second).status == "cancelled"
    assert "ended with" not in worker.log()


def test_whatever_else_stands_in_the_queue_is_not_run(
    store: Store, fake: Settings, start_worker: StartWorker, tmp_path: Path
) -> None:
    start_worker(fake)
    slot = wait_until(store.list_nodes)[0].slots[0]
    touched = tmp_path / "touched"
    with redis.Redis.from_url(fake.redis_url) as client:
        queue = Queue(slot.id, connection=client, serializer=JSONSerializer)
        job = queue.enqueue_call("os.system", args=[f"touch {touched}"], on_failure=None)
        wait_until(lambda: job.get_status() == JobStatus.FAILED)
        assert not touched.exists()
        assert TicketJob.fetch(job.id, client, JSONSerializer).func_name != FUNCTION
    assert ended(store, submit(store)).status == "succeeded"


def test_a_ticket_made_by_hand_touches_no_file(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings.to_environment().items():
        monkeypatch.setenv(name, value)
    target = settings.home / "slots" / "a-0.ticket"
    target.parent.mkdir(parents=True)
    sound = Ticket(job_id=new_job_id(), attempt=1, node_rank=0, slot="a-0")
    assert sound.is_sound
    for changed in (
        {"slot": f"{settings.home}/slots/a-0"}, {"slot": "../slots/a-0"}, {"slot": "a-0\n"}, {"slot": ""},
        {"job_id": "job-1"}, {"job_id": "../../job-0123456789ab"}, {"attempt": 0},
    ):  # fmt: skip
        launch.run(*sound.model_copy(update=changed).model_dump().values())
    assert [*settings.home.rglob("*")] == [target.parent]
    launch.run(*sound.model_dump().values())  # an agent might have made this one
    assert target.exists()


@pytest.mark.slow
def test_a_second_worker_on_the_same_home_is_refused(store: Store, fake: Settings, start_worker: StartWorker) -> None:
    start_worker(fake)
    wait_until(store.list_nodes)
    second = start_worker(fake)
    assert second.process.wait(10) == 1
    assert f"as node {wait_until(store.list_nodes)[0].id}" in second.log()


def test_a_paused_job_saves_itself_waits_and_goes_on(store: Store, fake: Settings, start_worker: StartWorker) -> None:
    start_worker(fake)
    job_id = submit_long(store)
    at_step(store, job_id, 3)
    assert store.request_pause(job_id).status == "pausing"
    wait_until(lambda: store.get_job(job_id).status == "paused")
    assert living(job_id) == [] and '"reason":"pause"' in shipped(store, job_id)[-1]
    assert ended(store, submit(store)).status == "succeeded"  # its slot is free
    store.resume(job_id)
    wait_until(lambda: store.get_job(job_id).attempt == 2)
    at_step(store, job_id, 3)
    store.request_cancel(job_id)
    assert ended(store, job_id).status == "cancelled"


def test_an_older_state_of_redis_takes_nothing_from_a_run(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    """As after a restore from a backup: the job's record and stream are those of before the run, or are gone."""
    start_worker(fake)
    job_id = submit_long(store)
    at_step(store, job_id, 5)
    for forgotten in ("events", "job", "leases", "owners", "changes"):
        store._redis.delete(KEYS[forgotten] + (job_id if forgotten in ("events", "job", "changes") else ""))
    wait_until(lambda: store.list_jobs().data and store.get_job(job_id).status == "running")
    at_step(store, job_id, store.get_job(job_id).step + 20)
    assert store.get_job(job_id).attempt == 1
    assert statuses(store, job_id) == ["running"]
    store.request_cancel(job_id)
    assert ended(store, job_id).status == "cancelled"
    assert shipped(store, job_id) == written(fake, job_id)


def test_an_attempt_that_redis_would_make_again_gets_the_next_number(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    job_id = submit_long(store)
    run_dir = RunDir(fake.runs / job_id)
    for _ in range(3):
        report = JsonlReport(run_dir.claim_attempt().events, len(run_dir.attempts()))
        report(Notice(message="from a time that Redis forgot"))
        report.close()
    start_worker(fake)
    at_step(store, job_id, 3)
    assert store.get_job(job_id).attempt == 4
    assert "in a history that Redis forgot" in [c.why for c in status_changes(store, job_id)][2]
    store.request_cancel(job_id)
    assert ended(store, job_id).status == "cancelled"
    assert shipped(store, job_id) == written(fake, job_id) and "a time that" in shipped(store, job_id)[2]


def test_another_jobs_run_directory_is_left_alone(store: Store, fake: Settings, start_worker: StartWorker) -> None:
    start_worker(fake)
    first = ended(store, submit(store))
    store.request_pause(second := submit_long(store))
    (fake.runs / second).symlink_to(fake.runs / first.id)
    before = written(fake, first.id)
    store.resume(second)
    job = ended(store, second)
    assert job.error is not None and job.error.reason == "foreign_run_dir"
    assert f"is the run directory of {first.id}; move it away" in job.error.message
    assert written(fake, first.id) == before


def test_a_spec_changed_in_redis_does_not_change_a_run(store: Store, fake: Settings, start_worker: StartWorker) -> None:
    start_worker(fake)
    job_id = submit(store, dies="1")
    wait_until(lambda: store.get_job(job_id).attempt == 1 and (fake.runs / job_id / "spec.json").exists())
    changed = train_spec(max_steps=99)
    store._redis.hset(KEYS["job"] + job_id, "spec", parse_spec(changed).model_dump_json())
    assert ended(store, job_id).step == 12
    assert "the spec in Redis was changed" in "".join(shipped(store, job_id))
    assert shipped(store, job_id) == written(fake, job_id)


def test_a_stop_file_of_an_earlier_attempt_stops_no_later_one(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    start_worker(fake)
    job_id = submit(store, dies="1")
    wait_until(lambda: store.get_job(job_id).attempt == 1 and RunDir(fake.runs / job_id).attempt(1).path.exists())
    RunDir(fake.runs / job_id).attempt(1).stop.write_text("cancel")
    job = ended(store, job_id)
    assert (job.status, job.step) == ("succeeded", 12)


@pytest.mark.slow
def test_a_launcher_that_hangs_is_killed_and_its_slot_serves_again(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    start_worker(fake)
    job_id = submit_long(store)
    at_step(store, job_id, 3)
    hanging = psutil.Process(horse(job_id))
    hanging.suspend()
    wait_until(lambda: store.get_job(job_id).status == "recovering", 30)
    store.request_cancel(job_id)
    assert ended(store, submit(store), 60).status == "succeeded"
    assert not hanging.is_running()


@pytest.mark.slow
def test_what_dead_processes_had_not_shipped_is_there_before_the_job_ends(
    store: Store, fake: Settings, start_worker: StartWorker
) -> None:
    worker = start_worker(fake)
    job_id = submit_long(store)
    at_step(store, job_id, 3)
    launcher = psutil.Process(horse(job_id))
    slot_worker = launcher.parent()
    assert slot_worker is not None
    for process in (worker.process, launcher, slot_worker):
        process.suspend()  # none of them is to see another die
    for process in (worker.process, slot_worker, launcher):
        process.kill()
    assert store.request_cancel(job_id).status == "cancelling"
    worker.process.wait(5)
    worker.start()
    assert ended(store, job_id, 40).status == "cancelled" and living(job_id) == []
    assert shipped(store, job_id) == written(fake, job_id)
    assert '"type":"stopped"' in shipped(store, job_id)[-1]
