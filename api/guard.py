"""What every request must pass before a route sees it: Host, Origin, size and type of the body, and a key.

A web page that someone opens must not be able to reach the server, with keys or without: neither by a
request across sites (Origin) nor under a name of its own that it points here (Host).
"""

import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import Refusal, refusal_of
from api.refusals import Refusals
from worker import keyring
from worker.connection import AWAY
from worker.keyring import MARKER, AuditKind, Key, KeyRing
from worker.settings import host_of, is_loopback
from worker.store import LOCAL

MAX_BODY_BYTES = 1 << 20
KEY_THREADS = 8  # that look keys up at once, and write the audit
RECHECK_SECONDS = 10.0  # of a stream's key; a quiet stream sends a comment about as often
_JOB = re.compile(r"/jobs/(job-\w+)")
Result = TypeVar("Result")
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


def _check_scope(key: Key | None, needed: keyring.Scope | None) -> None:
    """Raises Refusal."""
    if key and needed and not key.may(needed):
        detail = f"this needs a key of scope {needed}; key {key.id} has {key.scope}"
        raise Refusal(403, "scope_too_small", detail)


async def _always() -> bool:
    return True


class _Answer:
    """What is sent in answer to a request: with our headers, and a stream no longer than its key is valid."""

    def __init__(self, send: Send):
        self.status = 0
        self.location = ""
        self.may_go_on: Callable[[], Awaitable[bool]] = _always
        self._send = send
        self._is_stream = self._is_over = False
        self._checked_at = time.monotonic()

    async def send(self, message: Message) -> None:
        if self._is_over:
            return
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(HEADERS)
            headers.setdefault("Cache-Control", "no-cache")  # else a page may run the scripts of an older version
            self.status, self.location = message["status"], headers.get("location", "")
            self._is_stream = headers.get("content-type", "").startswith("text/event-stream")
        elif self._is_stream and time.monotonic() - self._checked_at >= RECHECK_SECONDS:
            self._checked_at = time.monotonic()
            if not await self.may_go_on():
                # the server then reports a disconnect, which ends whoever writes the stream
                self._is_over = True
                message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)


class Guard:
    """`hosts` are the names that this server answers to, beside loopback addresses.

    `origin` is that of TRAINMASTER_URL. It is accepted even if a reverse proxy put another name into Host.

    `open_without_keys`: while there is no key and never was one, everyone who reaches the server may do everything.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str], origin: str, keys: KeyRing, open_without_keys: bool):
        self._app = app
        self._hosts = frozenset(hosts)
        self._origin = origin
        self._keys = keys
        self._open_without_keys = open_without_keys
        self._limiter = CapacityLimiter(KEY_THREADS)
        self._refusals = Refusals(keys, self._limiter)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        method, path, headers = scope["method"], scope["path"], Headers(scope=scope)
        needed, what = needed_scope(method, path), f"{method} {path[:200]}"
        who = (scope.get("client") or ("unknown",))[0]
        answer = _Answer(send)
        try:
            self._check(path, headers)
            key = await self._in_thread(self._find, headers) if needed else None
            who = f"key {key.id}" if key else "anyone"
            _check_scope(key, needed)
        except (Refusal, *AWAY) as error:
            refusal = refusal_of(Request(scope), error)
            if refusal.details.status in (401, 403):
                self._refusals.note(who, f"{refusal.details.status} {refusal.details.code}", what)
            return await refusal.response()(scope, receive, answer.send)
        scope.setdefault("state", {}).update(who=who, owner=key.name if key else LOCAL)
        if needed is not None:
            answer.may_go_on = lambda: self._still_may(headers, needed)
        try:
            await self._app(scope, receive, answer.send)
        except Exception as error:
            if answer.status:
                raise
            # Starlette would answer outside of all that stands around the routes, and uvicorn end the connection
            logging.getLogger(__name__).exception("a fault of the server")
            await refusal_of(Request(scope), error).response()(scope, receive, answer.send)
        finally:
            # what is open to everyone changes nothing, and would push out what did
            if needed is not None and method not in ("GET", "HEAD"):
                kind: AuditKind = "administration" if needed == "admin" else "requests"
                job = _JOB.match(path) or _JOB.match(answer.location)
                entry = (kind, who, what, str(answer.status or 500), job[1] if job else None)
                with suppress(*AWAY):
                    await self._in_thread(self._keys.record, *entry)
        return None

    async def _in_thread(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run what asks Redis in a thread of the guard's own: slow routes may hold all those of the framework."""
        return await to_thread.run_sync(function, *args, limiter=self._limiter)

    async def _still_may(self, headers: Headers, needed: keyring.Scope) -> bool:
        """Return whether the key that opened a stream is still valid; also while Redis is away."""
        try:
            _check_scope(await self._in_thread(self._find, headers), needed)
        except Refusal:
            return False
        except AWAY:
            return True
        return True

    def _check(self, path: str, headers: Headers) -> None:
        """Raises Refusal."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if path not in HEALTH and not self._is_ours(host):
            way_out = "use 127.0.0.1 or localhost, or add it to TRAINMASTER_HOSTS of the server"
            raise Refusal(403, "foreign_host", f"this server does not answer to the Host {host!r}; {way_out}")
        if origin is not None and not self._is_own_origin(origin.lower(), host.lower()):
            way_out = "if that is this server behind a proxy, set TRAINMASTER_URL to its address, or pass Host on"
            raise Refusal(403, "foreign_origin", f"a page of {origin!r} may not call this server; {way_out}")
        length = headers.get("content-length", "0")
        if int(length) > MAX_BODY_BYTES:
            detail = f"the body has {length} bytes, the limit is {MAX_BODY_BYTES}; a job spec is a few thousand"
            raise Refusal(413, "content_too_large", detail)
        has_body = length != "0" or "transfer-encoding" in headers
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if has_body and kind != "application/json":
            detail = f"the body's type is {kind!r}; send it with Content-Type: application/json"
            raise Refusal(415, "unsupported_media_type", detail)

    def _is_own_origin(self, origin: str, host: str) -> bool:
        # without an address of its own no origin is the server's: an empty one neither
        return origin.partition("://")[2] == host or (self._origin != "" and origin == self._origin)

    def _find(self, headers: Headers) -> Key | None:
        """Return the key that a request came with, None if it needs none. Raises Refusal."""
        scheme, _, text = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and (key := self._keys.find(text.strip())):
            return key
        forwarded = next((name for name in FORWARDED if name in headers), None)
        if self._open_without_keys and not forwarded and not self._keys.are_required():
            return None
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
