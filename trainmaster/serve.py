"""The API server's process: `python -m trainmaster.serve FD`, on a socket that its parent bound."""

from __future__ import annotations

import socket
import sys

# open event streams never end by themselves; readers reconnect to the next server
GRACE_SECONDS = 2


class AddressTaken(Exception):
    """The API cannot listen there."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises AddressTaken."""
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise AddressTaken(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port") from error


def serve(listener: socket.socket) -> None:
    """Serve until SIGTERM."""
    # imported here: a parent that only binds the socket needs none of it
    import uvicorn

    from api.app import create_app
    from worker.settings import Settings

    config = uvicorn.Config(
        create_app(Settings.from_environment()),
        access_log=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
