"""The real application under a real uvicorn, and runs that look as if a worker made them."""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from typing import Any, Self

import httpx2

from api import app
from gptcore.events import Evaluated, EventBase, JsonlReport, Step, read_lines
from gptcore.plan import Hardware
from gptcore.rundir import RunDir
from tests.conftest import wait_until
from worker.job import Job, JobError, Node, Slot, Status, Ticket
from worker.settings import Settings
from worker.store import Store


class Server:
    """Serves from `start` to `stop`, and again: always at the same address."""

    def __init__(self, settings: Settings, **options: bool):
        self._settings = settings
        self._options = options
        self._port = 0
        self.start()
        self.http = httpx2.Client(base_url=self.url, timeout=30, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._uvicorn.server_state.connections)

    def start(self) -> None:
        listener = socket.create_server(("127.0.0.1", self._port))
        self._port = listener.getsockname()[1]
        self._uvicorn = app.Server(self._settings, **self._options)
        self._thread = threading.Thread(target=self._uvicorn.run, kwargs={"sockets": [listener]})
        self._thread.start()
        wait_until(lambda: self._uvicorn.started)

    def stop(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


class FakeRun:
    """A job on its way through the store, and the files its trainer would write."""

    def __init__(self, settings: Settings, store: Store, job: Job):
        self._store = store
        self._dir = RunDir(settings.runs / job.id)
        self._attempt: Any = None
        self._report: JsonlReport | None = None
        self._offset = 0
        self.id = job.id
        self.number = 0

    def begin_attempt(self) -> None:
        """What a launcher does before its trainer starts."""
        if self.number:
            self.stop_writing()
            error = JobError(reason="lost", message="its worker was lost")
            self._store.lose(self.id, self.number, 99, error, who="test")
        if not self._store.list_nodes():
            self._store.register_node(node(2, 2))
        assert self._store.reserve("default") == 1
        job = self._store.get_job(self.id)
        self.number = job.attempt
        ticket = Ticket(job_id=self.id, attempt=self.number, node_rank=0, slot=job.nodes[0].slot)
        assert self._store.claim(ticket, "boot")
        self._store.report(self.id, self.number, {}, status="running")
        self._attempt = self._dir.attempt(self.number)
        self._attempt.path.mkdir(parents=True)
        self._report, self._shipped = JsonlReport(self._attempt.events, self.number), 0

    def write(self, *events: EventBase, ship: bool = True) -> None:
        """Append events to the attempt's file and, as a launcher would, to the store."""
        assert self._report
        for event in events:
            self._report(event)
        if ship:
            lines = [line for _, line in read_lines(self._attempt.events)]
            new = [(f"{self.number}-{seq}", line) for seq, line in enumerate(lines, 1)][self._shipped :]
            self._store.ship(self.id, self.number, self._store.last_event(self.id), new, {})
            self._shipped = len(lines)

    def report(self, **fields: Any) -> None:
        """Set fields of the job, as a launcher does from events."""
        self._store.report(self.id, self.number, fields)

    def end(self, status: Status = "succeeded", **fields: Any) -> None:
        self.stop_writing()
        self._store.finish(self.id, self.number, status, "", who="test", fields=fields)

    def stop_writing(self) -> None:
        if self._report:
            self._report.close()
            self._report = None

    @property
    def directory(self) -> RunDir:
        return self._dir

    @property
    def events_file(self) -> Any:
        return self._attempt.events

    @property
    def log_file(self) -> Any:
        return self._attempt.log


def node(*ranks: int, name: str = "node") -> Node:
    slots = [
        Slot(id=f"{name}-{i}", cores=list(range(count)), gpus=[], hardware=Hardware(ranks=count))
        for i, count in enumerate(ranks)
    ]
    return Node(id=name, pool="default", slots=slots)


def step(number: int, train_loss: float = 2.0, **fields: Any) -> Step:
    values: dict[str, Any] = {
        "tokens": 256 * number, "lr": 0.001, "grad_norm": 1.0, "step_seconds": 0.1, "tokens_per_second": 2560.0,
        "data_wait_seconds": 0.0,
    }  # fmt: skip
    return Step.model_validate(values | {"step": number, "train_loss": train_loss} | fields)


def evaluated(number: int, val_loss: float) -> Evaluated:
    return Evaluated(
        step=number, tokens=256 * number, val_loss=val_loss, bits_per_byte=val_loss / 0.6931, eval_tokens=1000,
        best=True, seconds=0.1,
    )  # fmt: skip


def train_spec(**changes: Any) -> dict[str, Any]:
    """A spec as a user writes it; `changes` replace its fields."""
    spec: dict[str, Any] = {
        "kind": "train",
        "name": "tiny",
        "model": {"preset": "llama-tiny", "block_size": 32},
        "data": {"dataset": "python-stdlib"},
        "optim": {"lr": 0.003},
        "max_steps": 12,
        "tokens_per_step": 256,
    }
    return spec | changes
