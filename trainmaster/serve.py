"""The API server's process: `python -m trainmaster.serve FD`, on a socket that its parent bound."""

import ctypes
import socket
import sys
from contextlib import closing, suppress

from trainmaster.mistake import Mistake
from worker.settings import Settings, is_loopback

# how long a thread that computes may keep the interpreter while others wait for it: at Python's 5 ms, a short request,
# which waits for it about ten times, takes 0.1 s beside two threads that parse a long run
SWITCH_SECONDS = 0.0005
MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD in malloc.h


def listen(host: str, port: int, settings: Settings) -> socket.socket:
    """Return a listening socket; port 0 is any free one.

    Raises Mistake: it cannot listen there, or others could reach it and this Redis holds no key that says who may.
    """
    from worker.keyring import KeyRing

    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        why = str(error.strerror).partition(" (while")[0]  # Python names the address once more
        way_out = "choose another with --port, and set TRAINMASTER_URL to it"
        raise Mistake(f"cannot listen on {host}:{port}: {why}; {way_out}") from error
    names = ", ".join(sorted(settings.public_hosts))
    if names or not _is_local(listener):
        with closing(KeyRing(settings.redis_url, settings.home)) as keys:
            has_none = keys.is_empty()
        if has_none:
            listener.close()
            way_out = "unset TRAINMASTER_URL and TRAINMASTER_HOSTS" if names else "listen on 127.0.0.1"
            raise Mistake(
                f"{names or host} is reachable from other machines and there is no API key: anyone could use this "
                f"server; make one first (trainmaster keys create NAME --scope admin), or {way_out}"
            )
    return listener


def _is_local(listener: socket.socket) -> bool:
    return is_loopback(listener.getsockname()[0])


def _return_large_blocks() -> None:
    """Have glibc return freed blocks of 1 MiB or more to the system: it would keep most of a long run's curves."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 20)


def serve(listener: socket.socket) -> None:
    """Serve until SIGTERM."""
    # imported here: a parent that only binds the socket needs none of it
    from api.app import Server
    from api.connections import raise_file_limit
    from api.monitoring import log_json_lines

    log_json_lines()
    raise_file_limit()
    _return_large_blocks()
    sys.setswitchinterval(SWITCH_SECONDS)
    Server(Settings.from_environment(), open_without_keys=_is_local(listener)).run(sockets=[listener])


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
