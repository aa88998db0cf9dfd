"""Moves the records of jobs that ended long ago from Redis to their run directories."""

import logging

from worker.archive import Archive
from worker.place import runs_root_id
from worker.settings import Settings
from worker.store import Store

BATCH = 100  # jobs of one sweep
SWEEP_SECONDS = 60.0

log = logging.getLogger(__name__)


def sweep(store: Store, settings: Settings) -> int:
    """Archive jobs that ended more than `retention_days` ago, at most BATCH; return how many.

    A job's file is on disk before its record leaves Redis, so a sweep may be killed at any point. Several processes
    may sweep the same Redis: one does so per minute. A job that must stay is looked at again a day later.

    Raises OSError if a file cannot be written, and `worker.connection.AWAY`.
    """
    if not settings.retention_days or not store.take_sweep(SWEEP_SECONDS):
        return 0
    archive, root = Archive(settings.runs), runs_root_id(settings)
    older_than, archived = settings.retention_days * 86400.0, 0
    for job_id in store.ended_before(older_than, BATCH):
        job = store.whole_job(job_id)
        # a run directory of another home is not reached from here
        is_ours = job.record.get("root") in (None, root)
        if not is_ours or store.kept_by(job_id):
            store.postpone_archiving(job_id, older_than)
            continue
        archive.write(job_id, job)
        if store.archive(job_id, job):
            archived += 1
        elif not store.exists(job_id):  # it was deleted meanwhile
            archive.discard(job_id)
        else:
            store.postpone_archiving(job_id, older_than)
    if archived:
        log.info("%d jobs that ended more than %d days ago were archived", archived, settings.retention_days)
    return archived
