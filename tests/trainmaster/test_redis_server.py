"""One Redis for a home, whoever starts it, as long as somebody needs it."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import redis

from tests.conftest import wait_until
from tests.trainmaster.conftest import processes_of, run
from trainmaster.redis_server import RedisServer

# a stack of Redis alone, in a process that can be killed
STACK = """
from trainmaster.stack import Stack, interruptible
from worker.settings import Settings
try:
    with interruptible(), Stack(Settings.from_environment(), api=False, worker=False) as stack:
        print("up", flush=True)
        stack.wait()
except KeyboardInterrupt:
    pass
"""


def start_stack() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", STACK], stdout=subprocess.PIPE, text=True)


def wait_up(*stacks: subprocess.Popen[str]) -> None:
    for stack in stacks:
        assert stack.stdout is not None and stack.stdout.readline() == "up\n"


def end(stack: subprocess.Popen[str]) -> None:
    stack.terminate()
    stack.communicate(timeout=20)
    assert stack.returncode == 0


def connect(home: Path) -> redis.Redis:
    url = RedisServer(home).url()
    assert url is not None
    return redis.Redis.from_url(url, retry=None, decode_responses=True)


def servers(home: Path) -> list[psutil.Process]:
    return [p for p in processes_of(home) if p.name() in ("valkey-server", "redis-server")]


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def test_five_that_start_at_once_share_one_server(home: Path) -> None:
    stacks = [start_stack() for _ in range(5)]
    wait_up(*stacks)
    assert len(servers(home)) == 1
    for stack in stacks:
        end(stack)
    assert not processes_of(home)


def test_the_server_asks_for_a_password_that_only_its_owner_can_read(home: Path) -> None:
    stack = start_stack()
    wait_up(stack)
    with connect(home) as client:
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        port = client.connection_pool.connection_kwargs["port"]
    with redis.Redis(port=port, retry=None) as stranger:
        with pytest.raises(redis.AuthenticationError):
            stranger.ping()
    assert stat.S_IMODE((home / "redis" / "redis.conf").stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "redis").stat().st_mode) == 0o700
    end(stack)


def test_when_the_owner_is_killed_another_takes_over_with_all_that_was_acknowledged(home: Path) -> None:
    owner = start_stack()
    wait_up(owner)
    other = start_stack()
    wait_up(other)
    with connect(home) as client:
        client.set("kept", "yes")
        (first,) = servers(home)
        owner.kill()
        owner.communicate()
        # same address and password: a client that was connected finds the new server
        wait_until(lambda: first.pid not in [p.pid for p in servers(home)] and answers(client), 10)
        assert client.get("kept") == "yes"
    end(other)


def test_a_damaged_end_of_the_append_only_file_is_cut_off_and_another_damage_is_explained(home: Path) -> None:
    stack = start_stack()
    wait_up(stack)
    with connect(home) as client:
        client.set("kept", "yes")
    end(stack)
    (file,) = (home / "redis" / "appendonlydir").glob("*.incr.aof")
    with file.open("ab") as damaged:  # as a power loss leaves it: a part of a command, and blocks never written
        damaged.write(b"*3\r\n$3\r\nSET\r\n$4\r\nlo" + bytes(8192))
    size = file.stat().st_size
    stack = start_stack()
    wait_up(stack)
    with connect(home) as client:
        assert client.get("kept") == "yes"
    end(stack)
    assert (home / "redis" / f"{file.name}.damaged").stat().st_size == size

    whole = file.stat().st_size
    with file.open("ab") as damaged:  # a hole with commands behind it is for a person to judge
        damaged.write(bytes(4096) + b"*2\r\n$3\r\nGET\r\n$4\r\nkept\r\n")
    done = run("keys", "list")
    assert done.returncode == 1
    assert f"{file} is damaged from byte {whole:,} of " in done.stderr and f"truncate -s {whole} {file}" in done.stderr


def test_a_killed_stack_leaves_no_server(home: Path) -> None:
    stack = start_stack()
    wait_up(stack)
    stack.kill()
    stack.communicate()
    wait_until(lambda: not processes_of(home), 5)
