"""How long a train job will take and what it will cost, from runs like it, else from its hardware."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from gptcore.plan import Estimate, Hardware, Plan, Range, peak_flops
from gptcore.spec import TrainSpec
from worker.job import Job
from worker.settings import Settings
from worker.store import Store

RUNS_LOOKED_AT = 50
EVENTS_LOOKED_AT = 100  # at each end of a run's stream, for its first and its last step
# low, expected, high. Of a GPU's peak: ours reached 0.42 to 0.49 on an H200, others less. A CPU core: 9e10 was
# measured for the demo on two cores, and machines differ by more than models do.
GPU_SHARE_OF_PEAK = (0.2, 0.4, 0.55)
CPU_CORE_FLOPS = (2e10, 6e10, 1.5e11)
OTHER_SECONDS = (120.0, 20.0, 5.0)  # start, export: in the order of the speeds


@dataclass(frozen=True)
class Past:
    """A run like the one planned. Seconds without the queue."""

    other_seconds: float  # before its first step and after its last
    tokens_per_second: float  # evaluations and checkpoints between steps included
    off: float | None  # its real seconds over the estimated ones, minus 1


def estimate(spec: TrainSpec, plan: Plan, hardware: Hardware, settings: Settings, store: Store) -> Estimate | None:
    """None where nothing is known: no run like it, and a GPU of unknown peak."""
    past = list(_past(spec, store))
    speeds, others = _from_runs(past) if past else _from_hardware(spec, plan, hardware)
    if not speeds:
        return None
    slow, expected, fast = speeds
    seconds = Range(
        low=others[2] + plan.total_tokens / fast,
        expected=others[1] + plan.total_tokens / expected,
        high=others[0] + plan.total_tokens / slow,
    )
    gpus = plan.world_size if plan.device == "cuda" else 0
    price = settings.price_per_gpu_hour * gpus / 3600
    known = [one.off for one in past if one.off is not None]
    return Estimate(
        tokens_per_second=Range(low=slow, expected=expected, high=fast), seconds=seconds,
        cost=Range(**{name: price * value for name, value in seconds}) if price else None,
        basis="past_runs" if past else "hardware", past_runs=len(past),
        past_plans_off=statistics.median(known) if known else None,
    )  # fmt: skip


def _from_runs(past: Sequence[Past]) -> tuple[Sequence[float], Sequence[float]]:
    margin = 0.25 if len(past) == 1 else 0.1  # over what was seen
    speeds = [one.tokens_per_second for one in past]
    others = [one.other_seconds for one in past]
    return (
        (min(speeds) * (1 - margin), statistics.median(speeds), max(speeds) * (1 + margin)),
        (max(others) * (1 + margin), statistics.median(others), min(others) * (1 - margin)),
    )


def _from_hardware(spec: TrainSpec, plan: Plan, hardware: Hardware) -> tuple[Sequence[float], Sequence[float]]:
    if plan.device == "cpu":
        flops = [one * hardware.ranks * spec.resources.nodes for one in CPU_CORE_FLOPS]
    elif peak := peak_flops(hardware.device_name):
        flops = [share * peak * plan.world_size for share in GPU_SHARE_OF_PEAK]
    else:
        return (), ()
    return [one / plan.flops_per_token for one in flops], OTHER_SECONDS


def _past(spec: TrainSpec, store: Store) -> Iterator[Past]:
    """Runs that went through in one attempt, with the same model, batch and resources."""
    wanted = _likeness(spec.model_dump(mode="json"))
    for job in store.list_jobs(status="succeeded", kind="train", limit=RUNS_LOOKED_AT).data:
        if job.attempt == 1 and _likeness(job.spec) == wanted and (one := _measured(job, store)):
            yield one


def _likeness(spec: dict[str, Any]) -> object:
    asked = spec["resources"]
    shape = [asked[name] for name in ("pool", "device", "nodes", "ranks_per_node")]
    return spec["model"], spec["tokens_per_step"], spec["micro_batch_size"], spec["precision"], spec["compile"], shape


def _measured(job: Job, store: Store) -> Past | None:
    """None where fewer than two steps are left in its stream."""
    attempt, seq = map(int, store.last_event(job.id).split("-"))
    behind = f"{attempt}-{max(0, seq - EVENTS_LOOKED_AT)}"
    first = _steps(store.read_events(job.id, count=EVENTS_LOOKED_AT))[:1]
    last = _steps(store.read_events(job.id, behind))[-1:]
    if not (first and last and last[0]["step"] > first[0]["step"] and job.started_at and job.finished_at):
        return None
    (began, ended), tokens = (datetime.fromisoformat(step["time"]) for step in first + last), last[0]["tokens"]
    speed = (tokens - first[0]["tokens"]) / max(1e-6, (ended - began).total_seconds())
    took = (job.finished_at - job.started_at).total_seconds()
    planned = ((job.plan or {}).get("estimate") or {}).get("seconds")
    return Past(max(0.0, took - tokens / speed), speed, took / planned["expected"] - 1 if planned else None)


def _steps(events: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    return [event for event in (json.loads(line) for _, line in events) if event["type"] == "step"]
