"""Forgetting a job: its files first, then its record, so that one interrupted can be asked for again.

Several may delete the same job at a time.
"""

import shutil
from contextlib import suppress
from pathlib import Path

from gptcore.locks import is_held
from gptcore.rundir import RunDir
from worker.archive import archive_file
from worker.job import is_job_id
from worker.store import NotPossible, Store


def delete_job(store: Store, runs: Path, job_id: str) -> None:
    """Delete an ended job. Raises JobNotFound, NotPossible."""
    run = RunDir(runs / job_id)
    aside = run.path.with_name(f".{job_id}.deleted")  # out of sight: from now on no job finds them
    is_archived = is_job_id(job_id) and any(archive_file(folder).exists() for folder in (run.path, aside))
    store.delete_job(job_id, look=True, archived=is_archived)
    with suppress(FileNotFoundError):  # there are none, or another who deletes it was first
        if any(is_held(attempt.lock) for attempt in run.attempts() if attempt.lock.exists()):
            raise NotPossible(f"processes of {job_id} are still ending; delete it in a moment")
        run.path.rename(aside)
    try:
        store.delete_job(job_id, look=True, archived=is_archived)
    except NotPossible:  # one came meanwhile
        with suppress(FileNotFoundError):
            aside.rename(run.path)
        raise
    shutil.rmtree(aside, ignore_errors=True)  # what another has removed meanwhile is no error
    if aside.exists():
        shutil.rmtree(aside)  # says why it stays
    store.delete_job(job_id, archived=is_archived)
