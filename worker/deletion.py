"""Forgetting a job: its files first, then its record, so that one interrupted can be asked for again.

Several may delete the same job at a time.
"""

import logging
import shutil
from contextlib import suppress
from pathlib import Path

from gptcore.locks import is_held
from gptcore.rundir import RunDir
from worker.archive import archive_file
from worker.job import is_job_id
from worker.place import known_root
from worker.store import NotPossible, Store

LEFTOVERS_AT_ONCE = 100
RETRY_SECONDS = 600.0  # after which a leftover that could not be removed is tried again

log = logging.getLogger("trainmaster.worker")


def delete_job(store: Store, runs: Path, job_id: str) -> None:
    """Delete an ended job. Raises JobNotFound, NotPossible.

    Files in another runs root than `runs` are left to the nodes that have it: see `remove_leftovers`.
    """
    run = RunDir(runs / job_id)
    aside = _aside(run)
    store.delete_job(job_id, look=True, archived=_is_archived(run))
    _move_aside(run)
    try:
        store.delete_job(job_id, look=True, archived=_is_archived(run))
    except NotPossible:  # one came meanwhile
        with suppress(FileNotFoundError):
            aside.rename(run.path)
        raise
    is_archived = _is_archived(run)
    _remove(aside)
    store.delete_job(job_id, archived=is_archived, root=known_root(runs))
    if is_archived:
        _remove(run.path)  # a sweep may have made it anew, for the record alone


def remove_leftovers(store: Store, runs: Path) -> None:
    """Remove the run directories in `runs` of jobs that were deleted where they could not be reached. Raises AWAY.

    Only what a deletion noted is removed, never what Redis merely does not know: it may have lost its data, or have
    been restored to an older state. A job that it has again keeps its files.
    """
    root = known_root(runs)
    for job_id in store.leftovers(root, LEFTOVERS_AT_ONCE):
        if is_job_id(job_id) and not store.exists(job_id):
            run = RunDir(runs / job_id)
            try:
                _move_aside(run)
                _remove(_aside(run))
            except (OSError, NotPossible) as error:
                log.warning("%s was deleted and its run directory cannot be removed yet: %s", job_id, error)
                store.postpone_leftover(root, job_id, RETRY_SECONDS)
                continue
            log.info("%s was deleted; its run directory is removed", job_id)
        store.forget_leftover(root, job_id)


def _is_archived(run: RunDir) -> bool:
    """Return whether the run directory, perhaps put aside, has the job's record. A sweep may archive it at any time."""
    folders = (run.path, _aside(run))
    return is_job_id(run.path.name) and any(archive_file(folder).exists() for folder in folders)


def _aside(run: RunDir) -> Path:
    """Return where a run directory is put before it is removed: out of sight, so that no job finds it any more."""
    return run.path.with_name(f".{run.path.name}.deleted")


def _move_aside(run: RunDir) -> None:
    """Raises NotPossible while processes of the run still end."""
    with suppress(FileNotFoundError):  # there are none, or another who deletes it was first
        if any(is_held(attempt.lock) for attempt in run.attempts() if attempt.lock.exists()):
            raise NotPossible(f"processes of {run.path.name} are still ending; delete it in a moment")
        run.path.rename(_aside(run))


def _remove(folder: Path) -> None:
    """Raises OSError."""
    shutil.rmtree(folder, ignore_errors=True)  # what another has removed meanwhile is no error
    if folder.exists():
        shutil.rmtree(folder)  # says why it stays
