"""How the API fares on this machine: a real server and a real Redis over loopback, in a home of their own.

    python benchmarks/api.py [--json FILE] [--jobs 12500] [--points 1000000] [--watchers 200]

A row is the value that 95 % stay below, its target too. Clients run on the same cores as the server, so what they
cost is in the figures. The exit code is 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import httpx2
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.table import RESULTS, ROOT, Table
from gptcore.events import Step
from gptcore.plan import Hardware, plan, resolve
from gptcore.rundir import RunDir
from gptcore.spec import TrainSpec, parse_spec
from trainmaster.stack import Stack
from worker.job import Node, Slot, Ticket
from worker.settings import Settings
from worker.store import Store

SPEC = json.loads((ROOT / "examples" / "demo.json").read_text())


class Bench:
    def __init__(self, stack: Stack, settings: Settings, table: Table):
        self.table = table
        self.url = stack.url
        self.store = Store(stack.redis_url)
        self.runs = settings.runs
        self.http = httpx2.Client(base_url=stack.url, timeout=120, trust_env=False)
        self.spec: TrainSpec = resolve(parse_spec(SPEC), settings.datasets)
        self.plan = plan(self.spec, Hardware(ranks=64))

    def note(self, what: str, unit: str, values: list[float], target: float | None = None) -> None:
        values = sorted(values)
        p50, p95 = statistics.median(values), values[math.ceil(0.95 * len(values)) - 1]
        verdict = {} if target is None else {"target": f"≤ {target:g}", "met": p95 <= target}
        spread = f" (median {p50:.1f}, worst {values[-1]:.1f})" if len(values) > 1 else ""
        self.table.row(f"{what}{spread}", p95, unit, n=len(values), p50=p50, max=values[-1], **verdict)

    def timed(self, what: str, ask: Callable[[int], httpx2.Response], times: int, target: float | None = None) -> None:
        """Milliseconds of `times` requests, one after the other, on one connection."""
        took = []
        for number in range(times):
            began = time.perf_counter()
            answer = ask(number)
            took.append((time.perf_counter() - began) * 1000)
            assert answer.is_success, answer.text
        self.note(what, "ms", took, target)

    def submit(self, times: int) -> None:
        def ask(number: int) -> httpx2.Response:
            return self.http.post("/jobs", json=SPEC, headers={"Idempotency-Key": f"submit-{number}"})

        self.timed("submit", ask, times)
        before = sum(self.store.census().statuses.values())
        self.timed("submit again with the same key", ask, times)
        assert sum(self.store.census().statuses.values()) == before

    def fill(self, count: int) -> None:
        """Jobs of which every tenth is cancelled and one in a hundred has a label."""

        def make(number: int) -> None:
            labels = {"rare": "yes"} if number % 100 == 0 else {"who": f"user{number % 7}"}
            spec = self.spec.model_copy(update={"name": f"run-{number % 500}", "labels": labels})
            job, _ = self.store.create_job(spec, self.plan)
            if number % 10 == 0:
                self.store.request_cancel(job.id)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(make, range(count)))

    def lists(self, count: int, times: int = 200) -> None:
        for what, query in {
            "list": {},
            "list by status": {"status": "cancelled"},
            "list by label": {"label": "rare=yes"},
            "list by name": {"name": "run-77"},
            "list by what no job has": {"status": "failed"},
        }.items():
            self.timed(
                f"{what}, {count} jobs",
                lambda _, query=query: self.http.get("/jobs", params=query),  # type: ignore[misc]
                times,
                50,
            )
        self.timed("/metrics for Prometheus", lambda _: self.http.get("/metrics"), 20)

    def history(self, points: int) -> None:
        run = ReplayedRun(self, "history")
        run.write_file(points)
        path = f"/jobs/{run.id}/metrics?max_points=1000"
        self.timed(f"first read of {points} steps, every curve", lambda _: self.http.get(path), 1)

        def again(number: int) -> httpx2.Response:
            run.write_file(1)
            return self.http.get(path)

        self.timed(f"{points} steps → 1,000 points, every curve, a step later each", again, 100, 200)
        run.end()

    def streams(self, watchers: int, seconds: float = 20, rate: float = 20) -> None:
        run = ReplayedRun(self, "streams")
        events = int(seconds * rate)
        lags: list[float] = []

        async def watch(ready: asyncio.Semaphore) -> int:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(self.url.rpartition(":")[2]))
            request = f"GET /jobs/{run.id}/metrics HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n"
            writer.write(request.encode())
            await reader.readuntil(b"retry: 1000")
            ready.release()
            seen = 0
            while True:
                line = await reader.readline()
                if line.startswith(b"event: end"):
                    writer.close()
                    return seen
                if line.startswith(b"data: {"):
                    made_at = datetime.fromisoformat(json.loads(line[6:])["time"])
                    lags.append((datetime.now(UTC) - made_at).total_seconds() * 1000)
                    seen += 1

        async def all_of_them() -> list[int]:
            ready = asyncio.Semaphore(0)
            tasks = [asyncio.create_task(watch(ready)) for _ in range(watchers)]
            for _ in tasks:
                await ready.acquire()
            await asyncio.sleep(1)
            for _ in range(events):
                await asyncio.to_thread(run.ship_one)
                await asyncio.sleep(1 / rate)
            await asyncio.to_thread(run.end)
            return await asyncio.gather(*tasks)

        seen = asyncio.run(all_of_them())
        assert seen == [events] * watchers, f"{events} events, seen {set(seen)}"
        self.note(f"event written → {watchers} clients, {rate:g} events a second", "ms", lags, 500)


class ReplayedRun:
    """A job in the store as if an attempt of it ran, and its events."""

    def __init__(self, bench: Bench, pool: str):
        self._store = bench.store
        spec: TrainSpec = bench.spec.model_copy(
            update={"resources": bench.spec.resources.model_copy(update={"pool": pool})}
        )
        job, _ = self._store.create_job(spec, bench.plan)
        self.id, self._step = job.id, 0
        slot = Slot(id=f"{pool}-0", cores=[0], gpus=[], hardware=Hardware())
        node = Node(id=pool, pool=pool, slots=[slot])
        self._store.register_node(node)
        while not self._store.reserve(pool):  # after a gap in which no node lived, leases get a full period first
            self._store.register_node(node)
            time.sleep(0.5)
        assert self._store.claim(Ticket(job_id=job.id, attempt=1, node_rank=0, slot=slot.id), "bench")
        self._store.report(job.id, 1, {}, status="running")
        self._attempt = RunDir(bench.runs / job.id).claim_attempt()

    def _next(self) -> str:
        self._step += 1
        step = Step(
            attempt=1, seq=self._step, step=self._step, tokens=8192 * self._step,
            train_loss=2 + math.sin(self._step) / 10, lr=0.001, grad_norm=1.0, step_seconds=0.1,
            tokens_per_second=81920.0, data_wait_seconds=0.001, mfu=0.4, mfu_causal=0.38, peak_memory_bytes=10**9,
        )  # fmt: skip
        return step.model_dump_json()

    def write_file(self, count: int) -> None:
        with self._attempt.events.open("a") as file:
            file.writelines(f"{self._next()}\n" for _ in range(count))

    def ship_one(self) -> None:
        line = self._next()
        self._store.ship(self.id, 1, "0-0", [(f"1-{self._step}", line)], {})

    def end(self) -> None:
        self._store.finish(self.id, 1, "succeeded", "", who="bench", fields={})


def memory(bench: Bench, when: str) -> None:
    for process in psutil.Process().children(recursive=True):
        name = "API" if "trainmaster.serve" in process.cmdline() else "Redis"
        bench.note(f"memory of {name} {when}", "MiB", [process.memory_info().rss / 2**20])


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path, default=RESULTS / "api.json")
    arguments.add_argument("--jobs", type=int, default=12_500)
    arguments.add_argument("--points", type=int, default=1_000_000)
    arguments.add_argument("--watchers", type=int, default=200)
    asked = arguments.parse_args()
    if asked.jobs < 500:
        arguments.error(f"--jobs {asked.jobs}: give 500 or more")
    table = Table(asked.json, ("fastapi", "uvicorn", "redis", "pydantic"))
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(home=Path(home), device="cpu")
        with Stack(settings, worker=False) as stack:
            bench = Bench(stack, settings, table)
            memory(bench, "at the start")
            bench.submit(500)
            bench.fill(asked.jobs - 500)
            bench.lists(asked.jobs)
            memory(bench, f"with {asked.jobs} jobs")
            bench.streams(asked.watchers)
            memory(bench, f"after {asked.watchers} watchers")
            bench.history(asked.points)
            memory(bench, "after the long run")
    print(f"written to {asked.json}")
    return 0 if table.all_met else 1


if __name__ == "__main__":
    raise SystemExit(main())
