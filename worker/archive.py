"""Records of ended jobs in their run directories: where a job is read from once Redis has it no longer."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from gptcore.rundir import sync, write_atomically
from worker.job import is_job_id


class ArchivedJob(BaseModel):
    """What Redis had of a job: the fields of its hash, and the entries of its stream of status changes."""

    version: Literal[1] = 1
    record: dict[str, str]
    changes: list[tuple[str, dict[str, str]]]


def archive_file(run_directory: Path) -> Path:
    return run_directory / "job.json"


class Archive:
    """The archived jobs below one runs root."""

    def __init__(self, runs: Path):
        self._runs = runs

    def read(self, job_id: str) -> ArchivedJob | None:
        """Return what was archived of a job; None if there is nothing, or nothing that can be read."""
        if not is_job_id(job_id):
            return None
        try:
            found = ArchivedJob.model_validate_json(archive_file(self._runs / job_id).read_bytes())
        except (OSError, ValidationError):
            return None
        return found if found.record.get("id") == job_id else None

    def write(self, job_id: str, job: ArchivedJob) -> None:
        """Write a job's file so that it outlives a power loss. Raises OSError."""
        file = archive_file(self._runs / job_id)
        write_atomically(file, job.model_dump_json())
        for folder in (file.parent, self._runs):
            sync(folder)

    def discard(self, job_id: str) -> None:
        """Remove a job's file, and its run directory if nothing else is in it."""
        file = archive_file(self._runs / job_id)
        file.unlink(missing_ok=True)
        if file.parent.is_dir() and not any(file.parent.iterdir()):
            file.parent.rmdir()
