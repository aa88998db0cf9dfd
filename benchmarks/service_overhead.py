"""What the service costs: CPU beside the trainer, tokens a second against the trainer alone, the first step.

    python benchmarks/service_overhead.py [--part cpu|rate|start] [--json FILE] [--pairs 4] [--seconds 20]

A real local stack in a home of its own. CPU is that of every process but the trainer's ranks: API, Redis, agent, slot
worker, launcher and torchrun's own process. The exit code is 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)  # the stack's processes run this tree too

from benchmarks.table import RESULTS, Table
from gptcore.dataset import read_dataset
from gptcore.events import EventBase, PhaseChanged, Started, Step
from gptcore.plan import resolve
from gptcore.prepare import prepare_builtin
from gptcore.rundir import RunDir
from gptcore.spec import TrainSpec, parse_spec
from trainmaster import Client
from trainmaster.stack import Stack
from worker import trainer
from worker.job import Ticket
from worker.settings import Settings

MOST_CPU_PERCENT = 1.0
START_SECONDS, START_STRETCH_SECONDS = 6.0, 3.0
SETTLING_SECONDS = 3.0
FIRST_STEPS = 3  # of a run: not counted
T_975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23}  # Student's

Json = dict[str, Any]
COMMON: Json = {
    "kind": "train", "data": {"dataset": "python-stdlib"}, "optim": {"lr": 0.001}, "precision": "fp32",
    "compile": False,
    "evaluate": {"every_steps": 10**6, "eval_tokens": 4096}, "checkpoint": {"every_steps": 10**6},
}  # fmt: skip
USUAL: Json = COMMON | {
    "name": "usual", "model": {"preset": "gpt2-tiny", "block_size": 128}, "tokens_per_step": 4096, "max_steps": 10**6,
}  # fmt: skip
QUICK: Json = COMMON | {
    "name": "quick", "model": {"preset": "gpt2-tiny", "block_size": 64}, "tokens_per_step": 256, "max_steps": 10**6,
}  # fmt: skip
TINY: Json = COMMON | {
    "name": "tiny", "tokens_per_step": 128, "max_steps": 10**6,
    "model": {"preset": "llama-tiny", "n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 32},
}  # fmt: skip


class Bench:
    def __init__(self, stack: Stack, settings: Settings, table: Table):
        self.settings = settings
        self.client = Client(stack.url)
        self.table = table

    @contextmanager
    def running(self, spec: Json) -> Iterator[str]:
        """A job that has made its first step; cancelled afterwards, and waited for."""
        job_id = self.client.submit(spec)["id"]
        try:
            self._wait(job_id, lambda job: job["step"] > 0, 120)
            yield job_id
        finally:
            with suppress(Exception):  # it may have ended by itself
                self.client.cancel(job_id)
            self._wait(job_id, lambda job: job["status"] in ("succeeded", "cancelled", "failed"), 60)

    def _wait(self, job_id: str, wanted: Callable[[Json], bool], seconds: float) -> Json:
        deadline = time.monotonic() + seconds
        while not wanted(job := self.client.job(job_id)):
            assert time.monotonic() < deadline and job["status"] != "failed", job
            time.sleep(0.1)
        return job

    def events(self, job_id: str) -> list[EventBase]:
        return [event for event in RunDir(self.settings.runs / job_id).events() if isinstance(event, EventBase)]

    # --- CPU

    def cpu(self, spec: Json, seconds: float, target: float | None) -> None:
        """CPU of the service's processes while a job trains and nobody watches."""
        with self.running(spec) as job_id:
            time.sleep(SETTLING_SECONDS)
            before, first, began = cpu_seconds(), self.client.job(job_id)["step"], time.monotonic()
            time.sleep(seconds)
            after, last, took = cpu_seconds(), self.client.job(job_id)["step"], time.monotonic() - began
        parts = {name: 100 * (after[name] - before.get(name, 0.0)) / took for name in after if name != "ranks"}
        rate = (last - first) / took
        what = f"CPU of all but the trainer, {rate:.1f} steps a second"
        total = sum(parts.values())
        met = None if target is None else total <= target
        self.table.row(what, total, "% of a core", target=f"≤ {target:g}" if target else "", met=met, parts=parts,
                       seconds=took, steps_per_second=rate)  # fmt: skip
        for name, percent in sorted(parts.items(), key=lambda part: -part[1]):
            self.table.row(f"  of it {name}", percent, "% of a core")

    # --- tokens a second

    def rate(self, spec: Json, pairs: int, steps: int) -> None:
        """Runs through the service and by the trainer's command alone, in turn: the ratio of their tokens a second."""
        spec = spec | {"max_steps": steps}
        rates, medians = [], []
        for number in range(pairs):
            in_turn = [self._by_service, self._alone]
            seen = {run.__name__: run(spec | {"name": f"pair-{number}"}) for run in in_turn[:: 1 - 2 * (number % 2)]}
            service, alone = seen["_by_service"], seen["_alone"]
            rates.append(service[0] / alone[0])
            medians.append(alone[1] / service[1])
            self.table.row(f"pair {number + 1}: tokens a second through the service", service[0], "tokens/s",
                           alone=alone[0], ratio=rates[-1])  # fmt: skip
        for what, ratios in (("tokens a second", rates), ("median step", medians)):
            middle, low, high = geometric_mean(ratios)
            interval = f"{pairs} pairs ({low:.4f} to {high:.4f})" if pairs > 1 else "one pair"
            self.table.row(f"service : the trainer alone, {what}, {interval}", middle, "ratio",
                           low=low, high=high, ratios=ratios)  # fmt: skip

    def _by_service(self, spec: Json) -> tuple[float, float]:
        job_id = self.client.submit(spec)["id"]
        self._wait(job_id, lambda job: job["status"] == "succeeded", 600)
        return speed(self.events(job_id))

    def _alone(self, spec: Json) -> tuple[float, float]:
        """The launcher's command and environment, without the launcher."""
        resolved = resolve(as_train(spec), self.settings.datasets)
        run = RunDir(self.settings.runs / f"alone-{spec['name']}")
        run.path.mkdir(parents=True)
        run.spec.write_text(resolved.model_dump_json())
        run.claim_attempt()
        ticket = Ticket(job_id=run.path.name, attempt=1, node_rank=0, slot="none")
        meeting = f"127.0.0.1 {trainer.free_port()}"
        command = trainer.command(resolved, self.settings, run.path, ticket, meeting)
        environment = trainer.environment(resolved, self.settings)
        with (run.path / "train.log").open("w") as log:
            subprocess.run(command, cwd=run.path, env=environment, stdout=log, stderr=log, check=True)
        return speed([event for event in run.events() if isinstance(event, EventBase)])

    # --- start

    def start(self, times: int) -> None:
        """From the request to the first step of a tiny model, on a worker that is up."""
        rounds = [self._start_once() for _ in range(times)]
        for phase in rounds[0]:
            seconds = [one[phase] for one in rounds]
            total = phase.startswith("POST → first step")
            for how, value in (("median", statistics.median(seconds)), ("worst", max(seconds))):
                target = f"≤ {START_SECONDS:g} ({START_STRETCH_SECONDS:g})" if total else ""
                met = value <= START_SECONDS if total else None
                if total or how == "median":
                    self.table.row(f"{'' if total else '  '}{phase}, {how} of {times}", value, "s", target=target,
                                   met=met, seconds=seconds)  # fmt: skip
        for module in ("torch", "torch, torch._dynamo", "gptcore.setup"):  # what building a model waits for
            command, took = [sys.executable, "-c", f"import {module}"], []
            for _ in range(3):
                began = time.perf_counter()
                subprocess.run(command, check=True)
                took.append(time.perf_counter() - began)
            self.table.row(f"python -c 'import {module}', median of 3", statistics.median(took), "s", seconds=took)

    def _start_once(self) -> dict[str, float]:
        asked = time.time()
        with self.running(TINY) as job_id:
            seen = time.time()
            attempt = RunDir(self.settings.runs / job_id).attempt(1)
            launcher = psutil.Process(int((attempt.path / "launcher-0").read_text().split()[1]))
            (rank,) = launcher.children(recursive=True)  # one rank needs no torchrun
            started = started_at(rank)
            claimed = (attempt.path / "launcher-0").stat().st_mtime
            made = self.events(job_id)
        first = {
            kind: next(e.time.timestamp() for e in made if isinstance(e, kind))
            for kind in (Started, PhaseChanged, Step)
        }
        marks = {
            "POST → claimed by the launcher": claimed,
            "claimed → trainer started": started,
            "trainer started → model built": first[Started],
            "model built → warmed up, training": first[PhaseChanged],
            "training → first step made": first[Step],
            "first step made → seen by a client": seen,
        }
        ends = list(marks.values())
        phases = {name: end - begin for (name, end), begin in zip(marks.items(), [asked, *ends], strict=False)}
        return {"POST → first step made": first[Step] - asked} | phases


def as_train(spec: Json) -> TrainSpec:
    parsed = parse_spec(spec)
    assert isinstance(parsed, TrainSpec)
    return parsed


def cpu_seconds() -> dict[str, float]:
    """CPU seconds so far by part of the stack, of children that ended too; `ranks` are the trainer's."""
    used: dict[str, float] = defaultdict(float)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            line, times = process.cmdline(), process.cpu_times()
            known = {"worker.agent": "agent", "trainmaster.serve": "API", "torch.distributed.run": "torchrun",
                     "gptcore.train": "ranks"}  # fmt: skip
            name = next((name for word, name in known.items() if word in line), "")
            if not name:
                worker, parent = "worker.tasks" in line, process.parent()
                forked = worker and parent is not None and "worker.tasks" in parent.cmdline()
                name = "launcher" if forked else "slot worker" if worker else "Redis"
            used[name] += times.user + times.system + times.children_user + times.children_system
    return dict(used)


def started_at(process: psutil.Process) -> float:
    """Unix time, to 10 ms: psutil knows the machine's start only to a second."""
    ticks = float(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def speed(events: list[EventBase]) -> tuple[float, float]:
    """Tokens a second between the first counted step and the last, and the median step's seconds."""
    steps = [event for event in events if isinstance(event, Step)][FIRST_STEPS:]
    tokens = steps[-1].tokens - steps[0].tokens
    seconds = (steps[-1].time - steps[0].time).total_seconds()
    return tokens / seconds, statistics.median(step.step_seconds for step in steps)


def geometric_mean(ratios: list[float]) -> tuple[float, float, float]:
    """And its 95 % confidence interval, by Student's t over the logarithms."""
    logs = [math.log(ratio) for ratio in ratios]
    middle, half = statistics.fmean(logs), 0.0
    if len(logs) > 1:
        half = T_975.get(len(logs) - 1, 2.2) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--json", type=Path, default=RESULTS / "service_overhead.json")
    arguments.add_argument("--part", choices=("cpu", "rate", "start"), help="default: all of them")
    arguments.add_argument("--pairs", type=int, default=4)
    arguments.add_argument("--steps", type=int, default=60, help="of each run of a pair")
    arguments.add_argument("--starts", type=int, default=7)
    arguments.add_argument("--seconds", type=float, default=20, help="of each CPU reading")
    asked = arguments.parse_args()
    table = Table(asked.json, ("torch", "rq", "redis", "fastapi", "uvicorn", "psutil"))
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(home=Path(home), device="cpu")
        if read_dataset(settings.datasets, "python-stdlib") is None:
            prepare_builtin(settings.datasets, "python-stdlib")
        with Stack(settings) as stack:
            bench = Bench(stack, settings, table)
            if asked.part in (None, "start"):
                bench.start(asked.starts)
            if asked.part in (None, "cpu"):
                bench.cpu(USUAL, asked.seconds, MOST_CPU_PERCENT)
                bench.cpu(QUICK, asked.seconds, None)
            if asked.part in (None, "rate"):
                bench.rate(USUAL, asked.pairs, asked.steps)
    print(f"written to {asked.json}")
    return 0 if table.all_met else 1


if __name__ == "__main__":
    raise SystemExit(main())
