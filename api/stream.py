"""A job's events and logs as server-sent events, until the job has ended."""

import json
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing, suppress
from pathlib import Path

from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.concurrency import run_in_threadpool

from api.hub import Hub
from api.planning import is_inside
from gptcore.rundir import RunDir
from worker.connection import AWAY
from worker.record import place
from worker.store import JobNotFound, Store

RECONNECT_MILLISECONDS = 1000
LOG_TAIL_BYTES, LOG_CHUNK_BYTES = 1 << 20, 1 << 16
KEEPALIVE_SECONDS = 10.0
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "Vary": "Accept"}


def event_stream(hub: Hub, job_id: str, after: str, types: Collection[str] = ()) -> EventSourceResponse:
    """Events behind `after`, of `types` or all; each is `id`, `event` (its type) and `data` (its JSON).

    The last message is `event: end` with the job's status. A stream that closes without one goes on
    for a client that comes back with Last-Event-ID.
    """
    return EventSourceResponse(_messages(hub, job_id, after, types), headers=HEADERS)


async def _messages(hub: Hub, job_id: str, after: str, types: Collection[str]) -> AsyncGenerator[bytes]:
    yield format_sse_event(retry=RECONNECT_MILLISECONDS)
    try:
        async with aclosing(hub.watch(job_id, after)) as watched:
            async for news in watched:
                # a comment proves that the stream lives
                yield b"".join(m.sent for m in news if not types or m.type in types) or KEEPALIVE_COMMENT
        status, ended = await run_in_threadpool(_status, hub.store, job_id)
    except AWAY:
        return  # closed without an end: the client comes back, and so does Redis
    if ended:
        yield _end(status)


def _end(status: str) -> bytes:
    return format_sse_event(event="end", data_str=json.dumps({"status": status}))


def _status(store: Store, job_id: str) -> tuple[str, bool]:
    """And whether that is an end."""
    try:
        job = store.get_job(job_id)
    except JobNotFound:
        return "deleted", True
    return job.status, job.ended


def log_stream(hub: Hub, run: RunDir, job_id: str, attempt: int | None, after: str | None) -> EventSourceResponse:
    """What the trainer prints, as `log` messages with ids {attempt}-{byte}, from the newest attempt's last MiB on."""
    attempt, offset = place(after)[:2] if after else (attempt or 0, -1)
    return EventSourceResponse(_log_messages(hub, run, job_id, attempt, offset), headers=HEADERS)


async def _log_messages(hub: Hub, run: RunDir, job_id: str, attempt: int, offset: int) -> AsyncGenerator[bytes]:
    yield format_sse_event(retry=RECONNECT_MILLISECONDS)
    with suppress(*AWAY):
        async with hub.logs.watch(job_id) as log:
            while not (hub.closing or log.closed):
                seen = log.state
                attempt, offset, text = await run_in_threadpool(_read_log, run, attempt, offset, seen.ended)
                if text is not None:
                    yield format_sse_event(id=f"{attempt}-{offset}", event="log", data_str=text)
                elif seen.ended:
                    yield _end(seen.status)
                    return
                elif not await log.changed(seen, KEEPALIVE_SECONDS):
                    yield KEEPALIVE_COMMENT


def logs_of(run: RunDir) -> dict[int, Path]:
    """Logs by attempt. A link that leads out of the run directory is none."""
    return {a.number: a.log for a in run.attempts() if a.log.exists() and is_inside(a.log, run.path)}


def _read_log(run: RunDir, attempt: int, offset: int, ended: bool) -> tuple[int, int, str | None]:
    """Whole lines behind a place in an attempt's log, then of the attempts after it → the place behind them, text.

    `attempt` 0 is the newest, `offset` -1 its last MiB. A line is whole, too, where no more of it will come.
    """
    attempts = run.attempts()
    logs = logs_of(run)
    attempt = attempt or max(logs, default=0)
    if attempt not in logs:
        return attempt, offset, None
    later = [number for number in logs if number > attempt]
    with logs[attempt].open("rb") as file:
        size = logs[attempt].stat().st_size
        if offset > size:  # what was read lies in the log's older part now
            offset = 0
        offset = max(0, size - LOG_TAIL_BYTES) if offset < 0 else offset
        file.seek(offset)
        chunk = file.read(LOG_CHUNK_BYTES)
    if b"\n" in chunk:
        chunk = chunk[: chunk.rfind(b"\n") + 1]
    elif not (len(chunk) == LOG_CHUNK_BYTES or ended or attempts[-1].number > attempt):
        chunk = b""
    if chunk:
        # a progress bar's returns would end a line of the stream
        text = chunk.decode("utf-8", "replace").removesuffix("\n").replace("\r", "\n")
        return attempt, offset + len(chunk), text
    return _read_log(run, min(later), 0, ended) if later else (attempt, offset, None)
