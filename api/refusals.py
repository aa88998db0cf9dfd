"""Refused requests in the audit: counted together, so that nobody can flood it."""

import asyncio
from collections import Counter
from contextlib import suppress

from anyio import CapacityLimiter, to_thread

from worker.connection import AWAY
from worker.keyring import KeyRing

SECONDS = 10.0  # in which equal refusals become one entry
MOST_ENTRIES = 20  # of that time; all others become one more


class Refusals:
    """Counts requests that were answered with 401 or 403. Lives in the server's event loop."""

    def __init__(self, keys: KeyRing, limiter: CapacityLimiter):
        self._keys = keys
        self._limiter = limiter
        self._counts: Counter[tuple[str, str]] = Counter()  # by who asked and how it was refused
        self._newest: dict[tuple[str, str], str] = {}  # what was asked last
        self._writer: asyncio.Task[None] | None = None

    def note(self, who: str, outcome: str, what: str) -> None:
        """Count a refusal; the audit has it within SECONDS."""
        like = (who, outcome)
        if like not in self._counts and len(self._counts) >= MOST_ENTRIES:
            like = ("others", outcome[:3])
        self._counts[like] += 1
        self._newest[like] = what
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_later())

    async def _write_later(self) -> None:
        await asyncio.sleep(SECONDS)
        counts, newest = self._counts, self._newest
        self._counts, self._newest = Counter(), {}
        await to_thread.run_sync(self._write, counts, newest, limiter=self._limiter)

    def _write(self, counts: Counter[tuple[str, str]], newest: dict[tuple[str, str], str]) -> None:
        with suppress(*AWAY):
            for (who, outcome), count in counts.items():
                self._keys.record("refusals", who, newest[who, outcome], outcome, count=count)
