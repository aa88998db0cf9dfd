"""What happened to a job, and what comes: one reader of Redis a job, however many watch it.

A watcher reads what was from Redis, then takes what the job's one reader has read since. Of that the newest is
kept: who is too slow for it reads from Redis again, and holds up nobody. All of this runs in the server's event loop.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice, takewhile
from pathlib import Path

from fastapi.sse import format_sse_event
from pydantic_core import from_json
from starlette.concurrency import run_in_threadpool

from api.log_poller import LogPoller
from gptcore.rundir import RunDir
from worker.connection import AWAY
from worker.follow import follow_events
from worker.record import place
from worker.store import JobNotFound, Store

EVENTS_KEPT, PAGE_EVENTS = 1000, 1000
QUIET_SECONDS, STOP_SECONDS = 10.0, 0.1


def read_history(store: Store, runs: Path, job_id: str, after: str = "0-0", count: int = 1000) -> list[tuple[str, str]]:
    """(id, JSON) of events and changes of status behind `after`, oldest first.

    Events that Redis keeps no longer come from the run directory, where it is.
    """
    attempt, seq, *_ = place(after)
    kept, changes = store.read_stream(job_id, after, count)
    first = place(kept[0][0]) if kept else (1 << 60,)  # behind every event
    if first != (attempt, seq + 1) and (kept or store.last_event(job_id) == "0-0"):
        lines = (one for one in RunDir(runs / job_id).lines_behind(attempt, seq) if _is_event(one[1]))
        kept = [*islice(takewhile(lambda one: place(one[0]) < first, lines), count), *kept]
    return sorted(kept + changes, key=lambda one: place(one[0]))[:count]


def _is_event(line: str) -> bool:
    """Whether a line is an event, perhaps of a later version. A broken disk may leave anything in a file."""
    try:
        event = from_json(line)
    except ValueError:
        return False
    return isinstance(event, dict) and isinstance(event.get("type"), str) and event["type"].isprintable()


@dataclass(frozen=True, slots=True)
class Message:
    """An event or a status change, and how it is sent: made once for all who watch."""

    id: str
    type: str
    made_at: datetime | None
    sent: bytes


class _Feed:
    """A job's one reader, and what it read behind the event `behind`: the newest of it."""

    def __init__(self, behind: str):
        self.behind = behind
        self.reader: asyncio.Task[None] | None = None
        self.watchers = 0
        self.over = False
        self._kept: deque[Message] = deque()
        self._news = asyncio.get_running_loop().create_future()

    def put(self, message: Message) -> None:
        self._kept.append(message)
        if len(self._kept) > EVENTS_KEPT:
            self.behind = self._kept.popleft().id
        self.wake()

    def wake(self) -> None:
        self._news.set_result(None)
        self._news = asyncio.get_running_loop().create_future()

    def newer(self, after: str) -> list[Message]:
        """What is kept of what stands behind `after`."""
        newest_first = takewhile(lambda message: place(message.id) > place(after), reversed(self._kept))
        return [*newest_first][::-1]

    async def stays_quiet(self) -> bool:
        """Waits for news; whether none came for a while."""
        heard, _ = await asyncio.wait([self._news], timeout=QUIET_SECONDS)
        return not heard

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
        self.logs = LogPoller(store, runs)
        self.closing = False

    def close(self) -> None:
        """End every stream, so that its client looks for the next server."""
        self.closing = True
        self.logs.close()
        for feed in self._feeds.values():
            feed.stop()

    async def watch(self, job_id: str, after: str) -> AsyncGenerator[list[Message]]:
        """Events behind `after` as they come, several at a time; none after each quiet time.

        Ends when the job has ended, Redis went away or the server is closing. May raise `redis.ConnectionError`
        or `redis.TimeoutError`.
        """
        feed: _Feed | None = None
        try:
            while not self.closing:
                is_behind = feed is None or place(after) < place(feed.behind)
                if is_behind and (page := await run_in_threadpool(self._page, job_id, after)):
                    after = page[-1].id
                    yield page
                elif feed is None:
                    # a client may name what is still to come, and all others would wait for it too
                    feed = self._join(job_id, min(after, await run_in_threadpool(self.store.newest, job_id), key=place))
                elif fresh := feed.newer(after):
                    after = fresh[-1].id
                    yield fresh
                elif feed.over:
                    return
                elif await feed.stays_quiet():
                    yield []
        finally:
            if feed is not None:
                self._leave(job_id, feed)

    def _page(self, job_id: str, after: str) -> list[Message]:
        return [_message(*one) for one in read_history(self.store, self._runs, job_id, after, PAGE_EVENTS)]

    def _join(self, job_id: str, after: str) -> _Feed:
        feed = self._feeds.setdefault(job_id, _Feed(after))
        feed.watchers += 1
        feed.reader = feed.reader or asyncio.create_task(self._read(job_id, after, feed))
        return feed

    def _leave(self, job_id: str, feed: _Feed) -> None:
        feed.watchers -= 1
        if not feed.watchers and self._feeds.get(job_id) is feed:
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
            feed.over = True
            feed.wake()


def _message(event_id: str, line: str) -> Message:
    event = from_json(line)  # of a newer trainer, perhaps: only its type is sure
    sent = format_sse_event(id=event_id, event=event["type"], data_str=line)
    return Message(event_id, event["type"], _moment(event.get("time")), sent)


def _moment(text: object) -> datetime | None:
    """None for what is no time with a zone."""
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return moment if moment.tzinfo else None
