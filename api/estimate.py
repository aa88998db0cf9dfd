"""How long a train job will take and what it will cost, from runs like it, else from its hardware."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from gptcore.plan import Estimate, Hardware, Plan, Range, peak_flops
from gptcore.spec import TrainSpec
from worker.record import likeness
from worker.settings import Settings
from worker.store import JobNotFound, Store

RUNS_LOOKED_AT = 20  # the newest alike
EVENTS_LOOKED_AT = 100  # at each end of a run's stream, for its first and its last step
# Of a GPU's peak: ours reached 0.42 to 0.49 on an H200, others less. A CPU core: 9e10 was
# measured for the demo on two cores, and machines differ by more than models do.
GPU_SHARE_OF_PEAK = Range(low=0.2, expected=0.4, high=0.55)
CPU_CORE_FLOPS = Range(low=2e10, expected=6e10, high=1.5e11)
OTHER_SECONDS = Range(low=5.0, expected=20.0, high=120.0)  # start, export


@dataclass(frozen=True)
class Past:
    """A run like the one planned. Seconds without the queue."""

    other_seconds: float  # before its first step and after its last
    tokens_per_second: float  # evaluations and checkpoints between steps included
    off: float | None  # its real seconds over the estimated ones, minus 1


def estimate(spec: TrainSpec, plan: Plan, hardware: Hardware, settings: Settings, store: Store) -> Estimate | None:
    """None where nothing is known: no run like it, and a GPU of unknown peak."""
    past = _past(spec, store)
    margin = 0.25 if len(past) == 1 else 0.1  # over what was seen
    speed, other = _from_hardware(spec, plan, hardware), OTHER_SECONDS
    if past:
        speed = _seen([one.tokens_per_second for one in past], margin)
        other = _seen([one.other_seconds for one in past], margin)
    if speed is None:
        return None
    seconds = Range(
        low=other.low + plan.total_tokens / speed.high,
        expected=other.expected + plan.total_tokens / speed.expected,
        high=other.high + plan.total_tokens / speed.low,
    )
    gpus = plan.world_size if plan.device == "cuda" else 0
    price = settings.price_per_gpu_hour * gpus / 3600
    known = [one.off for one in past if one.off is not None]
    return Estimate(
        tokens_per_second=speed, seconds=seconds, cost=_times(price, seconds) if price else None,
        basis="past_runs" if past else "hardware", past_runs=len(past),
        past_plans_off=statistics.median(known) if known else None,
    )  # fmt: skip


def _seen(values: Sequence[float], margin: float) -> Range:
    return Range(low=min(values) * (1 - margin), expected=statistics.median(values), high=max(values) * (1 + margin))


def _from_hardware(spec: TrainSpec, plan: Plan, hardware: Hardware) -> Range | None:
    """Tokens a second."""
    if plan.device == "cpu":
        return _times(hardware.ranks * spec.resources.nodes / plan.flops_per_token, CPU_CORE_FLOPS)
    peak = peak_flops(hardware.device_name)
    return _times(peak * plan.world_size / plan.flops_per_token, GPU_SHARE_OF_PEAK) if peak else None


def _times(factor: float, values: Range) -> Range:
    return Range(**{name: factor * value for name, value in values})


def _past(spec: TrainSpec, store: Store) -> list[Past]:
    """Return the newest runs that succeeded in one attempt, with the same model, batch and resources."""
    alike = likeness(spec.model_dump(mode="json"))
    found = [_measured(store, job_id) for job_id in store.jobs_alike(alike, RUNS_LOOKED_AT)] if alike else []
    return [one for one in found if one]


@lru_cache(maxsize=1000)
def _measured(store: Store, job_id: str) -> Past | None:
    """Return what a run that has ended took, None if fewer than two steps are left in its stream.

    Nothing of it changes any more, so it is read once: a submission costs the same however many runs there are.
    """
    try:
        job = store.get_job(job_id)
    except JobNotFound:  # deleted a moment ago
        return None
    attempt, seq = map(int, store.last_event(job_id).split("-"))
    behind = f"{attempt}-{max(0, seq - EVENTS_LOOKED_AT)}"
    first = _steps(store.read_events(job_id, count=EVENTS_LOOKED_AT))[:1]
    last = _steps(store.read_events(job_id, behind))[-1:]
    if not (first and last and last[0]["step"] > first[0]["step"] and job.started_at and job.finished_at):
        return None
    (began, ended), tokens = (datetime.fromisoformat(step["time"]) for step in first + last), last[0]["tokens"]
    speed = (tokens - first[0]["tokens"]) / max(1e-6, (ended - began).total_seconds())
    took = (job.finished_at - job.started_at).total_seconds()
    planned = ((job.plan or {}).get("estimate") or {}).get("seconds")
    return Past(max(0.0, took - tokens / speed), speed, took / planned["expected"] - 1 if planned else None)


def _steps(events: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    return [event for event in (json.loads(line) for _, line in events) if event["type"] == "step"]
