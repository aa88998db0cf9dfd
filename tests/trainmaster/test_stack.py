"""The local stack as a user meets it: it answers, and when it ends nothing of it is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from gptcore.rotation import LOG_BYTES, older_log
from tests.conftest import wait_until
from tests.trainmaster.conftest import Start, line, processes_of, run
from trainmaster import Client
from trainmaster.stack import RESTART_SECONDS, interruptible

StartUp = Callable[[], tuple[subprocess.Popen[str], Client]]
DEMO = json.loads((Path(__file__).parents[2] / "examples" / "demo.json").read_text())
TINY = {
    **DEMO,
    "name": "tiny",
    "model": {"preset": "llama-tiny", "n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 32},
    "max_steps": 4,
    "tokens_per_step": 128,
    "evaluate": {"every_steps": 2, "eval_tokens": 512},
}


@pytest.fixture
def start_up(start: Start) -> Iterator[StartUp]:
    """`trainmaster up` on a free port, ready, and a client of it."""
    with ExitStack() as clients:

        def start_up() -> tuple[subprocess.Popen[str], Client]:
            up = start("up", "--port", "0")
            url = line(up, "trainmaster is up at ").split()[4]
            return up, clients.enter_context(Client(url))

        yield start_up


def running(client: Client, job_id: str) -> Callable[[], bool]:
    return lambda: client.job(job_id)["step"] > 0


def test_a_job_goes_through_the_stack_by_command_beside_files_named_like_our_packages(
    start_up: StartUp, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("worker", "api", "gptcore", "trainmaster"):
        Path(f"{name}.py").write_text(f"raise SystemExit('the file {name}.py of the working directory was imported')")
    up, client = start_up()
    spec = tmp_path / "tiny.json"
    spec.write_text(
        json.dumps(
            {**TINY, "labels": {"text": "größer"}, "evaluate": {**TINY["evaluate"], "final_tasks": ["val_loss"]}}
        )
    )
    url = ["--url", client.url]

    planned = json.loads(run("plan", str(spec), *url, "--json").stdout)
    here = json.loads(run("plan", str(spec), "--json").stdout)
    assert planned["plan"]["total_tokens"] == here["plan"]["total_tokens"] == 512

    with monkeypatch.context() as terminal:
        terminal.setenv("PYTHONIOENCODING", "ascii")
        watched = run("submit", str(spec), "--name", "mine", "--watch", *url)
    assert watched.returncode == 0, watched.stdout + watched.stderr
    job_id = watched.stdout.split()[0]
    assert "step 4: " in watched.stdout and watched.stdout.count("succeeded") == 2  # the run, and its evaluation
    assert "bits_per_byte" in watched.stdout and "gr??er" in watched.stdout

    shown = json.loads(run("show", job_id, *url, "--json").stdout)
    assert (shown["name"], shown["status"], shown["step"]) == ("mine", "succeeded", 4)
    listed = json.loads(run("list", "--status", "succeeded", "--kind", "train", *url, "--json").stdout)
    assert [job["id"] for job in listed["data"]] == [job_id]
    assert job_id in run("list", *url).stdout
    assert (home / "runs" / job_id / "export" / "config.json").is_file()

    events = [json.loads(text) for text in run("watch", job_id, "--json", *url).stdout.splitlines()]
    assert [event["step"] for event in events if event["type"] == "step"] == [1, 2, 3, 4]
    log = home / "runs" / job_id / "attempts" / "0001" / "train.log"
    assert run("logs", job_id, *url).stdout == log.read_text() != ""
    (node,) = json.loads(run("workers", *url, "--json").stdout)
    assert node["live"] and node["slots"][0]["id"] in run("workers", *url).stdout

    refused = run("submit", "-", *url, stdin=json.dumps({**TINY, "tokens_per_step": 100}))
    assert refused.returncode == 1
    assert refused.stderr.startswith("/tokens_per_step: tokens_per_step 100 is not a multiple")
    done = run("continue", job_id, *url)
    assert done.returncode == 1 and done.stderr.startswith(f"{job_id} is succeeded; for N steps submit ")
    more = done.stderr.partition("submit ")[2]
    done = run("submit", "-", *url, stdin=more.replace('"N"', "4"))
    assert done.returncode == 1 and done.stderr.startswith("/overrides/max_steps: max_steps 4 is not beyond")
    too_late = run("pause", job_id, *url)
    assert too_late.returncode == 1 and f"{job_id} is succeeded; only a job that waits or runs" in too_late.stderr
    for _ in range(2):  # who heard no answer asks again
        assert run("delete", job_id, *url).stdout == f"{job_id} deleted\n"
    assert not (home / "runs" / job_id).exists()
    for missing in (run("cancel", job_id, *url), run("logs", job_id, *url)):
        assert missing.returncode == 1 and f"there is no job '{job_id}'" in missing.stderr
    assert "there is no job 'job-0'" in run("delete", "job-0", *url).stderr

    up.send_signal(signal.SIGINT)
    assert up.communicate(timeout=30)[0].endswith("stopped\n")
    assert up.returncode == 0
    assert not processes_of(home)


@pytest.mark.parametrize(
    "signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_a_stack_that_ends_while_a_job_runs_leaves_no_process(
    start_up: StartUp, home: Path, signum: signal.Signals
) -> None:
    up, client = start_up()
    job_id = client.submit({**TINY, "max_steps": 1_000_000})["id"]
    wait_until(running(client, job_id), 60)
    assert len(processes_of(home)) > 6  # up, redis, api, agent, slot worker, horse, rank
    up.send_signal(signum)
    up.communicate(timeout=30)
    # killed, it cannot wait for the others; they get the grace period and a little
    wait_until(lambda: not processes_of(home), 30 if signum == signal.SIGKILL else 1)


@pytest.mark.slow
def test_a_job_goes_on_when_the_stack_is_started_again(start_up: StartUp, home: Path) -> None:
    up, client = start_up()
    job_id = client.submit({**TINY, "max_steps": 400})["id"]
    wait_until(running(client, job_id), 60)
    up.terminate()
    up.communicate(timeout=30)
    _, client = start_up()
    wait_until(lambda: client.job(job_id)["status"] == "succeeded", 90)
    events = list(client.events(job_id))
    assert [event["type"] for event in events].count("started") == 2
    assert {event["step"] for event in events if event["type"] in ("step", "skipped")} == set(range(1, 401))


def test_a_part_that_dies_ends_the_stack_and_its_log_says_why(start_up: StartUp, home: Path) -> None:
    up, _ = start_up()
    logs = [home / "logs" / f"{part}.log" for part in ("redis", "api", "worker")]
    for log in logs:  # all that they print in months
        os.truncate(log, LOG_BYTES + 1)
    wait_until(lambda: all(older_log(log).exists() and log.stat().st_size < LOG_BYTES for log in logs))
    (redis,) = [p for p in processes_of(home) if p.cwd() == str(home / "redis")]
    redis.kill()
    said = up.communicate(timeout=30)[0]
    assert up.returncode == 1
    assert "redis ended by SIGKILL; the end of " in said and "redis.log" in said
    assert not processes_of(home)


@pytest.mark.slow
def test_a_killed_api_is_started_again_at_its_address(start_up: StartUp, home: Path) -> None:
    up, client = start_up()
    (api,) = [p for p in processes_of(home) if "trainmaster.serve" in p.cmdline()]
    wait_until(lambda: time.time() - api.create_time() > RESTART_SECONDS + 2)  # it is told to whole seconds
    api.kill()
    assert client.jobs()["data"] == []  # who called meanwhile waited
    assert up.poll() is None


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


IPV6 = pytest.param("::", marks=pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6"))


@pytest.mark.parametrize("host", ["0.0.0.0", IPV6, "localhost"])
def test_a_stack_starts_wherever_it_listens_and_says_how_to_reach_it(
    start: Start, home: Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINMASTER_URL", "http://box:8000")
    key = run("keys", "create", "me").stdout.strip()
    up = start("up", "--host", host, "--port", "0")
    url = line(up, "trainmaster is up at ").split()[4]
    with Client(url, key) as client:
        assert client.jobs()["data"] == []


@pytest.mark.slow
def test_a_killed_worker_is_started_again_and_a_trainer_that_hangs_is_killed(start_up: StartUp, home: Path) -> None:
    up, client = start_up()
    job_id = client.submit({**TINY, "max_steps": 1_000_000})["id"]
    wait_until(running(client, job_id), 60)
    by_module = [(process, process.cmdline()) for process in processes_of(home)]
    trainers = [p for p, line in by_module if "gptcore.train" in line]
    workers = [p for p, line in by_module if "worker.agent" in line or "worker.tasks" in line]
    assert len(trainers) == 1 and len(workers) == 3
    (agent,) = [p for p, line in by_module if "worker.agent" in line]
    wait_until(lambda: time.time() - agent.create_time() > RESTART_SECONDS + 2)  # it is told to whole seconds
    for process in trainers:
        process.suspend()
    for process in workers:
        process.kill()
    wait_until(lambda: client.job(job_id)["attempt"] == 2 and client.job(job_id)["status"] == "running", 60)
    assert not any(process.is_running() for process in trainers)
    up.send_signal(signal.SIGINT)
    up.communicate(timeout=30)
    assert up.returncode == 0 and not processes_of(home)


def test_a_taken_port_is_named(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("up", "--port", str(port))
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another with --port, and" in done.stderr
    assert not processes_of(home)


@pytest.mark.slow
def test_a_stack_takes_over_from_one_that_is_ending(start_up: StartUp, home: Path) -> None:
    """It still has Redis and the worker as the other begins, and lets both go before that is up."""
    first, _ = start_up()
    (slot_worker,) = (p for p in processes_of(home) if "worker.tasks" in p.cmdline())
    slot_worker.suspend()  # its agent waits for it, a grace of 5 s and ten more
    first.send_signal(signal.SIGINT)
    time.sleep(1)
    assert first.poll() is None
    second, client = start_up()
    assert first.wait(30) == 0
    job_id = client.submit(TINY)["id"]
    wait_until(lambda: client.job(job_id)["status"] == "succeeded", 60)
    assert second.poll() is None


@pytest.mark.slow
def test_two_stacks_of_a_home_that_start_at_once_both_come_up(start: Start, home: Path) -> None:
    both = [start("up", "--port", "0") for _ in range(2)]
    assert len({line(up, "trainmaster is up at ") for up in both}) == 2
    time.sleep(2 * RESTART_SECONDS)
    assert [up.poll() for up in both] == [None, None]
    assert len([p for p in processes_of(home) if "worker.agent" in p.cmdline()]) == 1


def test_a_hangup_that_nohup_ignores_ends_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with interruptible(), pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_two_stacks_of_a_home_share_redis_and_worker_and_either_may_end(start_up: StartUp, home: Path) -> None:
    first, _ = start_up()
    second, client = start_up()
    agents = [p for p in processes_of(home) if "worker.agent" in p.cmdline()]
    assert len(agents) == 1
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=30)
    job_id = client.submit(TINY)["id"]
    wait_until(lambda: client.job(job_id)["status"] == "succeeded", 60)
    assert psutil.pid_exists(second.pid)
