"""The version of what is in Redis: a newer Trainmaster brings it up to date, an older one refuses to run beside it."""

import json
import logging
from typing import Any

from worker.connection import Connected
from worker.keys import KEYS, scripts
from worker.record import job_read, likeness

# 1: jobs are listed by indexes; 2: status changes are numbered when they are written; 3: ended jobs, by when they ended
VERSION = 3
BATCH = 200  # jobs migrated by one script

log = logging.getLogger(__name__)


class SchemaTooNew(RuntimeError):
    """A newer Trainmaster has written to this Redis."""


class Schema(Connected):
    def bring_up_to_date(self) -> None:
        """Migrate what an older version left. Several processes may do so at once, and any may be killed.

        Raises SchemaTooNew, and `worker.connection.AWAY`.
        """
        found = int(self._redis.hget(KEYS["schema"], "version") or 0)
        if found > VERSION:
            way_out = "update Trainmaster here, or let it use another Redis"
            raise SchemaTooNew(f"this Redis has schema {found}, and this version knows {VERSION}; {way_out}")
        if found < VERSION:  # from now on no older version starts, and this one knows where to continue
            self._redis.hset(KEYS["schema"], mapping={"version": VERSION, "migrated_to": ""})
        self._migrate()

    def _migrate(self) -> None:
        script = self._redis.register_script(scripts()["migrate"])
        while (begin := self._redis.hget(KEYS["schema"], "migrated_to")) is not None:
            above = f"({begin}" if begin else "-inf"
            jobs = self._redis.zrangebyscore(KEYS["jobs"], above, "+inf", start=0, num=BATCH, withscores=True)
            if not jobs:
                self._redis.hdel(KEYS["schema"], "migrated_to")
                return
            pipeline = self._redis.pipeline(transaction=False)
            for job_id, _ in jobs:
                pipeline.hget(KEYS["job"] + job_id, "spec")
            specs = zip(jobs, pipeline.execute(), strict=True)
            derived = [text for (job_id, _), spec in specs for text in (job_id, *_derived(spec))]
            log.info("bringing jobs %s to %s in Redis to schema %d", jobs[0][0], jobs[-1][0], VERSION)
            script(args=[begin, f"{jobs[-1][1]:.0f}", *derived])


def _derived(spec: str | None) -> tuple[str, str]:
    """Return the fields that a new record has and an older one lacks; empty if its spec is damaged."""
    try:
        document: Any = json.loads(spec or "{}")
        return likeness(document) or "", job_read(document) or ""
    except (ValueError, AttributeError):
        return "", ""
