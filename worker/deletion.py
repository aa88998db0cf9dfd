"""Forgetting a job: its files first, then its record, so that one interrupted can be asked for again."""

import shutil
from pathlib import Path

from gptcore.locks import is_held
from gptcore.rundir import RunDir
from worker.store import NotPossible, Store


def delete_job(store: Store, runs: Path, job_id: str) -> None:
    """Delete an ended job. Raises JobNotFound, NotPossible."""
    store.delete_job(job_id, look=True)
    run = RunDir(runs / job_id)
    if any(is_held(attempt.lock) for attempt in run.attempts() if attempt.lock.exists()):
        raise NotPossible(f"processes of {job_id} are still ending; delete it in a moment")
    aside = run.path.with_name(f".{job_id}.deleted")  # out of sight: from now on no job finds them
    if run.path.exists():
        run.path.rename(aside)
    try:
        store.delete_job(job_id, look=True)
    except NotPossible:  # one came meanwhile
        if aside.exists():
            aside.rename(run.path)
        raise
    if aside.exists():
        shutil.rmtree(aside)
    store.delete_job(job_id)
