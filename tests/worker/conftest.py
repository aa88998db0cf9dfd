"""Job specs small enough to run in seconds, nodes that only the store knows, and a worker that runs jobs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from gptcore.plan import Hardware
from gptcore.procs import die_with_parent
from worker import processes
from worker.job import Node, Slot, Ticket
from worker.keys import KEYS
from worker.settings import Settings
from worker.store import Store


def train_spec(**changes: Any) -> dict[str, Any]:
    """A tiny train spec; `changes` replace its fields."""
    spec: dict[str, Any] = {
        "kind": "train",
        "name": "tiny",
        "model": {"preset": "llama-tiny", "n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 32, "vocab_size": 256},
        "data": {"dataset": "python-stdlib"},
        "optim": {"lr": 0.003, "warmup_steps": 2},
        "max_steps": 12,
        "tokens_per_step": 256,
        "precision": "fp32",
        "compile": False,
        "evaluate": {"every_steps": 6, "eval_tokens": 2048},
        "checkpoint": {"every_steps": 4, "keep": 2},
    }
    return spec | changes


def node(name: str, *ranks: int, device: str = "cpu", pool: str = "default") -> Node:
    """A node with a slot of so many ranks each."""
    slots = [
        Slot(
            id=f"{name}-{index}",
            cores=list(range(count)),
            gpus=[],
            hardware=Hardware.model_validate({"device": device, "ranks": count}),
        )
        for index, count in enumerate(ranks)
    ]
    return Node(id=name, pool=pool, slots=slots)


def start(store: Store, job_id: str) -> Ticket:
    """Reserve and claim the job's next attempt."""
    assert store.reserve("default") == 1
    ticket = next(t for t in store.outbox() if t.job_id == job_id)
    store.clear_outbox(ticket)
    assert store.claim(ticket, "boot")
    store.report(job_id, ticket.attempt, {}, status="running")
    return ticket


def change(store: Store, job_id: str, field: str, value: object) -> None:
    """Set a field of a waiting job, or delete it with None. Its line, which no longer suits it, is made anew."""
    name = KEYS["job"] + job_id
    store._redis.hdel(name, field) if value is None else store._redis.hset(name, field, value)
    for line in store._redis.scan_iter(KEYS["line"] + "*"):
        store._redis.delete(line)


def living(job_id: str) -> list[psutil.Process]:
    """The processes of all attempts at a job."""
    return list(processes.living(**{processes.JOB: job_id}))


class Worker:
    """A worker as it is run: an agent process with all that it starts."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self._log = settings.home / "agent.log"
        self._families: list[psutil.Process] = []
        self.start()

    def start(self) -> None:
        self.settings.home.mkdir(parents=True, exist_ok=True)
        with self._log.open("a") as log:
            self.process = psutil.Popen(
                [sys.executable, "-m", "worker.agent"],
                env={**os.environ, **self.settings.to_environment()},
                stderr=log,
                preexec_fn=die_with_parent,
            )

    def family(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def stop(self, signum: int = signal.SIGTERM) -> list[psutil.Process]:
        """End it; the processes of it that are left."""
        if not self.process.is_running() or self.process.poll() is not None:
            return []
        family = self.family()
        self.process.send_signal(signum)
        self.process.wait(30)
        return psutil.wait_procs(family, timeout=5)[1]

    def log(self) -> str:
        return self._log.read_text()


@pytest.fixture
def fake(settings: Settings) -> Settings:
    """Settings whose trainer is `fake_trainer.py`: for tests of processes, not of training."""
    script = Path(__file__).with_name("fake_trainer.py")
    return replace(settings, trainer=f"{sys.executable} {script}", grace_seconds=2.0)


@pytest.fixture
def start_worker() -> Iterator[Callable[[Settings], Worker]]:
    workers: list[Worker] = []

    def start(settings: Settings) -> Worker:
        workers.append(Worker(settings))
        return workers[-1]

    yield start
    for worker in workers:
        assert worker.stop() == [], worker.log()
