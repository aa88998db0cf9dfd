"""The API server's process: `python -m trainmaster.serve FD`, on a socket that its parent bound."""

import ipaddress
import socket
import sys

from trainmaster.mistake import Mistake


def listen(host: str, port: int, redis_url: str) -> socket.socket:
    """A listening socket; port 0 is any free one.

    Raises Mistake: it cannot listen there, or others could reach it and this Redis holds no key that says who may.
    """
    from worker.keyring import KeyRing

    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        why = str(error.strerror).partition(" (while")[0]  # Python names the address once more
        way_out = "choose another with --port, and set TRAINMASTER_URL to it"
        raise Mistake(f"cannot listen on {host}:{port}: {why}; {way_out}") from error
    if not _is_loopback(listener) and KeyRing(redis_url).is_empty():
        listener.close()
        raise Mistake(
            f"{host} is reachable from other machines and there is no API key: anyone could use this server; "
            "make one first (trainmaster keys create NAME --scope admin), or listen on 127.0.0.1"
        )
    return listener


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def serve(listener: socket.socket) -> None:
    """Serve until SIGTERM."""
    # imported here: a parent that only binds the socket needs none of it
    from api.app import Server
    from api.monitoring import log_json_lines
    from worker.settings import Settings

    log_json_lines()
    Server(Settings.from_environment(), open_without_keys=_is_loopback(listener)).run(sockets=[listener])


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
