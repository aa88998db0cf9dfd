"""A run's curves, read from its directory: columns of steps and values, attempts merged.

What was read stays in memory, and a poll reads only what was appended since.
"""

import csv
import io
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field
from pydantic_core import from_json

from gptcore.events import Sampled, read_lines
from gptcore.rundir import RunDir

Key = Literal[
    "train_loss", "val_loss", "bits_per_byte", "lr", "grad_norm", "tokens_per_second", "step_seconds",
    "data_wait_seconds", "mfu", "mfu_causal", "peak_memory_bytes",
]  # fmt: skip
# what evaluations name their results: hellaswag_acc_norm, lm_eval:arc_easy/acc@25
ResultKey = Annotated[str, Field(pattern=r"^(hellaswag_|lm_eval:|(val_loss|bits_per_byte):)")]
KEYS: tuple[Key, ...] = get_args(Key)
EVENT_TYPES = ("step", "evaluated", "scored")  # those that carry values
RUNS_KEPT = 128  # well above the 50 of a page of the list, which asks for every one of them again and again


class Points(BaseModel, ser_json_inf_nan="strings"):
    """Columns of equal length; steps ascend. NaN and infinities are strings, as JSON has none."""

    step: list[int]
    value: list[float]


class Metrics(BaseModel):
    job_id: str
    last_event_id: str = Field(description="{attempt}-{seq} of the newest event read: a stream goes on after it")
    series: dict[str, Points]

    def to_csv(self) -> str:
        """A row a step, a column a key; empty where there is no value. NaN and infinities as in JSON."""
        written = {key: from_json(points.model_dump_json()) for key, points in self.series.items()}
        columns = {key: dict(zip(points["step"], points["value"], strict=True)) for key, points in written.items()}
        file = io.StringIO()
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["step", *columns])
        for step in sorted(set().union(*columns.values())):
            rows.writerow([step, *(column.get(step, "") for column in columns.values())])
        return file.getvalue()


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
    """What is known of one run directory's curves."""

    def __init__(self, path: Path):
        self._run_dir = RunDir(path)
        self._offsets: defaultdict[int, int] = defaultdict(int)  # attempt to bytes read of its events
        self._curves: dict[str, Curve] = {key: Curve() for key in KEYS}
        self._samples: dict[int, Sampled] = {}
        self._started: dict[str, Any] = {}
        self._last_event_id = "0-0"
        self._lock = threading.Lock()  # polls come from many threads

    def started(self) -> dict[str, Any]:
        """The newest attempt's first event; empty where there is none."""
        with self._lock:
            self._read_on()
            return self._started

    def samples(self) -> list[Sampled]:
        """By step."""
        with self._lock:
            self._read_on()
            return [self._samples[step] for step in sorted(self._samples)]

    def metrics(self, keys: Iterable[str] | None = None, **window: int | None) -> Metrics:
        """Read what is new, then answer: all curves, or those asked for. `window`: from_step, to_step, max_points."""
        with self._lock:
            self._read_on()
            series = {key: self._curves.get(key, Curve()).points(**window) for key in keys or self._curves}
            return Metrics(job_id=self._run_dir.path.name, last_event_id=self._last_event_id, series=series)

    def _read_on(self) -> None:
        # an attempt writes only once no earlier one lives: where its file is seen, theirs are complete
        for attempt in [attempt for attempt in self._run_dir.attempts() if attempt.events.exists()]:
            for offset, line in read_lines(attempt.events, self._offsets[attempt.number]):
                self._offsets[attempt.number] = offset
                with suppress(ValueError, KeyError, TypeError):  # a damaged line, which is not shipped either
                    # twice as fast as json's; no value repeats so often that caching it pays
                    self._take(from_json(line, cache_strings="keys"))

    def _take(self, event: dict[str, Any]) -> None:
        self._last_event_id = f"{event['attempt']}-{event['seq']}"
        if event["type"] == "started":
            self._started = event
        if event["type"] == "sampled":
            self._samples[event["step"]] = Sampled.model_validate(event)
        if event["type"] not in EVENT_TYPES:
            return
        step, results = event["step"], event.get("results", {})
        for key in results:
            self._curves.setdefault(key, Curve())
        values = results if event["type"] == "scored" else event
        for key, curve in self._curves.items():
            if (value := values.get(key)) is not None:
                curve.put(step, float(value))  # also "NaN" and "Infinity"


def run_cache(root: Path) -> Callable[[str], Run]:
    """From a job's id to its run; those asked for last are kept. The id must be a job's: it becomes a path."""
    return lru_cache(RUNS_KEPT)(lambda job_id: Run(root / job_id))
