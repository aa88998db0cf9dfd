"""How long a client may take, and how many connections there may be: uvicorn has no limit of its own for either.

A client that sends nothing, a byte now and then, or reads nothing would hold a connection, and so an open file of
this process, for as long as it likes.
"""

import asyncio
import resource
from typing import Any

import h11
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from api.problems import Refusal

HEAD_SECONDS, BODY_SECONDS = 10.0, 30.0  # for a request's head, and for its body of at most 1 MiB
READ_SECONDS = 60.0  # for the client to read what it was sent, before more is written
MOST_OPEN_FILES = 65_536  # more than is ever needed, where the system sets no limit
RESERVED_FILES = 256  # of the limit: for Redis, for files that are sent, and for connections not yet refused
BACKLOG = 128  # connections accepted at once; fewer than RESERVED_FILES


def raise_file_limit() -> None:
    """Allow this process as many open files as its user may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def most_connections() -> int:
    """Return how many connections the limit of open files leaves room for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST_OPEN_FILES
    return max(soft - RESERVED_FILES, soft // 2)


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP protocol with a deadline for whatever it waits for from the client.

    Sending a little does not extend a deadline. At the limit of connections the one that has waited longest for a
    request is closed in favour of the new one; if all are at work the new one is refused with 503.
    """

    _deadline: asyncio.TimerHandle | None = None
    _phase: Any = None  # h11's state of the client that the deadline is for
    _read_deadline: asyncio.TimerHandle | None = None
    _opened_at = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        is_full = len(self.connections) >= most_connections()
        super().connection_made(transport)
        self._opened_at = self.loop.time()
        if is_full:
            others = [one for one in self.connections if isinstance(one, PatientProtocol) and one is not self]
            waiting = [one for one in others if one._phase is h11.IDLE and not one.transport.is_closing()]
            if not waiting:
                detail = f"this server has {len(others)} connections, as many as it can serve; try again in a moment"
                return self._close_with(Refusal(503, "too_many_connections", detail, headers={"Retry-After": "1"}))
            min(waiting, key=lambda one: one._opened_at)._cut()
        return self._expect(h11.IDLE)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        state = self.conn.their_state
        # between two requests uvicorn's own keep-alive timeout runs, until some of the next one has come
        has_begun = state is h11.SEND_BODY or (state is h11.IDLE and self.conn.trailing_data[0])
        self._expect(state if has_begun else None)

    def _expect(self, phase: Any) -> None:
        if phase is self._phase:
            return
        self._phase = phase
        if self._deadline is not None:
            self._deadline.cancel()
        seconds = HEAD_SECONDS if phase is h11.IDLE else BODY_SECONDS
        self._deadline = None if phase is None else self.loop.call_later(seconds, self._cut)

    def _cut(self) -> None:
        what = "head" if self._phase is h11.IDLE else "body"
        detail = f"the request's {what} did not arrive in time; send it at once"
        self._close_with(Refusal(408, "request_timeout", detail))

    def _close_with(self, refusal: Refusal) -> None:
        self._expect(None)
        if self.transport.is_closing():
            return
        has_begun = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not has_begun:
            self.transport.write(_raw(refusal.response()))
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_deadline = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        super().connection_lost(exc)
        self._forget_reading()

    def _forget_reading(self) -> None:
        if self._read_deadline is not None:
            self._read_deadline.cancel()
            self._read_deadline = None


def _raw(response: Response) -> bytes:
    """Return a whole answer as it goes over the connection, which it closes."""
    reason = {408: b"Request Timeout", 503: b"Service Unavailable"}[response.status_code]
    head = [b"HTTP/1.1 %d %s" % (response.status_code, reason), b"connection: close"]
    head += [b"%s: %s" % header for header in response.raw_headers]
    return b"\r\n".join([*head, b"", bytes(response.body)])
