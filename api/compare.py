"""Several runs beside each other: curves on one axis, what differs in their specs, and where they part."""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from api.problems import Refusal
from api.routes import PROBLEMS, Services, With
from api.series import Key, Run
from gptcore.curves import Column
from gptcore.spec import Problem

router = APIRouter(responses=PROBLEMS, tags=["runs"])
MOST_JOBS = 20
LOSSES: list[Key] = ["train_loss", "val_loss"]
PARTED_STEPS = 4096  # compared at a time
Axis = Literal["step", "tokens", "seconds"]


class AlignedPoints(BaseModel, ser_json_inf_nan="strings"):
    x: list[float] = Field(description="steps, tokens seen, or seconds spent in steps")
    value: list[float]


class Difference(BaseModel):
    """A value that is not the same in all; in the order of the jobs asked for, null where there is none."""

    pointer: str = Field(examples=["/spec/optim/lr", "/versions/torch"])
    values: list[Any]


class Comparison(BaseModel):
    jobs: list[str]
    by: Axis
    series: dict[Key, list[AlignedPoints]] = Field(description="in the order of the jobs")
    differences: list[Difference] = Field(description="of specs, versions, devices and what they were trained on")
    parted_at: dict[Key, int | None] = Field(
        description="first step that all made and at which their values differ; null: at none"
    )


@router.get("/compare", response_model=Comparison)
async def compare(
    request: Request,
    services: With,
    job: Annotated[list[str], Query(description="ids; two or more", min_length=1, max_length=MOST_JOBS)],
    keys: Annotated[
        list[Key] | None, Query(max_length=100, description="by default the losses; may be repeated")
    ] = None,
    by: Axis = "step",
    max_points: Annotated[int, Query(ge=10, le=100_000, description="a curve")] = 1000,
) -> Response:
    """Curves of several jobs on one axis, the differences of what they ran with, and where they part."""
    if len(set(job)) < 2:
        problem = Problem(pointer="/query/job", message=f"job {job} names one job; name another one to compare it with")
        raise Refusal(422, "invalid_parameter", problem.message, [problem])
    job_ids, shown = [*dict.fromkeys(job)], keys or LOSSES

    def version() -> Hashable:
        for one in job_ids:
            services.store.require_job(one)
        return tuple(services.run(one).version() for one in job_ids)

    def read() -> bytes:
        return _compare(services, job_ids, shown, by, max_points).model_dump_json().encode()

    question = ("compare", by, max_points, *job_ids, *shown)
    return await services.shared.answer(request, question, lambda: services.read(version), lambda: services.read(read))


def _compare(services: Services, job_ids: Sequence[str], keys: Sequence[Key], by: Axis, max_points: int) -> Comparison:
    jobs = [services.store.get_job(one) for one in job_ids]
    runs = [services.run(one.id) for one in jobs]
    thinned = [run.metrics(keys, max_points=max_points).series for run in runs]
    axes = [_axis(by, one.spec, run) for one, run in zip(jobs, runs, strict=True)]
    started = [run.started() for run in runs]
    documents = [
        {"spec": one.spec, "versions": start.get("versions", {})}
        | {name: start.get(name) for name in ("device_name", "dataset_sha256")}
        for one, start in zip(jobs, started, strict=True)
    ]
    return Comparison(
        jobs=[one.id for one in jobs],
        by=by,
        series={
            key: [
                AlignedPoints(x=[axis(step) for step in curves[key].step], value=curves[key].value)
                for axis, curves in zip(axes, thinned, strict=True)
            ]
            for key in keys
        },
        differences=list(_differences(documents)),
        parted_at={key: _parted_at(runs, key) for key in keys},
    )


def _axis(by: Axis, spec: Mapping[str, Any], run: Run) -> Any:
    """From a step to where it stands on the axis."""
    if by == "step":
        return float
    if by == "tokens":
        return lambda step: float(step * spec.get("tokens_per_step", 0))
    # what was evaluated at a step that the guard skipped stands behind the steps before it
    steps, seconds = run.part("step_seconds")
    spent = array("d", accumulate(seconds, initial=0.0))
    return lambda step: spent[bisect_right(steps, step)]


def _differences(documents: Sequence[Mapping[str, Any]]) -> Iterator[Difference]:
    flat = [dict(_leaves("", document)) for document in documents]
    for pointer in sorted(set().union(*flat)):
        values = [leaves.get(pointer) for leaves in flat]
        if any(value != values[0] for value in values):
            yield Difference(pointer=pointer, values=values)


def _leaves(pointer: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield pointer, value
        return
    for name, inner in value.items():
        yield from _leaves(f"{pointer}/{name.replace('~', '~0').replace('/', '~1')}", inner)


def _parted_at(runs: Sequence[Run], key: Key) -> int | None:
    """The first step that all runs made and at which their values differ. Runs that differ do so early as a rule, so
    what is compared at a time starts small and grows."""
    start, size = 0, PARTED_STEPS
    while True:
        parts = [run.part(key, start, start + size) for run in runs]
        for at in range(start, start + size, PARTED_STEPS):
            if (step := _first_difference([_between(part, at, at + PARTED_STEPS) for part in parts])) is not None:
                return step
        if any(run.last_step(key) < start + size for run in runs):
            return None
        start, size = start + size, 2 * size


def _between(part: Column, start: int, stop: int) -> Column:
    steps, values = part
    where = slice(bisect_left(steps, start), bisect_left(steps, stop))
    return steps[where], values[where]


def _first_difference(parts: Sequence[Column]) -> int | None:
    """Values are compared as written: runs that should be alike are alike to the last bit."""
    if len({(steps.tobytes(), values.tobytes()) for steps, values in parts}) == 1:
        return None
    first, *others = (dict(zip(steps, map(repr, values), strict=True)) for steps, values in parts)
    for step, value in first.items():
        if any(other.get(step, value) != value for other in others) and all(step in other for other in others):
            return step
    return None
