"""The ASGI application, what stands around the routes, and the server around it."""

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from importlib.metadata import version
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.gzip import DEFAULT_EXCLUDED_CONTENT_TYPES, GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from api import compare, files, problems
from api.connections import BACKLOG, PatientProtocol
from api.guard import MAX_BODY_BYTES, Guard, needed_scope
from api.hub import Hub
from api.monitoring import Monitor, Observed
from api.routes import STATIC, Services, router
from api.series import RunCache
from api.shared_answers import COMPRESSION
from worker.archive import Archive
from worker.connection import AWAY
from worker.keyring import KeyRing
from worker.retention import SWEEP_SECONDS, sweep
from worker.schema import Schema, SchemaTooNew
from worker.settings import Settings
from worker.store import Store

UNCOMPRESSED = (*DEFAULT_EXCLUDED_CONTENT_TYPES, "application/octet-stream")
GRACE_SECONDS = 5  # for requests under way; streams are ended at once

log = logging.getLogger(__name__)


class Application(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """As FastAPI makes it, with the key that an operation needs, and the media type that errors really have."""
        schema = super().openapi()
        scheme = {"type": "http", "scheme": "bearer", "description": "trainmaster keys create makes a key"}
        schema["components"]["securitySchemes"] = {"key": scheme}
        for path, operations in schema["paths"].items():
            for method, operation in operations.items():
                if scope := needed_scope(method.upper(), path):
                    operation["security"] = [{"key": [scope]}]
                for status, response in operation["responses"].items():
                    if not status.startswith("2"):
                        (response["content"],) = [{problems.MEDIA_TYPE: body} for body in response["content"].values()]
        return schema


def create_app(settings: Settings, *, open_without_keys: bool = True) -> FastAPI:
    """An application over the Redis and the run directories that `settings` name.

    `open_without_keys`: whether it may serve anyone while there never was a key, as on loopback. It never does so
    under a public name: a reverse proxy reaches loopback too.
    """
    store = Store(settings.redis_url, archive=Archive(settings.runs))
    keys = KeyRing(settings.redis_url, settings.home)
    monitor = Monitor(store)
    hub = Hub(store, settings.runs, monitor.stream_lag_seconds.observe)
    hosts = settings.public_hosts
    is_open = open_without_keys and not hosts

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        keeping = asyncio.create_task(_keep_redis(store, settings))
        yield
        keeping.cancel()
        store.close()
        keys.close()

    app = Application(
        title="Trainmaster", version=version("trainmaster"), summary="Pretrains GPTs on machines you own.",
        lifespan=lifespan, exception_handlers=problems.HANDLERS, docs_url=None, redoc_url=None,
        middleware=[
            Middleware(Observed, monitor=monitor),
            Middleware(Guard, hosts=hosts, origin=settings.public_origin, keys=keys, open_without_keys=is_open),
            # event streams and parts of files are passed on as they are; so are files of a run, which are large
            Middleware(GZipMiddleware, compresslevel=COMPRESSION, exclude_content_types=UNCOMPRESSED),
        ],
    )  # fmt: skip
    app.state.services = Services(settings, store, keys, hub, monitor, RunCache(settings.runs))
    app.include_router(files.router)
    app.include_router(compare.router)
    app.include_router(router, max_body_size=MAX_BODY_BYTES)  # of bodies that do not say their length
    app.add_route("/docs", _docs, include_in_schema=False)
    app.mount("/static", PageFiles(directory=STATIC))
    return app


async def _keep_redis(store: Store, settings: Settings) -> None:
    """Bring what is in Redis up to date, then archive jobs that ended long ago for as long as the server runs."""
    is_ready = await _prepare_redis(settings.redis_url)
    while is_ready and settings.retention_days:
        try:
            await run_in_threadpool(sweep, store, settings)
        except AWAY:
            pass  # whoever asks for anything else hears of it
        except OSError as error:
            log.warning("ended jobs stay in Redis until their run directories can be written: %s", error)
        await asyncio.sleep(SWEEP_SECONDS)


async def _prepare_redis(url: str) -> bool:
    """Bring what is in Redis up to date as soon as it answers. End the server, and return False, if it is newer."""
    with closing(Schema(url)) as schema:
        while True:
            try:
                await run_in_threadpool(schema.bring_up_to_date)
                return True
            except AWAY:
                await asyncio.sleep(1)
            except SchemaTooNew as error:
                log.error("%s", error)
                signal.raise_signal(signal.SIGTERM)
                return False


class PageFiles(StaticFiles):
    """The page's small files, always whole: Starlette answers a malformed Range in plain text."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [header for header in scope["headers"] if header[0] != b"range"]
        await super().__call__({**scope, "headers": headers}, receive, send)


async def _docs(_: Request) -> Response:
    """Return FastAPI's page about the API. It names the schema relative to itself: a proxy may add a path prefix."""
    return get_swagger_ui_html(openapi_url="openapi.json", title="Trainmaster")


class Server(uvicorn.Server):
    def __init__(self, settings: Settings, *, open_without_keys: bool = True):
        self._app = create_app(settings, open_without_keys=open_without_keys)
        super().__init__(
            uvicorn.Config(
                self._app,
                lifespan="on",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=GRACE_SECONDS,
                http=PatientProtocol,
                backlog=BACKLOG,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.services.hub.close()  # uvicorn would wait for streams, then cancel them
        await super().shutdown(sockets)
