"""One reader of Redis a job, however many watch it.

A watcher reads what was from Redis, then takes what comes from a queue that the job's one reader fills.
The queue is short: who is too slow for it loses it and reads from Redis again, and holds up nobody.
All of this runs in the server's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from api.history import read_history
from worker.connection import AWAY
from worker.follow import follow_events
from worker.record import place
from worker.store import JobNotFound, Store

QUEUE_EVENTS, PAGE_EVENTS = 1000, 1000
QUIET_SECONDS, STOP_SECONDS = 10.0, 0.1


@dataclass(frozen=True, slots=True)
class Message:
    """An event or a status change, and how it is sent: made once for all who watch."""

    id: str
    type: str
    made_at: datetime | None
    sent: bytes


News = Message | Literal["behind", "over"]  # events were dropped; the reader has ended
Queue = asyncio.Queue[News]


@dataclass(eq=False)
class _Feed:
    """A job's one reader, and the queues that it fills."""

    queues: set[Queue]
    reader: asyncio.Task[None] | None = None

    def put(self, item: Message | Literal["over"]) -> None:
        for queue in self.queues:
            if queue.full():
                while not queue.empty():
                    queue.get_nowait()
                queue.put_nowait("behind")
            queue.put_nowait(item)

    def stop(self) -> None:
        """Cancel the reader until it has heard: Python 3.11's `wait_for`, under redis-py, loses a cancellation that
        comes as a command has just been written."""
        assert self.reader is not None
        if self.reader.cancel():
            asyncio.get_running_loop().call_later(STOP_SECONDS, self.stop)


class Hub:
    """`note_lag` hears of each live event how many seconds ago it was made, by this machine's clock."""

    def __init__(self, store: Store, runs: Path, note_lag: Callable[[float], None] = lambda _: None):
        self.store = store
        self._runs = runs
        self._note_lag = note_lag
        self._feeds: dict[str, _Feed] = {}  # by job id
        self.closing = False

    def close(self) -> None:
        """End every stream, so that its client looks for the next server."""
        self.closing = True
        for feed in self._feeds.values():
            feed.stop()

    async def watch(self, job_id: str, after: str) -> AsyncGenerator[list[Message]]:
        """Events behind `after` as they come, several at a time; none after each quiet time.

        Ends when the job has ended, Redis went away or the server is closing. May raise `redis.ConnectionError`
        or `redis.TimeoutError`.
        """
        queue: Queue = asyncio.Queue(QUEUE_EVENTS)
        feed: _Feed | None = None
        ended = False
        try:
            while not self.closing:
                async for page in self._history(job_id, after):
                    after = page[-1].id
                    yield page
                if feed is None:
                    feed = self._join(job_id, after, queue)
                    continue  # what came before it joined is history by now
                if ended:
                    return
                while True:
                    news = await _news(queue)
                    ended = "over" in news
                    if "behind" in news:
                        break
                    fresh = [m for m in news if isinstance(m, Message) and place(m.id) > place(after)]
                    after = fresh[-1].id if fresh else after
                    yield fresh
                    if ended:
                        return
        finally:
            if feed is not None:
                self._leave(job_id, feed, queue)

    async def _history(self, job_id: str, after: str) -> AsyncIterator[list[Message]]:
        while entries := await run_in_threadpool(read_history, self.store, self._runs, job_id, after, PAGE_EVENTS):
            yield [_message(*entry) for entry in entries]
            if len(entries) < PAGE_EVENTS:
                return
            after = entries[-1][0]

    def _join(self, job_id: str, after: str, queue: Queue) -> _Feed:
        feed = self._feeds.setdefault(job_id, _Feed(set()))
        feed.queues.add(queue)
        feed.reader = feed.reader or asyncio.create_task(self._read(job_id, after, feed))
        return feed

    def _leave(self, job_id: str, feed: _Feed, queue: Queue) -> None:
        feed.queues.discard(queue)
        if not feed.queues and self._feeds.get(job_id) is feed:
            del self._feeds[job_id]
            feed.stop()

    async def _read(self, job_id: str, after: str, feed: _Feed) -> None:
        try:
            with contextlib.suppress(*AWAY, JobNotFound):
                async for event in follow_events(self.store.url, job_id, after, QUIET_SECONDS):
                    if event is not None:
                        message = _message(*event)
                        feed.put(message)
                        if message.made_at:
                            self._note_lag((datetime.now(UTC) - message.made_at).total_seconds())
        finally:
            if self._feeds.get(job_id) is feed:
                del self._feeds[job_id]
            feed.put("over")


def _message(event_id: str, line: str) -> Message:
    event = json.loads(line)  # of a newer trainer, perhaps: only its type is sure
    made_at = datetime.fromisoformat(event["time"]) if "time" in event else None
    sent = format_sse_event(id=event_id, event=event["type"], data_str=line)
    return Message(event_id, event["type"], made_at, sent)


async def _news(queue: Queue) -> list[News]:
    """All that is in the queue; waits for the first. Empty after a quiet time."""
    try:
        async with asyncio.timeout(QUIET_SECONDS):
            news = [await queue.get()]
    except TimeoutError:
        return []
    while not queue.empty():
        news.append(queue.get_nowait())
    return news
