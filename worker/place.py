"""Where a node is: its name, its address for the other nodes of a job, and which runs root it shares."""

import hashlib
import os
import re
import secrets
import socket
from pathlib import Path
from urllib.parse import urlsplit

from worker.settings import Settings


def node_id(settings: Settings) -> str:
    """Stable over restarts, and another one for another home on the same machine; or as TRAINMASTER_NODE says."""
    host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname().split(".")[0])
    return settings.node or f"{host}-{hashlib.sha256(os.fsencode(settings.home)).hexdigest()[:4]}"


def node_address(settings: Settings) -> str:
    """TRAINMASTER_ADDRESS, or this machine's address as seen on the way to Redis."""
    if settings.address:
        return settings.address
    redis = urlsplit(settings.redis_url)
    if not redis.hostname:  # a Unix socket: all is on this machine
        return "127.0.0.1"
    family, _, _, _, target = socket.getaddrinfo(redis.hostname, redis.port or 6379, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing
        return str(probe.getsockname()[0])


def agent_lock(settings: Settings) -> Path:
    """Held by the agent of this node as long as it lives."""
    return settings.home / f"{node_id(settings)}.lock"


def slot_lock(settings: Settings, slot: str) -> Path:
    """Held by the slot's worker and its horse: it names the worker's process and the slot as it knows it."""
    return settings.home / "slots" / f"{slot}.lock"


def known_root(runs: Path) -> str:
    """Return the id that nodes gave this runs root; "" if no node has used it."""
    try:
        return (runs / ".root").read_text()
    except FileNotFoundError:
        return ""


def runs_root_id(settings: Settings) -> str:
    """What proves that two nodes share their runs: a word that the first to come left in the folder."""
    settings.runs.mkdir(parents=True, exist_ok=True)
    mark = settings.runs / ".root"
    beside = mark.with_name(f".root.{os.getpid()}.{secrets.token_hex(4)}")
    if not mark.exists():
        beside.write_text(secrets.token_hex(8))
        try:
            os.link(beside, mark)  # unlike a rename it never takes another's place
        except FileExistsError:
            pass
        finally:
            beside.unlink()
    return mark.read_text()
