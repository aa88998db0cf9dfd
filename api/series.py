"""A run's curves, read from its directory: columns of steps and values, attempts merged.

What was read stays in memory, and a poll reads only what was appended since.
"""

from __future__ import annotations

import json
import math
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from gptcore.events import Sampled, read_lines
from gptcore.rundir import RunDir

Key = Literal[
    "train_loss", "val_loss", "bits_per_byte", "lr", "grad_norm", "tokens_per_second", "step_seconds",
    "data_wait_seconds", "mfu", "mfu_causal", "peak_memory_bytes",
]  # fmt: skip
KEYS: tuple[Key, ...] = get_args(Key)
EVENT_TYPES = ("step", "evaluated")  # those that carry values
RUNS_KEPT = 32


class Points(BaseModel):
    """Columns of equal length; steps ascend. NaN and infinities are strings, as JSON has none."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    step: list[int]
    value: list[float]


class Metrics(BaseModel):
    job_id: str
    last_event_id: str = Field(description="{attempt}-{seq} of the newest event read: a stream goes on after it")
    series: dict[Key, Points]


class Curve:
    def __init__(self) -> None:
        self._steps = array("q")
        self._values = array("d")

    def put(self, step: int, value: float) -> None:
        """Calls come in the order of event ids: of a step that came before, the newer value counts."""
        if not self._steps or step > self._steps[-1]:
            self._steps.append(step)
            self._values.append(value)
            return
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
        steps, values = self._steps[start:stop], self._values[start:stop]
        if max_points is None or len(steps) <= max_points:
            return Points(step=steps.tolist(), value=values.tolist())
        kept = _extremes(steps, values, max_points)
        return Points(step=[steps[i] for i in kept], value=[values[i] for i in kept])


def _extremes(steps: array[int], values: array[float], max_points: int) -> list[int]:
    """Indices of the least and greatest value of each bucket of steps, a NaN if there is one, and the last.

    A bucket is 2^n steps wide and begins at a multiple of that: it stays as it is while points append.
    """
    points_of_bucket = 3 if math.isnan(sum(values)) else 2
    width = 1
    while points_of_bucket * ((steps[-1] - steps[0]) // width + 2) > max_points - 1:
        width *= 2
    kept = {len(steps) - 1}
    start = 0
    while start < len(steps):
        stop = bisect_left(steps, (steps[start] // width + 1) * width, start)
        bucket = values[start:stop]
        numbers = [value for value in bucket if value == value]
        kept |= {start + bucket.index(extreme(numbers)) for extreme in (min, max) if numbers}
        if len(numbers) < len(bucket):
            kept.add(start + next(i for i, value in enumerate(bucket) if value != value))
        start = stop
    return sorted(kept)


class Run:
    """What is known of one run directory's curves."""

    def __init__(self, path: Path):
        self._run_dir = RunDir(path)
        self._offsets: defaultdict[int, int] = defaultdict(int)  # attempt to bytes read of its events
        self._curves = {key: Curve() for key in KEYS}
        self._samples: dict[int, Sampled] = {}
        self._last_event_id = "0-0"
        self._lock = threading.Lock()  # polls come from many threads

    def samples(self) -> list[Sampled]:
        """By step."""
        with self._lock:
            self._read_on()
            return [self._samples[step] for step in sorted(self._samples)]

    def metrics(self, keys: Iterable[Key], **window: int | None) -> Metrics:
        """Read what is new, then answer. `window`: from_step, to_step, max_points."""
        with self._lock:
            self._read_on()
            series = {key: self._curves[key].points(**window) for key in keys}
            return Metrics(job_id=self._run_dir.path.name, last_event_id=self._last_event_id, series=series)

    def _read_on(self) -> None:
        # an attempt writes only once no earlier one lives: where its file is seen, theirs are complete
        for attempt in [attempt for attempt in self._run_dir.attempts() if attempt.events.exists()]:
            for offset, line in read_lines(attempt.events, self._offsets[attempt.number]):
                self._offsets[attempt.number] = offset
                self._take(json.loads(line))

    def _take(self, event: dict[str, Any]) -> None:
        self._last_event_id = f"{event['attempt']}-{event['seq']}"
        if event["type"] == "sampled":
            self._samples[event["step"]] = Sampled.model_validate(event)
        if event["type"] not in EVENT_TYPES:
            return
        for key in KEYS:
            if (value := event.get(key)) is not None:
                self._curves[key].put(event["step"], float(value))  # also "NaN" and "Infinity"


class RunCache:
    """The runs asked for last."""

    def __init__(self, root: Path):
        self._root = root
        self._runs: OrderedDict[str, Run] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, job_id: str) -> Run:
        """`job_id` must be a job's: it becomes a path."""
        with self._lock:
            if job_id not in self._runs:
                self._runs[job_id] = Run(self._root / job_id)
            self._runs.move_to_end(job_id)
            if len(self._runs) > RUNS_KEPT:
                self._runs.popitem(last=False)
            return self._runs[job_id]
