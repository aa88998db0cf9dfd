"""The local stack: Redis, the API and a worker as child processes, all gone when this one ends."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Self

import httpx2
import psutil

from gptcore.locks import is_held
from gptcore.procs import adopt_orphans, python_module
from trainmaster.part import Part, PartFailed
from trainmaster.redis_server import RedisServer, answers
from trainmaster.serve import listen
from worker.place import agent_lock
from worker.processes import holder_of, kill
from worker.settings import Settings

START_SECONDS = 60.0
POLL_SECONDS = 0.1
RESTART_SECONDS = 5.0  # a worker or an API that ends sooner would end again
STOP_MARGIN_SECONDS = 15.0  # over the grace that a running job has to write a checkpoint


class Stack:
    """Context manager: everything answers when it is entered, nothing is left when it is left.

    `own_redis`: the home's own server instead of the one in the settings. `logs`: parts write to
    HOME/logs/*.log, which `check` keeps short, else to our own output. Raises Mistake where a part does not begin.
    """

    def __init__(
        self, settings: Settings, *, own_redis: bool = True, host: str = "127.0.0.1", port: int = 0, api: bool = True,
        worker: bool = True, logs: bool = True,
    ):  # fmt: skip
        self._settings = settings
        self._own_redis = RedisServer(settings.home) if own_redis else None
        self._address = (host, port)
        self._wanted_api, self._wanted_worker = api, worker
        self._logs = logs
        self._parts: list[Part] = []
        self._listener: socket.socket | None = None
        self.url = ""

    def __enter__(self) -> Self:
        adopt_orphans()  # what a killed worker leaves behind becomes our child: see close
        self._settings.make_home()
        (self._settings.home / "logs").mkdir(mode=0o700, exist_ok=True)
        try:
            self._wait_for_redis()
            self._take_api()
            self._take_worker()
            if self._wanted_api:
                self._wait_until(self._api_answers, "the API")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def redis_url(self) -> str:
        return self._settings.redis_url

    def check(self) -> None:
        """Raises PartFailed when a part has ended. Takes over what another stack of this home let go.

        A worker's agent or an API that ended after it was up is started again: jobs go on meanwhile, and callers wait.
        """
        self._reap_orphans()
        for part in list(self._parts):
            part.rotate_log()
            if part.name != "redis" and part.ended() and time.monotonic() - part.started_at > RESTART_SECONDS:
                self._parts.remove(part)
        self._check_parts()
        self._take_redis()
        self._take_api()
        self._take_worker()

    def wait(self) -> None:
        """Stay until Redis ends, or a part again and again (PartFailed), or a signal comes (KeyboardInterrupt)."""
        while True:
            self.check()
            time.sleep(1)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within, a part that ends raises PartFailed wherever the main thread waits."""
        before = signal.signal(signal.SIGALRM, lambda _signum, _frame: self.check())
        signal.setitimer(signal.ITIMER_REAL, 1, 1)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def close(self) -> None:
        """Stop the worker, the API, then Redis. A second Ctrl-C kills what is left at once."""
        try:
            for part in reversed(self._parts):
                part.stop()
        finally:
            left = psutil.Process().children(recursive=True)
            kill(*left)
            psutil.wait_procs(left, timeout=5)
            self._parts.clear()
            if self._listener:
                self._listener.close()

    def _start(self, name: str, command: list[str], **options: Any) -> Part:
        log = self._settings.home / "logs" / f"{name}.log" if self._logs else None
        part = Part(name, command, log=log, environment=self._settings.to_environment(), **options)
        self._parts.append(part)
        return part

    def _take_redis(self) -> None:
        """Start the home's Redis unless we or another stack of this home run it."""
        if self._own_redis is None or self._runs("redis"):
            return
        if (part := self._own_redis.start_unless_running()) is not None:
            self._parts.insert(0, part)  # stopped last

    def _redis_answers(self) -> bool:
        self._take_redis()
        url = self._settings.redis_url if self._own_redis is None else self._own_redis.url()
        if url is None:
            return False  # the other stack that starts one has not written its configuration yet
        if not answers(url, given=self._own_redis is None):
            return False
        self._settings = replace(self._settings, redis_url=url)
        return True

    def _wait_for_redis(self) -> None:
        try:
            self._wait_until(self._redis_answers, "Redis")
        except PartFailed as error:
            if self._own_redis is not None and (advice := self._own_redis.advice()):
                raise PartFailed(f"{error}\n{advice}") from error
            raise

    def _take_api(self) -> None:
        """Start the API unless we run it."""
        if not self._wanted_api or self._runs("api"):
            return
        host, port = self._address
        if self._listener is None:
            # bound here and served there: no port is lost between, nor while one that was killed is replaced
            self._listener = listen(host, port, self._settings)
            name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # by which this machine reaches it
            self.url = f"http://{f'[{name}]' if ':' in name else name}:{self._listener.getsockname()[1]}"
        served = self._listener.fileno()
        self._start("api", python_module("trainmaster.serve", str(served)), pass_fds=[served])

    def _take_worker(self) -> None:
        """Start the home's worker unless we run it, or another stack or `trainmaster worker` does."""
        if not self._wanted_worker or self._runs("worker") or is_held(agent_lock(self._settings)):
            return
        command, patience = python_module("worker.agent"), self._settings.grace_seconds + STOP_MARGIN_SECONDS
        # on its death signal its jobs write checkpoints
        self._start("worker", command, death_signal=signal.SIGTERM, stop_seconds=patience)

    def _runs(self, name: str) -> bool:
        return any(part.name == name for part in self._parts)

    def _check_parts(self) -> None:
        """Raise PartFailed where one has ended, but for a worker that another of this home was sooner than."""
        for part in list(self._parts):
            if part.name == "worker" and part.ended() and is_held(agent_lock(self._settings)):
                self._parts.remove(part)
            else:
                part.check()

    def _wait_until(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            self._check_parts()
            if time.monotonic() > deadline:
                tails = "".join(part.log_tail() for part in self._parts)
                if self._wanted_worker and not self._runs("worker"):
                    lock = agent_lock(self._settings)
                    tails += f"\nanother worker{holder_of(lock)} holds {lock}"
                raise PartFailed(f"{what} was not ready within {START_SECONDS:.0f} s{tails}")
            time.sleep(POLL_SECONDS)

    def _api_answers(self) -> bool:
        """Also waits for a live worker where we want one: that is what /readyz says. Another stack's may be ending."""
        self._take_redis()
        self._take_worker()
        path = "/readyz" if self._wanted_worker else "/healthz"
        try:
            # to that name it answers wherever it listens
            return httpx2.get(self.url + path, headers={"Host": "localhost"}, timeout=5, trust_env=False).is_success
        except httpx2.TransportError:
            return False

    def _reap_orphans(self) -> None:
        """Bury adopted children that have ended; our own parts are left to their Part."""
        if sys.platform != "linux":
            return
        ours = {part.pid for part in self._parts}
        with suppress(ChildProcessError):  # no child left
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if ended.si_pid in ours:
                    return
                os.waitpid(ended.si_pid, 0)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP raise KeyboardInterrupt like Ctrl-C does; a SIGHUP that nohup ignores stays so."""

    def interrupt(_signum: int, _frame: object) -> None:
        raise KeyboardInterrupt

    # SIGINT even where ignored: a shell starts background commands so
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    before = {s: signal.signal(s, interrupt) for s in signals}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
