"""A job's events as server-sent events, from the store's stream, until the job has ended."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from typing import cast

import redis
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.concurrency import run_in_threadpool

from worker.follow import follow_events
from worker.store import Store

RECONNECT_MILLISECONDS = 1000
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "Vary": "Accept"}


def event_stream(store: Store, job_id: str, after: str, types: Collection[str] = ()) -> EventSourceResponse:
    """Events behind `after`, of `types` or all; each is `id`, `event` (its type) and `data` (its JSON).

    The last message is `event: end` with the job's status. A stream that closes without one goes on
    for a client that comes back with Last-Event-ID.
    """
    return EventSourceResponse(_messages(store, job_id, after, types), headers=HEADERS)


async def _messages(store: Store, job_id: str, after: str, types: Collection[str]) -> AsyncGenerator[bytes]:
    yield format_sse_event(retry=RECONNECT_MILLISECONDS)
    followed = cast("AsyncGenerator[tuple[str, str] | None]", follow_events(store.url, job_id, after))
    try:
        async with aclosing(followed) as news:
            async for item in news:
                yield KEEPALIVE_COMMENT if item is None else _message(*item, types)
        job = await run_in_threadpool(store.get_job, job_id)
    except (redis.ConnectionError, redis.TimeoutError):
        return  # closed without an end: the client comes back, and so does Redis
    yield format_sse_event(event="end", data_str=json.dumps({"status": job.status}))


def _message(event_id: str, line: str, types: Collection[str]) -> bytes:
    kind = json.loads(line)["type"]
    if types and kind not in types:
        return KEEPALIVE_COMMENT  # proves that the stream lives
    return format_sse_event(id=event_id, event=kind, data_str=line)
