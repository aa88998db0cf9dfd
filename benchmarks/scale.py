"""What age and size cost: many jobs, many nodes, one very long run, many people looking.

    python benchmarks/scale.py [--part jobs|nodes|long-run|viewers] [--json FILE] [--jobs 100000] [--steps 1000000]

Each part has a real Redis and a real API over loopback, in a home of its own; `long-run` also has a real worker and
trainer. Clients run on the same cores as the server. A row with p95 is the value that 95 % stay below. The exit code
is 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import itertools
import json
import math
import os
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import httpx2
import psutil
import redis

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)  # the stack's processes run this tree too

from benchmarks.api import ReplayedRun
from benchmarks.table import RESULTS, ROOT, Table
from gptcore.curves import extend
from gptcore.dataset import read_dataset
from gptcore.events import Step, parse_event
from gptcore.plan import Hardware, plan, resolve
from gptcore.prepare import prepare_builtin
from gptcore.rundir import Attempt, RunDir
from gptcore.spec import EvalSpec, TrainSpec, parse_spec
from trainmaster.stack import Stack
from worker.agent import Agent
from worker.job import Node, Slot, Ticket, new_job_id
from worker.keys import KEYS, scripts
from worker.record import new_record
from worker.settings import Settings
from worker.store import LEASE_SECONDS, Store

PARTS = ("jobs", "nodes", "long-run", "viewers")
SPEC = json.loads((ROOT / "examples" / "demo.json").read_text())
PIPELINED = 500  # script calls a round trip while jobs are made
LONGEST_SCRIPT_MS = 10.0
POLL_SECONDS = 2.0  # of a page
SELDOM = 5  # polls until a page asks once more for the workers, and for the jobs about a run


class Bench:
    """One part's server, and the rows it writes."""

    def __init__(self, stack: Stack, settings: Settings, table: Table):
        self.table = table
        self.url = stack.url
        self.port = int(stack.url.rpartition(":")[2])
        self.store = Store(stack.redis_url)
        self.redis = redis.Redis.from_url(stack.redis_url, decode_responses=True)
        self.settings = replace(settings, redis_url=stack.redis_url)
        self.runs = settings.runs
        self.http = httpx2.Client(base_url=stack.url, timeout=120, trust_env=False)
        spec = resolve(parse_spec(SPEC), settings.datasets)
        assert isinstance(spec, TrainSpec)
        self.spec = spec
        self.plan = plan(spec, Hardware(ranks=64))

    def note(self, what: str, unit: str, values: list[float], target: float) -> None:
        """A row: the p95 of `values` against `target`."""
        values = sorted(values)
        p50, p95 = statistics.median(values), values[math.ceil(0.95 * len(values)) - 1]
        spread = f", p95 (median {p50:.1f}, worst {values[-1]:.1f})" if len(values) > 1 else ""
        self.table.row(f"{what}{spread}", p95, unit, target=f"≤ {target:g}", met=p95 <= target,
                       n=len(values), p50=p50, max=values[-1])  # fmt: skip

    def one(self, what: str, unit: str, value: float, target: float) -> None:
        self.table.row(what, value, unit, target=f"≤ {target:g}", met=value <= target)

    def timed(self, what: str, ask: Callable[[int], httpx2.Response], times: int, target: float) -> None:
        """Milliseconds of `times` requests, one after the other, on one connection."""
        took = []
        for number in range(times):
            began = time.perf_counter()
            answer = ask(number)
            took.append((time.perf_counter() - began) * 1000)
            assert answer.is_success, answer.text
        self.note(what, "ms", took, target)

    def process(self, word: str) -> psutil.Process:
        """The stack's process whose command line holds `word`."""
        return next(p for p in psutil.Process().children(recursive=True) if any(word in w for w in p.cmdline()))

    @contextmanager
    def slowest_script(self, what: str) -> Iterator[None]:
        """Within, Redis notes its slow commands; a row tells the longest script."""
        self.redis.config_set("slowlog-log-slower-than", 500)  # microseconds
        self.redis.config_set("slowlog-max-len", 10_000)
        self.redis.slowlog_reset()
        yield
        entries = self.redis.slowlog_get(10_000)
        longest = max((entry["duration"] for entry in entries if _is_script(entry["command"])), default=0)
        self.one(f"{what}: longest script", "ms", longest / 1000, LONGEST_SCRIPT_MS)


def _is_script(command: bytes | str) -> bool:
    text = command.decode("utf-8", "replace") if isinstance(command, bytes) else command
    return text.upper().startswith("EVAL")


# ---- many jobs


def many_jobs(bench: Bench, count: int) -> None:
    parents = make_jobs(bench, count)
    listing = {
        "list": {},
        "list by a status that nearly all have": {"status": "cancelled"},
        "list by a rare status": {"status": "paused"},
        "list by a status no job has": {"status": "failed"},
        "list by kind": {"kind": "eval"},
        "list by label": {"label": "rare=yes"},
        "list by a label's key": {"label": "team"},
        "list by a label no job has": {"label": "team=nobody"},
        "list by name": {"name": "run-77"},
        "list by owner": {"owner": "local"},
        "list by a common status and a rare label": {"status": "cancelled", "label": "rare=yes"},
        "list by a common status and a name no job has": {"status": "cancelled", "name": "nobody"},
        "a run's children": {"parent_job_id": parents[len(parents) // 2]},
    }
    with bench.slowest_script(f"{count:,} jobs, all of the below"):
        for what, query in listing.items():

            def ask(number: int, query: dict[str, str] = query) -> httpx2.Response:
                bench.redis.set(KEYS["revision"], number)  # as if a job had changed: else one answer serves all
                return bench.http.get("/jobs", params=query)

            bench.timed(what, ask, 100, 30)
        bench.timed("submit", lambda _: bench.http.post("/jobs", json=SPEC), 200, 15)
        bench.timed("/metrics for Prometheus", lambda _: bench.http.get("/metrics"), 50, 60)
        ended = [job.id for job in bench.store.list_jobs(status="cancelled", limit=100).data]
        bench.timed("delete", lambda number: bench.http.delete(f"/jobs/{ended[number]}"), 100, 30)


def make_jobs(bench: Bench, count: int) -> list[str]:
    """`count` jobs through the store's own scripts, as years would leave them → ids of runs that have two children.

    Of a hundred, one waits, one is paused, the others are cancelled. One in ten has two evaluations.
    """
    create, stop = (bench.redis.register_script(scripts()[name]) for name in ("create", "stop"))
    numbers, parents, made = itertools.count(), [], 0
    while made < count:
        pipeline = bench.redis.pipeline(transaction=False)
        for _ in range(PIPELINED):
            number, job_id = next(numbers), new_job_id()
            labels = {"rare": "yes"} if number % 100 == 0 else {"team": f"team-{number % 7}"}
            spec = bench.spec.model_copy(update={"name": f"run-{number % 500}", "labels": labels})
            records = [new_record(job_id, None, spec, bench.plan, "cpu", "local")]
            if number % 10 == 0:
                child = parse_spec({"kind": "eval", "name": "scores", "source": job_id, "tasks": ["val_loss"]})
                assert isinstance(child, EvalSpec)
                records += [new_record(new_job_id(), job_id, child, None, "cpu", "local") for _ in range(2)]
                parents.append(job_id)
            create(args=["", "", "local", *map(json.dumps, records)], client=pipeline)
            if number % 100 != 1:
                word = "pause" if number % 100 == 2 else "cancel"
                stop(args=[job_id, "local", word], client=pipeline)
            made += len(records)
        pipeline.execute()
    return parents


# ---- many nodes


def many_nodes(bench: Bench, nodes: int = 100, waiting: int = 5000) -> None:
    """Full nodes and a long queue of several shapes: what one placement pass costs, and all agents together."""
    known = [bench_node(number) for number in range(nodes)]
    for node in known:
        bench.store.register_node(node)
    time.sleep(LEASE_SECONDS + 1)  # after a time without agents all leases get a full period first
    queue_jobs(bench, waiting)
    agents = [BenchAgent(bench.settings, node) for node in known]
    launchers = Launchers(bench)
    try:
        for node in known:
            bench.store.register_node(node)
        while bench.store.reserve("default"):
            launchers.claim_all()
        taken = []
        for _ in range(100):
            began = time.perf_counter()
            bench.store.reserve("default")
            taken.append((time.perf_counter() - began) * 1000)
        bench.note(f"{nodes} full nodes, {waiting:,} waiting: a placement pass", "ms", taken, 15)
        server = bench.process("valkey-server")
        percent = cpu_of_agents(bench, agents, launchers, server)
        bench.one(f"{nodes} agents, two jobs ending a second: CPU of Redis", "% of a core", percent, 20)
    finally:
        for agent in agents:
            agent.close()


def bench_node(number: int) -> Node:
    """Eight devices: as eight slots, or as four slots of two."""
    name, ranks = f"node-{number:03}", 1 + number // 2 % 2
    device: Literal["cpu", "cuda"] = "cuda" if number % 2 else "cpu"
    hardware = Hardware(device=device, device_name=device, ranks=ranks, memory_bytes=80 << 30)
    slots = [Slot(id=f"{name}-{index}", cores=[], gpus=[], hardware=hardware) for index in range(8 // ranks)]
    return Node(id=name, pool="default", slots=slots, runs_root="shared")


def queue_jobs(bench: Bench, count: int) -> None:
    """`count` waiting jobs of 20 shapes, and as many more as fill 100 nodes."""
    create = bench.redis.register_script(scripts()["create"])
    shapes = list(itertools.product(("cpu", "cuda"), (1, 2), (1, 2, 3, 4, 5)))
    fill = [("cpu", 1, 1), ("cpu", 2, 1), ("cuda", 1, 1), ("cuda", 2, 1)] * 200
    pipeline = bench.redis.pipeline(transaction=False)
    for device, ranks, job_nodes in [*fill, *itertools.islice(itertools.cycle(shapes), count)]:
        resources = {"device": device, "ranks_per_node": ranks, "nodes": job_nodes}
        spec = bench.spec.model_copy(update={"resources": bench.spec.resources.model_copy(update=resources)})
        record = new_record(new_job_id(), None, spec, bench.plan, device, "local")
        create(args=["", "", "local", json.dumps(record)], client=pipeline)
    pipeline.execute()


class Launchers:
    """Stands in for the launchers of all slots: it claims what was placed, and ends jobs."""

    def __init__(self, bench: Bench):
        self._store, self._redis = bench.store, bench.redis
        self._running: deque[tuple[str, int]] = deque()

    def claim_all(self) -> None:
        """Start the jobs that were placed. Their leases last: renewing them is no work of an agent."""
        for job in self._store.list_jobs(status="starting", limit=100).data:
            for allocation in job.nodes:
                ticket = Ticket(
                    job_id=job.id, attempt=job.attempt, node_rank=allocation.node_rank, slot=allocation.slot
                )
                assert self._store.claim(ticket, "bench")
                member = job.id if not allocation.node_rank else f"{job.id}/{allocation.node_rank}"
                self._redis.zadd(KEYS["leases"], {member: time.time() + 3600})
            self._store.report(job.id, job.attempt, {}, status="running")
            self._running.append((job.id, job.attempt))

    def end_one(self) -> None:
        job_id, attempt = self._running.popleft()
        self._store.finish(job_id, attempt, "succeeded", "", who="bench", fields={})


class BenchAgent(Agent):
    """An agent as it is, of a node that this machine is not: it starts no workers."""

    def __init__(self, settings: Settings, node: Node):
        super().__init__(replace(settings, node=node.id))
        self._node = node

    def serve_until(self, done: threading.Event) -> None:
        while not done.is_set():
            self._serve()

    def close(self) -> None:
        for client in (self._store, self._schema, self._rq):
            client.close()


def cpu_of_agents(
    bench: Bench, agents: list[BenchAgent], launchers: Launchers, server: psutil.Process, seconds: float = 20
) -> float:
    """% of a core that Redis takes while the agents run and two jobs end a second."""
    done = threading.Event()
    with ThreadPoolExecutor(len(agents)) as pool:
        serving = [pool.submit(agent.serve_until, done) for agent in agents]
        try:
            time.sleep(3)
            before, began, ended = sum(server.cpu_times()[:2]), time.monotonic(), 0
            while time.monotonic() - began < seconds:
                if ended < 2 * (time.monotonic() - began):
                    launchers.end_one()
                    ended += 1
                launchers.claim_all()
                time.sleep(0.1)
            percent = 100 * (sum(server.cpu_times()[:2]) - before) / (time.monotonic() - began)
        finally:
            done.set()
        for agent in serving:
            agent.result()
    return percent


# ---- one very long run

TINY: dict[str, Any] = {
    "kind": "train", "name": "long", "data": {"dataset": "python-stdlib"}, "optim": {"lr": 0.001},
    "model": {"preset": "llama-tiny", "n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 32},
    "tokens_per_step": 128, "max_steps": 10**7, "precision": "fp32", "compile": False,
    "evaluate": {"every_steps": 10**6, "eval_tokens": 4096}, "checkpoint": {"every_steps": 50, "keep": 2},
}  # fmt: skip


def long_run(bench: Bench, steps: int) -> None:
    """A run of so many steps whose attempt is killed: until its successor makes a step, and what its curves cost."""
    job_id = bench.http.post("/jobs", json=TINY).raise_for_status().json()["id"]
    run = RunDir(bench.runs / job_id)
    wait_for(lambda: run.complete_checkpoints(), 120, "a first checkpoint")
    launcher = psutil.Process(int((run.attempt(1).path / "launcher-0").read_text().split()[1]))
    for process in [launcher, *launcher.children(recursive=True)]:
        process.kill()
    killed_at = time.time()
    append_steps(run, steps)
    store_columns(run.attempt(1))
    print(f"({steps:,} events written {time.time() - killed_at:.1f} s after the kill)", flush=True)
    first = wait_for(lambda: first_step(run.attempt(2).events), 300, "a step of attempt 2")
    bench.one("attempt killed → its successor's first step", "s", first - killed_at, 30)
    bench.http.post(f"/jobs/{job_id}/cancel").raise_for_status()
    wait_for(lambda: bench.http.get(f"/jobs/{job_id}").json()["status"] == "cancelled", 120, "the end")
    api = bench.process("trainmaster.serve")
    for what in ("first read", "second read"):
        began = time.perf_counter()
        answer = bench.http.get(f"/jobs/{job_id}/metrics", params={"max_points": 2000}).raise_for_status()
        took = time.perf_counter() - began
        assert answer.json()["series"]["train_loss"]["step"][-1] > steps // 2
        bench.one(f"{steps:,} steps → 2,000 points of every curve, {what}", "s", took, 1)
    bench.one("memory of the API after that", "MiB", api.memory_info().rss / 2**20, 400)


def append_steps(run: RunDir, count: int) -> None:
    """Add `count` step events to attempt 1's file, in one go: as a trainer would have over days."""
    file = run.attempt(1).events
    lines = file.read_bytes()
    lines = lines[: lines.rfind(b"\n") + 1]
    seq, size = lines.count(b"\n"), len(lines)
    template = next(line for line in reversed(lines.splitlines()) if b'"type":"step"' in line)
    event = parse_event(template.decode())
    assert isinstance(event, Step)
    text = event.model_copy(update={"seq": 111111, "step": 222222, "train_loss": 333.25}).model_dump_json() + "\n"
    head, between, before_loss, tail = _split(text, "111111", "222222", "333.25")
    with file.open("r+b") as target:
        target.truncate(size)  # the kill may have torn the last line
        target.seek(size)
        for begin in range(0, count, 50_000):
            numbers = range(begin + 1, min(begin + 50_000, count) + 1)
            target.write("".join(
                f"{head}{seq + n}{between}{event.step + n}{before_loss}{2 + (n * 7919 % 1000) / 1000}{tail}"
                for n in numbers
            ).encode())  # fmt: skip


def store_columns(attempt: Attempt) -> None:
    """Keep the columns that its launcher stores while a run goes on: all but those of the newest 4 MiB of events."""
    after, end = -1, 0
    while end > after:
        after, end = end, extend(attempt, end)


def _split(text: str, *marks: str) -> list[str]:
    """`text` cut at each of `marks`, in their order."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        assert found
        parts.append(before)
    return [*parts, text]


def first_step(events: Path) -> float | None:
    """When (Unix time) the first step of an attempt's file was made."""
    with suppress(FileNotFoundError), events.open(encoding="utf-8") as file:
        for line in itertools.islice(file, 1000):
            if '"type":"step"' in line and line.endswith("\n"):
                step: Step = parse_event(line)
                return step.time.timestamp()
    return None


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true answer of `condition`."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"{what} did not come within {seconds:g} s"
        time.sleep(0.1)
    return answer


# ---- many people looking


def viewers(bench: Bench) -> None:
    """Of a run of 200,000 steps, of the list, and of logs in which nothing happens."""
    run = ReplayedRun(bench, "viewed")  # type: ignore[arg-type]
    run.write_file(200_000)
    opened_at_once(bench, run.id, 45)
    api = bench.process("trainmaster.serve")
    bench.one("200 pages open: 100 on the list, 100 on a run: CPU of the API", "% of a core",
              asyncio.run(cpu_of_pages(bench, run, api)), 50)  # fmt: skip
    log = bench.runs / run.id / "attempts" / "0001" / "train.log"
    log.write_text("a line\n")
    bench.one("200 viewers of a log in which nothing happens: CPU of the API", "% of a core",
              asyncio.run(cpu_of_idle_logs(bench, api, run.id)), 5)  # fmt: skip
    run.end()


def opened_at_once(bench: Bench, job_id: str, count: int) -> None:
    """Latency of `GET /jobs` while `count` viewers open the same long run."""
    done = threading.Event()
    # made before: each reads the certificates of this machine, on the same cores as the server
    clients = [httpx2.Client(base_url=bench.url, timeout=120, trust_env=False) for _ in range(count)]

    def open_it(http: httpx2.Client) -> None:
        with http:
            while not done.is_set():
                http.get(f"/jobs/{job_id}/metrics", params={"max_points": 1000}).raise_for_status()
                done.wait(1)

    threads = [threading.Thread(target=open_it, args=(http,)) for http in clients]
    for thread in threads:
        thread.start()
    try:
        bench.timed(f"GET /jobs while {count} viewers open a run of 200,000 steps",
                    lambda _: bench.http.get("/jobs", params={"limit": 20}), 100, 200)  # fmt: skip
    finally:
        done.set()
        for thread in threads:
            thread.join()


async def cpu_of_pages(
    bench: Bench, run: ReplayedRun, api: psutil.Process, pages: int = 200, seconds: float = 20
) -> float:
    """% of a core that the API takes for pages that poll as api/static/app.js does; the run makes a step a second."""
    done = asyncio.Event()
    watching = [
        asyncio.create_task(watch_list(bench, run.id, done) if number % 2 else watch_run(bench, run.id, done))
        for number in range(pages)
    ]
    stepping = asyncio.create_task(make_steps(run, done))
    await asyncio.sleep(10)  # all are open, and each has its curves
    percent = await cpu_percent(api, seconds)
    done.set()
    await asyncio.gather(*watching, stepping)
    return percent


async def watch_list(bench: Bench, running: str, done: asyncio.Event) -> None:
    connection = await Connection.open(bench)
    await asyncio.sleep(random.uniform(0, POLL_SECONDS))
    for poll in itertools.count():
        await connection.get("/jobs?view=summary&limit=50")
        await connection.get(f"/sparklines?job={running}")  # of those only that made steps since
        if poll % SELDOM == 0:
            await connection.get("/workers")
        await asyncio.sleep(POLL_SECONDS)
        if done.is_set():
            break
    connection.close()


async def watch_run(bench: Bench, job_id: str, done: asyncio.Event) -> None:
    connection = await Connection.open(bench)
    await asyncio.sleep(random.uniform(0, POLL_SECONDS))
    curves = json.loads(await connection.get(f"/jobs/{job_id}/metrics?max_points=4000"))
    reader, writer = await open_stream(bench, f"/jobs/{job_id}/metrics?after={curves['last_event_id']}")
    streaming = asyncio.create_task(drain(reader))
    for poll in itertools.count():
        await connection.get(f"/jobs/{job_id}")
        if poll % SELDOM == 0:
            await connection.get(f"/jobs?view=summary&limit=100&parent_job_id={job_id}")
            await connection.get("/workers")
        await asyncio.sleep(POLL_SECONDS)
        if done.is_set():
            break
    streaming.cancel()
    writer.close()
    connection.close()


async def make_steps(run: ReplayedRun, done: asyncio.Event) -> None:
    while not done.is_set():
        await asyncio.to_thread(run.ship_one)
        await asyncio.sleep(1)


class Connection:
    """A browser's connection, kept open, that takes answers packed: little work, so that the server's shows."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, bench: Bench) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", bench.port))

    async def get(self, path: str) -> bytes:
        """The answer's body, unpacked."""
        self._writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept-Encoding: gzip\r\n\r\n".encode())
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        assert head.startswith("http/1.1 200"), head
        length = re.search(r"content-length: (\d+)", head)
        assert length, f"an answer of unknown length: {head}"
        body = await self._reader.readexactly(int(length[1]))
        return gzip.decompress(body) if "content-encoding: gzip" in head else body

    def close(self) -> None:
        self._writer.close()


async def cpu_of_idle_logs(bench: Bench, api: psutil.Process, job_id: str, seconds: float = 20) -> float:
    """% of a core that the API takes for 200 event streams of a log."""
    connections = [await open_stream(bench, f"/jobs/{job_id}/logs") for _ in range(200)]
    tasks = [asyncio.create_task(drain(reader)) for reader, _ in connections]
    await asyncio.sleep(3)
    percent = await cpu_percent(api, seconds)
    for task, (_, writer) in zip(tasks, connections, strict=True):
        task.cancel()
        writer.close()
    return percent


async def open_stream(bench: Bench, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which server-sent events of `path` come."""
    reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n".encode())
    await reader.readuntil(b"retry: ")
    return reader, writer


async def drain(reader: asyncio.StreamReader) -> None:
    while await reader.read(1 << 16):
        pass


async def cpu_percent(process: psutil.Process, seconds: float) -> float:
    before, began = sum(process.cpu_times()[:2]), time.monotonic()
    await asyncio.sleep(seconds)
    return 100 * (sum(process.cpu_times()[:2]) - before) / (time.monotonic() - began)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path, default=RESULTS / "scale.json")
    arguments.add_argument("--part", choices=PARTS, help="default: all of them")
    arguments.add_argument("--jobs", type=int, default=100_000)
    arguments.add_argument("--steps", type=int, default=1_000_000)
    asked = arguments.parse_args()
    table = Table(asked.json, ("fastapi", "uvicorn", "redis", "pydantic", "torch"))
    parts: dict[str, Callable[[Bench], None]] = {
        "jobs": lambda bench: many_jobs(bench, asked.jobs),
        "nodes": many_nodes,
        "long-run": lambda bench: long_run(bench, asked.steps),
        "viewers": viewers,
    }
    for name in [asked.part] if asked.part else PARTS:
        with tempfile.TemporaryDirectory() as home:
            settings = Settings(home=Path(home), device="cpu")
            if read_dataset(settings.datasets, "python-stdlib") is None:
                prepare_builtin(settings.datasets, "python-stdlib")
            with Stack(settings, worker=name == "long-run") as stack:
                parts[name](Bench(stack, settings, table))
    print(f"written to {asked.json}")
    return 0 if table.all_met else 1


if __name__ == "__main__":
    raise SystemExit(main())
