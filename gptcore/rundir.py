"""Names inside TRAINMASTER_HOME and inside a run directory: the interface of worker and trainer."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

from pydantic_core import from_json

from gptcore.environment import refuse_quotes
from gptcore.events import Failed, Step, parse_event, read_lines, read_lines_backwards

SCANNED_BYTES = 1 << 16  # of events, read to find a line


def home() -> Path:
    """Return where all state lives: `TRAINMASTER_HOME`, else `~/.trainmaster`. Raises ValueError, as `resolve_home`."""
    given = os.environ.get("TRAINMASTER_HOME", "")
    refuse_quotes("TRAINMASTER_HOME", given)
    return resolve_home(given)


def resolve_home(given: str) -> Path:
    """Return the home that `given` names, by default ~/.trainmaster, without symbolic links: one home has one spelling.

    Raises ValueError if the user has no home directory, or if symbolic links form a loop.
    """
    path = Path(given or "~/.trainmaster")
    way_out = "set TRAINMASTER_HOME to a folder that this user can write"
    try:
        expanded = path.expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{path} names no folder, because there is no such user or home directory; {way_out}"
        ) from error
    try:
        return expanded.resolve()
    except RuntimeError as error:
        raise ValueError(f"{path} is a loop of symbolic links; {way_out}") from error


def runs_root() -> Path:
    return home() / "runs"


def datasets_root() -> Path:
    return home() / "datasets"


_LOG = re.compile(r"train(-[0-9]{1,6})?\.log").fullmatch


@dataclass(frozen=True)
class Attempt:
    """The folder of one attempt at a job: `attempts/0003/`."""

    number: int
    path: Path

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def curves(self) -> Path:
        """The values of its events as columns: derived from them, and never the truth."""
        return self.path / "curves.v1"

    @property
    def log(self) -> Path:
        return self.node_log(0)

    def node_log(self, node_rank: int) -> Path:
        """What the ranks of one node print: train.log of node rank 0, train-1.log of the next."""
        return self.path / (f"train-{node_rank}.log" if node_rank else "train.log")

    def node_logs(self) -> dict[int, Path]:
        """Return the logs that exist, by node rank."""
        found = {
            int(path.stem.partition("-")[2] or 0): path for path in self.path.glob("train*.log") if _LOG(path.name)
        }
        return dict(sorted(found.items()))

    @property
    def stop(self) -> Path:
        """Holds "pause", "cancel" or "max_duration" once the attempt is to end."""
        return self.path / "stop"

    def told(self) -> str:
        """What the stop file says; empty where there is none."""
        return self.stop.read_text("utf-8").strip() if self.stop.exists() else ""

    def leave_word(self, rank: int, failed: Failed) -> None:
        """Says why a rank broke that writes no events; the first, whose events they are, may be past hearing it."""
        write_atomically(self.path / f"failed-rank-{rank}.json", failed.model_dump_json())

    def word_left(self) -> Failed | None:
        """What the rank that broke first left."""
        left = [Failed.model_validate_json(path.read_text("utf-8")) for path in self.path.glob("failed-rank-*.json")]
        return min(left, key=lambda failed: failed.time, default=None)

    @property
    def lock(self) -> Path:
        """Held shared by the launcher and every rank; taken exclusively to prove that none lives."""
        return self.path / "lock"


@dataclass(frozen=True)
class RunDir:
    """`RUNS/{job}/`."""

    path: Path

    @property
    def spec(self) -> Path:
        return self.path / "spec.json"

    @property
    def owner_mark(self) -> Path:
        return self.path / "job"

    def owner(self) -> str:
        """The id of the job whose run this is; empty where nobody said so."""
        return self.owner_mark.read_text("utf-8") if self.owner_mark.exists() else ""

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def complete_checkpoints(self) -> list[tuple[Path, int, int]]:
        """Folder, step and attempt, by attempt, then step. Those of other sizes than noted are passed over."""
        found = []
        for path in self.checkpoints.glob("step-*") if self.checkpoints.is_dir() else []:
            match = re.fullmatch(r"step-([0-9]{8,15})-a([0-9]{4,9})", path.name)
            if match and _has_noted_sizes(path):
                found.append((path, int(match[1]), int(match[2])))
        return sorted(found, key=lambda one: (one[2], one[1]))

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def evaluations(self) -> Path:
        """Results of eval jobs on this run's checkpoints, a file a job."""
        return self.path / "evaluations"

    def attempt(self, number: int) -> Attempt:
        return Attempt(number, self.path / "attempts" / f"{number:04d}")

    def attempts(self) -> list[Attempt]:
        """All attempts made, oldest first."""
        folder = self.path / "attempts"
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        return [self.attempt(number) for number in sorted(int(n) for n in names if re.fullmatch("[0-9]{1,9}", n))]

    def claim_attempt(self) -> Attempt:
        """A new attempt's folder. mkdir decides between two that claim at once."""
        number = max((attempt.number for attempt in self.attempts()), default=0) + 1
        while True:
            attempt = self.attempt(number)
            try:
                attempt.path.mkdir(parents=True)
                return attempt
            except FileExistsError:
                number += 1

    def events(self) -> Iterator[object]:
        """Every event of every attempt, in order; a damaged line, or one of a later version, is passed over."""
        for _, line in self.lines_behind(0, 0):
            with suppress(ValueError):
                yield parse_event(line)

    def losses_after(self, step: int, before_attempt: int) -> dict[int, float]:
        """Return the training loss of each step after `step` that attempts before `before_attempt` ran last.

        Their files are read from the end to that step, so the work does not grow with the length of the run.
        """
        losses: dict[int, float] = {}
        earlier = [one for one in self.attempts() if one.number < before_attempt and one.events.exists()]
        for _, line in (read for one in reversed(earlier) for read in read_lines_backwards(one.events)):
            with suppress(ValueError):
                event = parse_event(line)
                if isinstance(event, Step):
                    if event.step <= step:
                        return losses
                    losses.setdefault(event.step, event.train_loss)
        return losses

    def lines_behind(self, attempt: int, seq: int) -> Iterator[tuple[str, str]]:
        """Id and JSON of the events behind {attempt}-{seq}: an attempt's event n is line n of its file."""
        for one in self.attempts():
            if one.number >= attempt and one.events.exists():
                passed = seq if one.number == attempt else 0
                for number, (_, line) in enumerate(read_lines(one.events, _offset_of(one.events, passed)), passed + 1):
                    yield f"{one.number}-{number}", line


def _offset_of(events: Path, line: int) -> int:
    """The byte after a line of an attempt's events, of which 0 is before all; the end if there are fewer.

    Found by bisection, since each line holds its number: a page far into a long run reads no more than the first.
    """
    with events.open("rb") as file:
        low, known = 0, 0  # byte of a line's end, and that line's number
        high = os.fstat(file.fileno()).st_size
        while high - low > SCANNED_BYTES and known < line:
            file.seek((low + high) // 2)
            file.readline()
            found = _next_number(file)
            if found is None or found[0] > line or found[1] > high:
                high = (low + high) // 2
            else:
                known, low = found
        file.seek(low)
        return low + sum(map(len, islice(file, line - known)))


def _next_number(file: BinaryIO) -> tuple[int, int] | None:
    """Number and end of the next line that is not damaged; None if there is none close by."""
    until = file.tell() + SCANNED_BYTES
    while file.tell() < until and (text := file.readline()):
        with suppress(ValueError):
            event = from_json(text)
            if isinstance(event, dict) and isinstance(event.get("seq"), int):
                return event["seq"], file.tell()
    return None


def _has_noted_sizes(checkpoint: Path) -> bool:
    try:
        state = from_json((checkpoint / "state.json").read_bytes())
        sizes = state.get("sizes") if isinstance(state, dict) else None
        if not isinstance(sizes, dict):
            return False
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, outlive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write beside `path`, sync and rename: a reader sees the old text or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # not the process's number: on a shared disk another machine or container has the same
    beside = path.with_name(f".{path.name}.{token_hex(8)}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
