"""What every request must pass before a route sees it: Host, Origin, size and type of the body, and a key.

A web page that someone opens must not be able to reach the server, with keys or without: neither by a
request across sites (Origin) nor under a name of its own that it points here (Host).
"""

import logging
from collections.abc import Iterable
from contextlib import suppress

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import Refusal, refusal_of
from worker import keyring
from worker.connection import AWAY
from worker.keyring import MARKER, KeyRing
from worker.settings import host_of, is_loopback

MAX_BODY_BYTES = 1 << 20
HEADERS = {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY"}
# a proxy adds them: whoever it lets in is not on this machine
FORWARDED = ("X-Forwarded-For", "X-Forwarded-Host", "Forwarded", "X-Real-IP")
HEALTH = ("/healthz", "/readyz")  # a probe or a load balancer asks for them by address
# the page asks for a key itself, and its parts, the schema and the two checks tell nothing of any run
FOR_EVERYONE = ("/", *HEALTH, "/docs", "/openapi.json")


def needed_scope(method: str, path: str) -> keyring.Scope | None:
    """By one rule for all, so that a route added later is closed before anyone thinks of it."""
    if path in FOR_EVERYONE or path.startswith("/static/"):
        return None
    if method in ("GET", "HEAD"):
        return "admin" if path == "/audit" else "read"
    return "submit" if method == "POST" else "admin"


class Guard:
    """`hosts` are the names that this server answers to, beside loopback addresses.

    `open_without_keys`: while there is no key and never was one, everyone who reaches the server may do everything.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str], keys: KeyRing, open_without_keys: bool):
        self._app = app
        self._hosts = frozenset(hosts)
        self._keys = keys
        self._open_without_keys = open_without_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(HEADERS)
                # else a page may run the scripts of an older version
                MutableHeaders(scope=message).setdefault("Cache-Control", "no-cache")
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check(scope["path"], headers)
            needed = needed_scope(scope["method"], scope["path"])
            who = await run_in_threadpool(self._holder, headers, needed) if needed else "anyone"
        except (Refusal, *AWAY) as error:
            return await refusal_of(Request(scope), error).response()(scope, receive, noting)
        scope.setdefault("state", {})["who"] = who
        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            if status:
                raise
            # Starlette would answer outside of all that stands around the routes, and uvicorn end the connection
            logging.getLogger(__name__).exception("a fault of the server")
            await refusal_of(Request(scope), error).response()(scope, receive, noting)
        finally:
            # what is open to everyone changes nothing, and would push out what did
            if needed is not None and scope["method"] not in ("GET", "HEAD"):
                with suppress(*AWAY):
                    what = f"{scope['method']} {scope['path'][:200]}"
                    await run_in_threadpool(self._keys.record, who, what, str(status or 500))
        return None

    def _check(self, path: str, headers: Headers) -> None:
        """Raises Refusal."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if path not in HEALTH and not self._is_ours(host):
            way_out = "use 127.0.0.1 or localhost, or add it to TRAINMASTER_HOSTS of the server"
            raise Refusal(403, "foreign_host", f"this server does not answer to the Host {host!r}; {way_out}")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise Refusal(403, "foreign_origin", f"a page of {origin!r} may not call this server")
        length = headers.get("content-length", "0")
        if int(length) > MAX_BODY_BYTES:
            detail = f"the body has {length} bytes, the limit is {MAX_BODY_BYTES}; a job spec is a few thousand"
            raise Refusal(413, "content_too_large", detail)
        has_body = length != "0" or "transfer-encoding" in headers
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if has_body and kind != "application/json":
            detail = f"the body's type is {kind!r}; send it with Content-Type: application/json"
            raise Refusal(415, "unsupported_media_type", detail)

    def _holder(self, headers: Headers, needed: keyring.Scope) -> str:
        """Whose request it is. Raises Refusal."""
        scheme, _, text = headers.get("authorization", "").partition(" ")
        key = self._keys.find(text.strip()) if scheme.lower() == "bearer" else None
        if key and key.may(needed):
            return f"key {key.id}"
        if key:
            detail = f"this needs a key of scope {needed}; key {key.id} has {key.scope}"
            raise Refusal(403, "scope_too_small", detail)
        forwarded = next((name for name in FORWARDED if name in headers), None)
        if self._open_without_keys and not forwarded and not self._keys.are_required():
            return "anyone"
        code, what = ("key_unknown", "this key is not, or no longer, known") if text else ("key_missing", "no key came")
        if forwarded:
            what += f", and {forwarded} says that a proxy passed this request on"
        detail = f"{what}; send one as Authorization: Bearer KEY (trainmaster keys create makes one)"
        if self._open_without_keys and self._keys.is_empty() and self._keys.are_required():
            detail += f"; this server had keys and has lost them: make one, or delete {MARKER} in TRAINMASTER_HOME"
        raise Refusal(401, code, detail, headers={"WWW-Authenticate": "Bearer"})

    def _is_ours(self, host: str) -> bool:
        name = host_of(host)
        return name in self._hosts or is_loopback(name)
