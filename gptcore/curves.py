"""An attempt's values as columns, kept in a file beside its events so that nobody parses a long run twice.

`attempts/0003/curves.v1` is derived from `events.jsonl` and never the truth: it may be deleted at any time, and a
reader that cannot use or write it parses the events. The version is part of the name. The file is a sequence of
blocks, and each covers the lines of about 4 MiB of events:

    magic, bytes of the directory, bytes of the columns, crc32 of the directory    (16 bytes, little-endian)
    directory                                                                      (JSON)
    columns                                                                        (int64 steps, float64 values)

A block is appended whole, under a lock. A block that was torn is overwritten by the next writer. Each column has a
checksum of its own, because a machine that loses power may keep a file's length and lose its content.
"""

import fcntl
import json
import os
import struct
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from operator import itemgetter, lt
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError
from pydantic_core import from_json

from gptcore.events import Sampled, read_block
from gptcore.rundir import Attempt

BLOCK_BYTES = 4 << 20  # of events: some 10,000 steps, parsed in a few hundredths of a second
CHECKED_BYTES = 256  # of events before a block's end, to notice that the file belongs to other events
STEP_KEYS = (
    "train_loss", "lr", "grad_norm", "step_seconds", "tokens_per_second", "data_wait_seconds", "mfu", "mfu_causal",
    "peak_memory_bytes",
)  # fmt: skip
EVALUATED_KEYS = ("val_loss", "bits_per_byte")
_ROW = itemgetter("step", *STEP_KEYS)
_HEAD = struct.Struct("<4sIII")
_MAGIC = b"TMCB"

Json = dict[str, Any]
Column = tuple["array[int]", "array[float]"]  # steps as they came, and their values


class Damaged(Exception):
    """A column's checksum does not match."""


@dataclass
class Summary:
    """What a block says besides its columns. It covers bytes `start` to `end` of the events."""

    start: int
    end: int
    last: str = ""  # id of its newest event
    started: Json | None = None
    samples: list[Json] = field(default_factory=list)


class Block:
    """A stretch of events in memory."""

    def __init__(self, start: int):
        self.summary = Summary(start, start)
        self._columns: dict[str, Column] = {}

    @property
    def keys(self) -> Iterable[str]:
        return self._columns.keys()

    @property
    def memory(self) -> int:
        return sum(16 * len(steps) for steps, _ in self._columns.values())

    @property
    def is_whole(self) -> bool:
        return self.summary.end - self.summary.start >= BLOCK_BYTES

    def column(self, key: str) -> Column:
        return self._columns.get(key) or (array("q"), array("d"))

    def read_on(self, events: Path) -> "Block | None":
        """Parse the next complete lines, up to this block's end. Return them as a block, None if there are none."""
        summary = self.summary
        lines = read_block(events, summary.end, summary.start + BLOCK_BYTES - summary.end)
        if not lines:
            return None
        fresh = Block(summary.end)
        fresh._parse(lines)
        self._add(fresh)
        return fresh

    def _add(self, fresh: "Block") -> None:
        summary, news = self.summary, fresh.summary
        summary.end = news.end
        summary.last = news.last or summary.last
        summary.started = news.started or summary.started
        summary.samples += news.samples
        for key, (steps, values) in fresh._columns.items():
            self._extend(key, steps, values)

    def _extend(self, key: str, steps: Iterable[int], values: Iterable[float]) -> None:
        known_steps, known_values = self._columns.setdefault(key, (array("q"), array("d")))
        known_steps.extend(steps)
        known_values.extend(values)

    def _parse(self, lines: list[bytes]) -> None:
        """Damaged lines are passed over; they are not shipped either."""
        self.summary.end += sum(map(len, lines)) + len(lines)  # each had a newline
        rows: list[tuple[Any, ...]] = []
        for line in lines:
            event = _event(line)
            if event is None:
                continue
            self.summary.last = f"{event['attempt']}-{event['seq']}"
            match event["type"]:
                case "step":
                    rows.append(_step_row(event))
                case "evaluated":
                    self._add_values(event, {key: event.get(key) for key in EVALUATED_KEYS})
                case "scored":
                    self._add_values(event, event.get("results"))
                case "started":
                    self.summary.started = event
                case "sampled":
                    self._add_sample(event)
        self._add_steps(rows)

    def _add_steps(self, rows: list[tuple[Any, ...]]) -> None:
        """Column by column, which is faster than value by value."""
        rows = [row for row in rows if _is_step(row[0])]
        if not rows:
            return
        numbers, *columns = zip(*rows, strict=True)
        steps = array("q", numbers)
        for key, column in zip(STEP_KEYS, columns, strict=True):
            try:
                self._extend(key, steps, array("d", column))
            except (TypeError, OverflowError):  # nulls, "NaN", or what is no number
                for step, value in zip(steps, column, strict=True):
                    if (number := _number(value)) is not None:
                        self._extend(key, (step,), (number,))

    def _add_values(self, event: Json, values: object) -> None:
        if isinstance(values, dict) and _is_step(event.get("step")):
            for key, value in values.items():
                if (number := _number(value)) is not None:
                    self._extend(key, (event["step"],), (number,))

    def _add_sample(self, event: Json) -> None:
        try:
            self.summary.samples.append(Sampled.model_validate(event).model_dump(mode="json"))
        except ValidationError:
            return


def _event(line: bytes) -> Json | None:
    try:
        event = from_json(line, cache_strings="keys")
    except ValueError:
        try:
            event = from_json(line.decode("utf-8", "replace"))
        except ValueError:
            return None
    is_event = isinstance(event, dict) and isinstance(event.get("type"), str)
    is_numbered = is_event and isinstance(event.get("attempt"), int) and isinstance(event.get("seq"), int)
    return event if is_numbered else None


def _step_row(event: Json) -> tuple[Any, ...]:
    try:
        return _ROW(event)
    except KeyError:  # of an older or a newer trainer
        return tuple(map(event.get, ("step", *STEP_KEYS)))


def _is_step(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 63


def _number(value: Any) -> float | None:
    """Numbers and "NaN", "Infinity", "-Infinity"; None for everything else."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


@dataclass(frozen=True)
class StoredBlock:
    """A block in the file; its columns are read when they are asked for."""

    path: Path
    summary: Summary
    check: int  # crc32 of the last bytes of the events it covers
    columns_at: int
    file_end: int
    steps: list[tuple[int, int, int]]  # byte, count, crc32: keys that have the same steps share one
    values: dict[str, tuple[int, int, int]]  # which steps, byte, crc32

    memory = 0

    @property
    def keys(self) -> Iterable[str]:
        return self.values.keys()

    def column(self, key: str) -> Column:
        """Raises Damaged and OSError."""
        if key not in self.values:
            return array("q"), array("d")
        steps_index, values_at, values_check = self.values[key]
        steps_at, count, steps_check = self.steps[steps_index]
        with self.path.open("rb") as file:
            steps: array[int] = self._read(file, "q", steps_at, count, steps_check)
            values: array[float] = self._read(file, "d", values_at, count, values_check)
        return steps, values

    def _read(self, file: BinaryIO, code: str, at: int, count: int, check: int) -> Any:
        content = os.pread(file.fileno(), 8 * count, self.columns_at + at)
        if zlib.crc32(content) != check:
            raise Damaged(self.path)
        column = array(code, content)
        if sys.byteorder == "big":
            column.byteswap()
        return column


class AttemptCurves:
    """The columns of one attempt: whole blocks, in the file where that can be, and the lines after them."""

    def __init__(self, attempt: Attempt):
        self._attempt = attempt
        self._uses_file = True
        self._is_opened = False
        self._blocks: list[Block | StoredBlock] = []
        self._tail = Block(0)

    @property
    def memory(self) -> int:
        """Bytes of memory that they take."""
        return sum(block.memory for block in (*self._blocks, self._tail))

    @property
    def keys(self) -> set[str]:
        return {key for block in (*self._blocks, self._tail) for key in block.keys}

    def read_on(self) -> Iterator[Block | StoredBlock]:
        """Read what is new. Yield it, oldest first."""
        if not self._is_opened:
            self._is_opened = True
            self._blocks = [*stored_blocks(self._attempt)] if self._uses_file else []
            self._tail = Block(self._blocks[-1].summary.end if self._blocks else 0)
            yield from self._blocks
        while fresh := self._tail.read_on(self._attempt.events):
            yield fresh
            if self._tail.is_whole:
                stored = append(self._attempt, self._tail) if self._uses_file else None
                self._blocks.append(stored or self._tail)
                self._tail = Block(self._tail.summary.end)

    def column(self, key: str) -> list[Column]:
        """All its values so far, in pieces, in the order of events."""
        try:
            return [block.column(key) for block in (*self._blocks, self._tail)]
        except (Damaged, OSError):
            self._distrust_file()
            return [block.column(key) for block in (*self._blocks, self._tail)]

    def _distrust_file(self) -> None:
        """Parse the events again. The next process writes a new file."""
        discard(self._attempt)
        self._uses_file = self._is_opened = False
        for _ in self.read_on():
            pass


def extend(attempt: Attempt, after: int) -> int:
    """Store the next block if the events have a whole one after byte `after`. Return the byte after it, else `after`.

    Cheap enough for a loop: it looks at the events' size first and never reads more than one block.
    """
    try:
        if attempt.events.stat().st_size < after + BLOCK_BYTES:
            return after
        block = Block(after)
        if block.read_on(attempt.events) is None or not block.is_whole:
            return after
    except OSError:
        return after
    append(attempt, block)
    return block.summary.end


def append(attempt: Attempt, block: Block) -> StoredBlock | None:
    """Store a block after those that the file has. Return None where that is impossible: a disk that is full or
    read-only, or a block missing before it."""
    try:
        with attempt.curves.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            known = list(_walk(attempt, file))
            for stored in known:
                if (stored.summary.start, stored.summary.end) == (block.summary.start, block.summary.end):
                    return stored
            end, file_end = (known[-1].summary.end, known[-1].file_end) if known else (0, 0)
            if end != block.summary.start:
                return None
            file.truncate(file_end)  # without what a writer left that did not finish
            file.write(_encoded(attempt, block))
            file.flush()
            return next((stored for stored in _walk(attempt, file, file_end)), None)
    except OSError:
        return None


def stored_blocks(attempt: Attempt) -> list[StoredBlock]:
    """The blocks in the file; none where it is missing, or belongs to other events."""
    try:
        with attempt.curves.open("rb") as file:
            blocks = list(_walk(attempt, file))
        if blocks and _check(attempt, blocks[-1].summary.end) != blocks[-1].check:
            discard(attempt)
            return []
        return blocks
    except OSError:
        return []


def discard(attempt: Attempt) -> None:
    try:
        attempt.curves.unlink(missing_ok=True)
    except OSError:  # read-only: it is ignored then
        return


def _encoded(attempt: Attempt, block: Block) -> bytes:
    columns = bytearray()
    steps: dict[bytes, tuple[int, int, int, int]] = {}
    values: dict[str, tuple[int, int, int]] = {}

    def put(content: bytes) -> int:
        columns.extend(content)
        return len(columns) - len(content)

    for key in block.keys:
        step_bytes, value_bytes = map(_little_endian, block.column(key))
        if step_bytes not in steps:
            steps[step_bytes] = (len(steps), put(step_bytes), len(step_bytes) // 8, zlib.crc32(step_bytes))
        values[key] = (steps[step_bytes][0], put(value_bytes), zlib.crc32(value_bytes))
    directory = asdict(block.summary) | {
        "check": _check(attempt, block.summary.end),
        "steps": [place[1:] for place in steps.values()],
        "values": values,
    }
    text = json.dumps(directory).encode()
    return _HEAD.pack(_MAGIC, len(text), len(columns), zlib.crc32(text)) + text + bytes(columns)


def _little_endian(column: Any) -> bytes:
    if sys.byteorder == "big":
        column = column[:]
        column.byteswap()
    return bytes(column.tobytes())


def _walk(attempt: Attempt, file: BinaryIO, at: int = 0) -> Iterator[StoredBlock]:
    """The blocks from byte `at` on, up to the first that is not whole."""
    size, start = os.fstat(file.fileno()).st_size, None
    while head := os.pread(file.fileno(), _HEAD.size, at):
        if len(head) < _HEAD.size:
            return
        magic, directory_bytes, columns_bytes, check = _HEAD.unpack(head)
        columns_at = at + _HEAD.size + directory_bytes
        if magic != _MAGIC or columns_at + columns_bytes > size:
            return
        text = os.pread(file.fileno(), directory_bytes, at + _HEAD.size)
        if zlib.crc32(text) != check:
            return
        directory: Json = from_json(text)
        names = ("start", "end", "last", "started", "samples")
        summary = Summary(**{name: directory[name] for name in names})
        if start is not None and summary.start != start:
            return
        at, start = columns_at + columns_bytes, summary.end
        yield StoredBlock(
            attempt.curves, summary, directory["check"], columns_at, at, directory["steps"], directory["values"]
        )


def _check(attempt: Attempt, end: int) -> int:
    with attempt.events.open("rb") as file:
        return zlib.crc32(os.pread(file.fileno(), min(CHECKED_BYTES, end), max(0, end - CHECKED_BYTES)))


def ascends(steps: "array[int]") -> bool:
    return all(map(lt, steps, steps[1:]))
