"""The frame of a job that trains nothing, as a process: arguments, lock, events, and how it ends."""

import argparse
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from gptcore.events import Finished, Report, Started, Stopped
from gptcore.failure import Interrupted, reporting
from gptcore.locks import shared
from gptcore.procs import die_with_parent
from gptcore.rundir import Attempt, RunDir
from gptcore.spec import JobBase, read_spec

SpecType = TypeVar("SpecType", bound=JobBase)


class Told(Exception):
    """The stop file appeared; what is done so far is kept."""


@dataclass(frozen=True)
class Process(Generic[SpecType]):
    spec: SpecType
    run: RunDir
    attempt: Attempt
    report: Report

    def heed(self) -> None:
        """Raises Told where the job is to stop; called as often as a person's patience wants."""
        if word := self.attempt.told():
            raise Told(word)

    def is_stopped(self) -> bool:
        return bool(self.attempt.told())

    def started(self, kind: str, device: str = "cpu", world_size: int = 1) -> None:
        versions = {"python": platform.python_version()}
        self.report(Started(kind=kind, device=device, device_name=device, world_size=world_size, versions=versions))


def run_job(
    wanted: type[SpecType], work: Callable[[Process[SpecType]], Finished | None], argv: list[str] | None
) -> int:
    """Do the work of the job in RUN_DIR; what it returns is reported at last. The first rank speaks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    arguments = parser.parse_args(argv)
    die_with_parent()
    run = RunDir(arguments.run_dir.absolute())
    attempt = run.attempt(arguments.attempt)
    rank = int(os.environ.get("RANK", 0))
    with shared(attempt.lock), reporting(attempt, rank) as report:
        spec = read_spec(run.spec)
        assert isinstance(spec, wanted), f"a {spec.kind} job came to {wanted.__name__}"
        try:
            finished = work(Process(spec, run, attempt, report))
            if finished is not None:
                report(finished)
        except Told as told:
            report(Stopped.model_validate({"step": 0, "reason": str(told)}))
        except Interrupted:  # another rank may have seen the stop file first
            report(Stopped.model_validate({"step": 0, "reason": attempt.told() or "pause"}))
    return 0
