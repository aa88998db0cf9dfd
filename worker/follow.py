"""A job's events as they come: the store's streams, followed without holding a thread."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

from worker.connection import connect_async
from worker.job import TERMINAL_STATUSES, StatusChange
from worker.keys import KEYS
from worker.record import change_entry, changes_of, place
from worker.store import JobNotFound


async def follow_events(
    url: str, job_id: str, after: str = "0-0", quiet_seconds: float = 10.0
) -> AsyncIterator[tuple[str, str] | None]:
    """(id, JSON) of events and status changes behind `after` as they come; None after each quiet time.

    Ends once the job has ended and all was given, or when the job is deleted. Raises JobNotFound.
    """
    events_key, changes_key = KEYS["events"] + job_id, KEYS["changes"] + job_id
    cursors = {events_key: after.partition(".")[0], changes_key: change_entry(after)}
    # protocol 2: pairs of stream and entries; RESP3 nests them
    client = connect_async(url, quiet_seconds + 10, decode_responses=True, protocol=2)
    try:
        status = await client.hget(KEYS["job"] + job_id, "status")
        if status is None:
            raise JobNotFound(job_id)
        ended = status in TERMINAL_STATUSES
        held: list[StatusChange] = []
        while True:
            block = None if ended else int(quiet_seconds * 1000)
            news: Any = dict(await client.xread(cast(Any, cursors), count=1000, block=block))
            cursors |= {key: read[-1][0] for key, read in news.items()}
            found = [(entry_id, fields["event"]) for entry_id, fields in news.get(events_key, [])]
            held += changes_of(news.get(changes_key, []))
            ended |= any(change.to_status in TERMINAL_STATUSES for change in held)  # read once more for its last events
            # a change that stands after an event for which this answer had no room comes with that event
            reached = place(cursors[events_key])
            found += [(change.id, change.model_dump_json()) for change in held if place(change.id)[:2] <= reached]
            held = [change for change in held if place(change.id)[:2] > reached]
            for entry in sorted(found, key=lambda one: place(one[0])):
                yield entry
            if not news:
                if ended or not await client.exists(KEYS["job"] + job_id):
                    return
                yield None
    finally:
        # whoever stops following cancels every await in here; the connection is to be closed all the same
        await asyncio.shield(client.aclose())
