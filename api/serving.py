"""The server around the application."""

from __future__ import annotations

import socket

import uvicorn

from api.app import create_app
from worker.settings import Settings

GRACE_SECONDS = 5  # for requests under way; streams are ended at once


class Server(uvicorn.Server):
    def __init__(self, settings: Settings, *, open_without_keys: bool = True):
        self._app = create_app(settings, open_without_keys=open_without_keys)
        super().__init__(
            uvicorn.Config(
                self._app, lifespan="on", log_config=None, access_log=False, timeout_graceful_shutdown=GRACE_SECONDS
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.services.hub.close()  # uvicorn would wait for streams, then cancel them
        await super().shutdown(sockets)
