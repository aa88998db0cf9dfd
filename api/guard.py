"""What every request must pass before a route sees it: Host, Origin, type and size of the body.

The server asks for no key, so a web page that someone opens must not be able to reach it: neither
by a request across sites (Origin) nor under a name of its own that it points here (Host).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import Refusal

MAX_BODY_BYTES = 1 << 20


class Guard:
    """`hosts` are the names that this server answers to, beside loopback addresses."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str]):
        self._app = app
        self._hosts = frozenset({"localhost", *hosts})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp = self._app
        if scope["type"] == "http":
            send = _with_headers(send)
            try:
                self._check(Headers(scope=scope))
            except Refusal as refusal:
                answer = refusal.response()
        await answer(scope, receive, send)

    def _check(self, headers: Headers) -> None:
        """Raises Refusal."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_ours(host):
            way_out = "use 127.0.0.1 or localhost, or set TRAINMASTER_URL for the server"
            raise Refusal(403, "foreign_host", f"this server does not answer to the Host {host!r}; {way_out}")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
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

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""  # lower case, without port and brackets
            return name in self._hosts or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["X-Content-Type-Options"] = "nosniff"
            headers["X-Frame-Options"] = "DENY"
        await send(message)

    return send_with_headers
