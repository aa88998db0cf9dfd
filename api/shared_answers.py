"""Answers that many clients ask for at the same time are made and compressed once for all of them."""

import asyncio
import gzip
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from weakref import WeakValueDictionary

from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool

COMPRESSION = 4  # of 9: half the time of the highest for some percent more bytes
LEAST_COMPRESSED = 500  # bytes; a shorter answer gains nothing
BYTES_KEPT = 32 << 20


@dataclass(frozen=True)
class _Body:
    """JSON, and the same compressed; empty if it is short."""

    plain: bytes
    compressed: bytes

    @classmethod
    def of(cls, plain: bytes) -> "_Body":
        return cls(plain, gzip.compress(plain, COMPRESSION) if len(plain) >= LEAST_COMPRESSED else b"")

    @property
    def size(self) -> int:
        return len(self.plain) + len(self.compressed)

    def response(self, request: Request) -> Response:
        headers = {"Vary": "Accept-Encoding"}
        if self.compressed and "gzip" in request.headers.get("accept-encoding", ""):
            headers["Content-Encoding"] = "gzip"
            return Response(self.compressed, media_type="application/json", headers=headers)
        return Response(self.plain, media_type="application/json", headers=headers)


class SharedAnswers:
    """The newest answers by what was asked, BYTES_KEPT at most. Used in the server's event loop only."""

    def __init__(self, budget: int = BYTES_KEPT):
        self._budget = budget
        self._kept: OrderedDict[Hashable, tuple[Hashable, _Body]] = OrderedDict()  # with version; last used at the end
        self.size = 0  # bytes
        self._locks: WeakValueDictionary[Hashable, asyncio.Lock] = WeakValueDictionary()

    async def answer(
        self,
        request: Request,
        question: Hashable,
        version: Callable[[], Awaitable[Hashable]],
        make: Callable[[], Awaitable[bytes]],
    ) -> Response:
        """Return the JSON that `make` returns, or returned to another client while `version` was the same.

        The version is read after the request came, so an answer is never older than its request. Clients that ask
        for the same at the same time wait for one of them to make it.
        """
        lock = self._locks.setdefault(question, asyncio.Lock())
        async with lock:
            now = await version()
            known, body = self._kept.get(question, (None, None))
            if body is None or known != now:
                body = await run_in_threadpool(_Body.of, await make())
                self._keep(question, now, body)
            self._kept.move_to_end(question)
        return body.response(request)

    def _keep(self, question: Hashable, version: Hashable, body: _Body) -> None:
        if question in self._kept:
            self.size -= self._kept[question][1].size
        self._kept[question] = version, body
        self.size += body.size
        while self.size > self._budget and len(self._kept) > 1:
            _, (_, oldest) = self._kept.popitem(last=False)
            self.size -= oldest.size
