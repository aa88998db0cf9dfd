"""A world to break: a real Redis, the API and agents on one home, and the one who restarts them.

The world plays systemd, or compose's `restart: unless-stopped`: a service that ended is started again
a second later, at the same address. All its folders lie in one temporary home; where mounting is
allowed the runs lie on a small file system of their own, which can be filled.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2
import psutil
import redis

from gptcore.prepare import prepare
from gptcore.sources import text_files
from tests.conftest import free_port, wait_until
from tests.worker.conftest import train_spec
from trainmaster.part import Part, PartFailed
from trainmaster.redis_server import RedisServer
from trainmaster.serve import listen
from worker.settings import Settings
from worker.store import Store

POINTS = Path(__file__).parent / "points"
RESTART_SECONDS = 1.0
GRACE_SECONDS = 4.0
DISK_BYTES = 64 * 2**20
TEXTS = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-h]*.py"))  # over a megabyte, so each split gets some
FAKE_TRAINER = Path(__file__).parent.parent / "worker" / "fake_trainer.py"


def chaos_spec(**changes: Any) -> dict[str, Any]:
    """Two ranks, some seconds of training, a checkpoint about each second."""
    spec = train_spec(
        name="chaos",
        data={"dataset": "tiny"},
        max_steps=400,
        tokens_per_step=2048,
        evaluate={"every_steps": 200, "eval_tokens": 2048},
        checkpoint={"every_steps": 40, "keep": 2},
        resources={"ranks_per_node": 2},
    )
    return spec | changes


class Service:
    """One of the world's own processes, and when it is to be started again."""

    def __init__(self, name: str, start: Callable[[], Part | None]):
        self.name = name
        self._start = start
        self.part: Part | None = None
        self.held_until = 0.0  # monotonic: not started before

    @property
    def process(self) -> psutil.Process | None:
        part = self.part
        return psutil.Process(part.pid) if part and psutil.pid_exists(part.pid) else None

    def tend(self) -> None:
        if self.part is not None:
            try:
                self.part.check()
            except PartFailed:
                self.part = None
                self.held_until = max(self.held_until, time.monotonic() + RESTART_SECONDS)
        if self.part is None and time.monotonic() >= self.held_until:
            self.part = self._start()


class World:
    """Context manager: everything answers when it is entered, nothing is left when it is left.

    `without`: the guard that is switched off. `agents`: names of nodes; one agent each on the same home.
    `slots`: as in TRAINMASTER_SLOTS.
    `trainer`: "" for the real one. `disk`: give the runs a small file system of their own.
    """

    def __init__(
        self,
        *,
        without: str = "",
        agents: tuple[str, ...] = ("",),
        slots: str = "",
        trainer: str = "",
        disk: bool = False,
    ):
        self._folder = tempfile.TemporaryDirectory(prefix="chaos-")
        self.path = Path(self._folder.name)
        home = self.path / "home"
        (home / "logs").mkdir(parents=True)
        self._without, self._disk = without, disk
        self.can_fill_disk = disk and self._mount(home / "runs")
        self._redis = RedisServer(home)
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.settings = Settings(
            home=home, url=self.url, device="cpu", slots=slots, grace_seconds=GRACE_SECONDS, trainer=trainer
        )
        self.services = {
            name: Service(name, start)
            for name, start in (
                ("redis", self._start_redis),
                ("api", self._start_api),
                *((f"agent{node}", lambda node=node: self._start_agent(node)) for node in agents),
            )
        }
        self._over = threading.Event()
        self._tender = threading.Thread(target=self._tend, name="systemd")
        self._clients: list[Any] = []

    def __enter__(self) -> Self:
        try:
            prepare(self.settings.datasets, "tiny", text_files(TEXTS), "bytes", val_fraction=0.2)
            self._start_redis_first()
            self._tender.start()
            self.store = Store(self.settings.redis_url)
            self.redis: Any = redis.Redis.from_url(self.settings.redis_url, decode_responses=True)
            self.http = httpx2.Client(base_url=self.url, timeout=30.0, trust_env=False)
            self._clients = [self.store, self.redis, self.http]
            wait_until(lambda: self.answers("/healthz"), seconds=60)
            nodes = sum(name.startswith("agent") for name in self.services)
            wait_until(lambda: len(self.store.list_nodes()) == nodes, seconds=60)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._over.set()
        if self._tender.is_alive():
            self._tender.join()
        # frozen ones hear nothing; what the services leave behind carries the home in its environment
        for process in self.processes():
            process.kill()
        psutil.wait_procs(self.processes(), timeout=5)
        for service in self.services.values():
            if service.part is not None:
                service.part.kill()
        for client in self._clients:
            client.close()
        if self.can_fill_disk:
            subprocess.run(["umount", "-l", str(self.settings.runs)], check=True)
        self._folder.cleanup()

    # ---- its services

    def hold(self, name: str, seconds: float) -> None:
        """Do not start this service again before `seconds` from now."""
        self.services[name].held_until = time.monotonic() + seconds

    def processes(self) -> list[psutil.Process]:
        """Every process of this world but this one."""
        mark, found = str(self.settings.home), []
        for process in psutil.process_iter():
            try:
                known = process.environ().get("TRAINMASTER_HOME") == mark or mark in " ".join(process.cmdline())
                if known and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def _tend(self) -> None:
        # the thread that starts a part must outlive it: the kernel's death signals follow the thread
        while not self._over.is_set():
            for service in self.services.values():
                service.tend()
            time.sleep(0.05)

    def _start_redis_first(self) -> None:
        """For its address: port and password are chosen at the first start and stay."""
        part = self._start_redis()
        assert part is not None
        url = self._redis.url()
        assert url is not None
        self.settings = replace(self.settings, redis_url=url)
        part.kill()

    def _start_redis(self) -> Part | None:
        if self._without == "append-only":
            self._forget_redis()
        return self._redis.start_unless_running()

    def _forget_redis(self) -> None:
        for path in (self.settings.home / "redis").glob("appendonlydir/*"):
            path.unlink()

    def _start_api(self) -> Part:
        listener = listen("127.0.0.1", self._port, self.settings)
        with listener:  # bound anew each time: while no API lives, connections are refused
            command = [sys.executable, "-m", "trainmaster.serve", str(listener.fileno())]
            return self._part("api", command, {}, [listener.fileno()])

    def _start_agent(self, node: str) -> Part:
        return self._part(f"agent{node}", [sys.executable, "-m", "worker.agent"], {"TRAINMASTER_NODE": node})

    def _part(self, name: str, command: list[str], extra: dict[str, str], pass_fds: list[int] | None = None) -> Part:
        chaos = {
            "PYTHONPATH": str(POINTS),
            "TRAINMASTER_CHAOS": str(self.path),
            "TRAINMASTER_CHAOS_WITHOUT": self._without,
        }
        environment = self.settings.to_environment() | chaos | extra
        log = self.settings.home / "logs" / f"{name}.log"
        return Part(name, command, log=log, environment=environment, pass_fds=pass_fds or ())

    # ---- its users

    def answers(self, path: str) -> bool:
        try:
            return bool(self.http.get(path).is_success)
        except httpx2.HTTPError:
            return False

    def submit(self, spec: dict[str, Any], key: str | None = None) -> str:
        """POST until acknowledged, as our clients do → the job's id."""
        headers = {"Idempotency-Key": key or os.urandom(8).hex()}
        deadline = time.monotonic() + 60
        while True:
            try:
                answer = self.http.post("/jobs", json=spec, headers=headers)
                if answer.is_success:
                    return str(answer.json()["id"])
                assert answer.status_code in (502, 503, 504), answer.text
            except httpx2.HTTPError:
                pass
            assert time.monotonic() < deadline, "the API took no job for a minute"
            time.sleep(0.1)

    # ---- its disk

    def _mount(self, folder: Path) -> bool:
        folder.mkdir()
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "chaos", str(folder)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if made.returncode != 0:
            print(f"no full disks: mounting a file system is not allowed here ({made.stderr.strip()})")
        return made.returncode == 0

    def fill_disk(self) -> None:
        """Leave no byte free, until `free_disk`."""
        with (self.settings.runs / ".ballast").open("wb", buffering=0) as ballast:
            try:
                while ballast.write(bytes(2**16)):
                    pass
            except OSError:
                return

    def free_disk(self) -> None:
        (self.settings.runs / ".ballast").unlink(missing_ok=True)
