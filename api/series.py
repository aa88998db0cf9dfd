"""A run's curves, read from its directory: columns of steps and values, attempts merged.

What was read stays in memory while there is room, and a poll reads only what was appended since. A first look
at a long run reads the columns that stand beside its events: gptcore/curves.py.
"""

import csv
import io
import math
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import ne
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field

from gptcore.curves import AttemptCurves, Block, Column, StoredBlock, ascends
from gptcore.events import Sampled
from gptcore.rundir import Attempt, RunDir

Key = Literal[
    "train_loss", "val_loss", "bits_per_byte", "lr", "grad_norm", "tokens_per_second", "step_seconds",
    "data_wait_seconds", "mfu", "mfu_causal", "peak_memory_bytes",
]  # fmt: skip
# what evaluations name their results: hellaswag_acc_norm, lm_eval:arc_easy/acc@25
ResultKey = Annotated[str, Field(pattern=r"^(hellaswag_|lm_eval:|(val_loss|bits_per_byte):)")]
KEYS: tuple[Key, ...] = get_args(Key)
EVENT_TYPES = ("step", "evaluated", "scored")  # those that carry values
RUNS_KEPT = 1024  # without curves a run takes a few kilobytes, most of them its sparkline
CACHE_BYTES = 128 << 20  # of curves; those of a long run are read again from their files in about a second
SPARKLINE_POINTS = 80
ROWS = 2000  # of a table at a time


class Points(BaseModel, ser_json_inf_nan="strings"):
    """Columns of equal length; steps ascend. NaN and infinities are strings, as JSON has none."""

    step: list[int]
    value: list[float]


class Metrics(BaseModel):
    job_id: str
    last_event_id: str = Field(description="{attempt}-{seq} of the newest event read: a stream goes on after it")
    series: dict[str, Points]


class Sparkline(BaseModel):
    """A run's losses in few points."""

    train_loss: Points
    val_loss: Points


def csv_header(keys: Iterable[str]) -> str:
    return _csv([["step", *keys]])


def csv_rows(series: Mapping[str, Points]) -> str:
    """A row a step, a column a key; empty where there is no value. NaN and infinities as in JSON."""
    columns = [dict(zip(points.step, points.value, strict=True)) for points in series.values()]
    steps = sorted(set().union(*columns))
    return _csv([step, *(_cell(column.get(step)) for column in columns)] for step in steps)


def _csv(rows: Iterable[Iterable[object]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def _cell(value: float | None) -> object:
    if value is None or math.isfinite(value):
        return "" if value is None else value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


class Curve:
    def __init__(self) -> None:
        self._steps = array("q")
        self._values = array("d")
        self._has_nan = False
        # bucket width to (points in its complete buckets, which of them to show): those never change
        self._thinned: dict[int, tuple[int, list[int]]] = {}

    def put(self, step: int, value: float) -> None:
        """Calls come in the order of event ids: of a step that came before, the newer value counts."""
        self._has_nan |= value != value
        if not self._steps or step > self._steps[-1]:
            self._steps.append(step)
            self._values.append(value)
            return
        self._thinned.clear()
        at = bisect_left(self._steps, step)
        if self._steps[at] == step:
            self._values[at] = value
        else:
            self._steps.insert(at, step)
            self._values.insert(at, value)

    def extend(self, steps: "array[int]", values: "array[float]") -> None:
        """`put` for many: at once where they all follow what is there."""
        if steps and (not self._steps or steps[0] > self._steps[-1]) and ascends(steps):
            total = sum(values)
            self._has_nan |= total != total and any(map(ne, values, values))
            self._steps.extend(steps)
            self._values.extend(values)
        else:
            for step, value in zip(steps, values, strict=True):
                self.put(step, value)

    def part(self, start: int, stop: int | None) -> Column:
        """Steps and values, from step `start` up to and without `stop`."""
        end = len(self._steps) if stop is None else bisect_left(self._steps, stop)
        where = slice(bisect_left(self._steps, start), end)
        return self._steps[where], self._values[where]

    @property
    def last_step(self) -> int:
        """-1 where there is none."""
        return self._steps[-1] if self._steps else -1

    @property
    def memory(self) -> int:
        return 16 * len(self._steps)

    def step_after(self, step: int, count: int) -> int | None:
        """The last of the `count` steps from `step` on; None if there are fewer after it."""
        at = bisect_left(self._steps, step) + count - 1
        return self._steps[at] if at < len(self._steps) - 1 else None

    def points(self, from_step: int | None = None, to_step: int | None = None, max_points: int | None = None) -> Points:
        """The steps asked for, both ends included, thinned to `max_points` (10 or more)."""
        start = 0 if from_step is None else bisect_left(self._steps, from_step)
        stop = len(self._steps) if to_step is None else bisect_right(self._steps, to_step)
        if max_points is None or stop - start <= max_points:
            return Points(step=self._steps[start:stop].tolist(), value=self._values[start:stop].tolist())
        shown = self._thin(start, stop, max_points)
        return Points(step=[self._steps[i] for i in shown], value=[self._values[i] for i in shown])

    def _thin(self, start: int, stop: int, max_points: int) -> list[int]:
        """Indices of the extremes of each bucket of steps, and of the last point.

        A bucket is 2^n steps wide and begins at a multiple of that: it stays as it is while points append.
        """
        span, width = self._steps[stop - 1] - self._steps[start], 1
        while (3 if self._has_nan else 2) * (span // width + 2) > max_points - 1:
            width *= 2
        at, shown = self._thinned.get(width, (0, [])) if start == 0 else (start, [])
        if at >= stop:  # a window that ends before
            at, shown = start, []
        while True:
            end = bisect_left(self._steps, (self._steps[at] // width + 1) * width, at, stop)
            found = self._extremes(at, end)
            if end == stop:
                break
            shown += found
            at = end
        if start == 0:
            self._thinned[width] = at, shown
        return shown + sorted({*found, stop - 1})

    def _extremes(self, start: int, stop: int) -> list[int]:
        """Indices of the least and the greatest value, and of a NaN if there is one."""
        values = self._values[start:stop]
        numbers = [value for value in values if value == value] if self._has_nan else values
        found = {start + values.index(extreme(numbers)) for extreme in (min, max) if numbers}
        if len(numbers) < len(values):
            found.add(start + next(i for i, value in enumerate(values) if value != value))
        return sorted(found)


class Run:
    """What is known of one run directory's curves. A curve is built when it is asked for first."""

    def __init__(self, path: Path, budget: int = CACHE_BYTES, was_read: Callable[["Run"], None] = lambda _: None):
        """`was_read` is called after each read, when `memory` may have grown."""
        self._run_dir = RunDir(path)
        self._budget = budget
        self._was_read = was_read
        self._lock = threading.Lock()  # polls come from many threads
        self._sparkline: tuple[object, Sparkline] | None = None
        self._forget()

    def _forget(self) -> None:
        self._attempts: dict[int, AttemptCurves] = {}
        self._curves: dict[str, Curve] = {}
        self._samples: dict[int, Sampled] = {}
        self._started: dict[str, Any] = {}
        self._last_event_id = "0-0"
        self.memory = 0  # bytes that the curves take

    def unload(self) -> None:
        """Give the memory back, unless someone is reading: the next read begins again."""
        if self._lock.acquire(blocking=False):
            try:
                self._forget()
            finally:
                self._lock.release()

    def started(self) -> dict[str, Any]:
        """The newest attempt's first event; empty where there is none."""
        with self._reading():
            return self._started

    def samples(self) -> list[Sampled]:
        """By step."""
        with self._reading():
            return [self._samples[step] for step in sorted(self._samples)]

    def part(self, key: str, start: int = 0, stop: int | None = None) -> Column:
        """A copy of a curve, from step `start` up to and without `stop`."""
        with self._reading():
            return self._curve(key).part(start, stop)

    def last_step(self, key: str) -> int:
        """-1 where there is none."""
        with self._reading():
            return self._curve(key).last_step

    def metrics(self, keys: Iterable[str] | None = None, **window: int | None) -> Metrics:
        """Read what is new, then answer: all curves, or those asked for. `window`: from_step, to_step, max_points."""
        with self._reading():
            series = {}
            for key in keys or self._all_keys():
                series[key] = self._curve(key).points(**window)
                self._keep_to_budget(key)
            return Metrics(job_id=self._run_dir.path.name, last_event_id=self._last_event_id, series=series)

    def version(self) -> tuple[tuple[int, int], ...]:
        """Return each attempt's number and bytes of events: what is read is the same while this is the same."""
        return tuple((attempt.number, attempt.events.stat().st_size) for attempt in self._reported())

    def sparkline(self) -> Sparkline:
        """Both losses in few points. While no event comes, it is kept, though the curves may not be."""
        state = self.version()
        known = self._sparkline
        if known is not None and known[0] == state:
            return known[1]
        with self._reading():
            if self._sparkline is None or self._sparkline[0] != state:
                losses = (self._curve(key).points(max_points=SPARKLINE_POINTS) for key in ("train_loss", "val_loss"))
                self._sparkline = state, Sparkline(train_loss=next(losses), val_loss=next(losses))
            return self._sparkline[1]

    def table(self, keys: Sequence[str] | None, from_step: int | None, to_step: int | None) -> Iterator[str]:
        """Every point as CSV, in pieces: each is read when it is asked for, so the whole is never in memory."""
        with self._reading():
            columns = list(keys or self._all_keys())
        yield csv_header(columns)
        start: int | None = from_step or 0
        while start is not None:
            points, start = self._rows_from(columns, start, to_step)
            yield csv_rows(points)

    def _rows_from(self, keys: Sequence[str], start: int, to_step: int | None) -> tuple[dict[str, Points], int | None]:
        """The points of the steps from `start` on, ROWS of them at most, and the step after them; None at the end."""
        with self._reading():
            curves = {key: self._curve(key) for key in keys}
            ends = [end for curve in curves.values() if (end := curve.step_after(start, ROWS)) is not None]
            stop = min([*ends, *([to_step] if to_step is not None else [])], default=None)
            points = {key: curve.points(start, stop) for key, curve in curves.items()}
        return points, None if stop is None or stop == to_step else stop + 1

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock:
            self._read_on()
            yield
            columns = sum(attempt.memory for attempt in self._attempts.values())
            self.memory = columns + sum(curve.memory for curve in self._curves.values())
        self._was_read(self)

    def _keep_to_budget(self, newest: str) -> None:
        """Drop the curves built first while all take too much: an answer has no more than one of them at a time."""
        too_much = sum(curve.memory for curve in self._curves.values()) - self._budget
        for key in [key for key in self._curves if key != newest]:
            if too_much <= 0:
                break
            too_much -= self._curves.pop(key).memory

    def _reported(self) -> list[Attempt]:
        # an attempt writes only once no earlier one lives: where its file is seen, theirs are complete
        return [attempt for attempt in self._run_dir.attempts() if attempt.events.exists()]

    def _read_on(self) -> None:
        for attempt in self._reported():
            for block in self._attempts.setdefault(attempt.number, AttemptCurves(attempt)).read_on():
                self._take(block)

    def _take(self, block: Block | StoredBlock) -> None:
        summary = block.summary
        self._last_event_id = summary.last or self._last_event_id
        self._started = summary.started or self._started
        self._samples |= {sample["step"]: Sampled.model_validate(sample) for sample in summary.samples}
        for key in block.keys:
            if key in self._curves and isinstance(block, Block):
                self._curves[key].extend(*block.column(key))
            else:  # built from all blocks when it is asked for next
                self._curves.pop(key, None)

    def _curve(self, key: str) -> Curve:
        if key not in self._curves:
            curve = Curve()
            for attempt in self._attempts.values():
                for steps, values in attempt.column(key):
                    curve.extend(steps, values)
            if not curve.memory:
                return curve
            self._curves[key] = curve
        return self._curves[key]

    def _all_keys(self) -> list[str]:
        found = {key for attempt in self._attempts.values() for key in attempt.keys}
        return [*KEYS, *sorted(found.difference(KEYS))]


class RunCache:
    """Runs by job id. Those asked for last are kept, as long as their curves fit into `budget` bytes."""

    def __init__(self, root: Path, budget: int = CACHE_BYTES):
        self._root = root
        self._budget = budget
        self._runs: OrderedDict[str, Run] = OrderedDict()  # the one asked for last at the end
        self._lock = threading.Lock()

    def __call__(self, job_id: str) -> Run:
        """The id must be a job's: it becomes a path."""
        with self._lock:
            run = self._runs.pop(job_id, None) or Run(self._root / job_id, self._budget, self._keep_to_budget)
            self._runs[job_id] = run
            if len(self._runs) > RUNS_KEPT:
                self._runs.popitem(last=False)
            return run

    def _keep_to_budget(self, read: Run) -> None:
        """Unload the runs asked for least recently while all take too much; never the one just read."""
        with self._lock:
            too_much = sum(run.memory for run in self._runs.values()) - self._budget
            for other in self._runs.values():
                if too_much <= 0:
                    break
                if other is not read and other.memory:
                    too_much -= other.memory
                    other.unload()
