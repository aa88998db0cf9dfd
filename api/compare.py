"""Several runs beside each other: curves on one axis, what differs in their specs, and where they part."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from api.problems import Refusal
from api.routes import PROBLEMS, With
from api.series import Key, Points
from gptcore.spec import Problem

router = APIRouter(responses=PROBLEMS, tags=["runs"])
MOST_JOBS = 20
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


@router.get("/compare")
def compare(
    services: With,
    job: Annotated[list[str], Query(description="ids; two or more", min_length=1, max_length=MOST_JOBS)],
    keys: Annotated[
        list[Key] | None, Query(max_length=100, description="by default the losses; may be repeated")
    ] = None,
    by: Axis = "step",
    max_points: Annotated[int, Query(ge=10, le=100_000, description="a curve")] = 1000,
) -> Comparison:
    """Curves of several jobs on one axis, the differences of what they ran with, and where they part."""
    if len(set(job)) < 2:
        problem = Problem(pointer="/query/job", message=f"job {job} names one job; name another one to compare it with")
        raise Refusal(422, "invalid_parameter", problem.message, [problem])
    jobs = [services.store.get_job(one) for one in dict.fromkeys(job)]
    runs = [services.run(one.id) for one in jobs]
    asked: Sequence[Key] = keys or ("train_loss", "val_loss")
    whole = [run.metrics([*asked, "step_seconds"]).series for run in runs]
    thinned = [run.metrics(asked, max_points=max_points).series for run in runs]
    axes = [_axis(by, one.spec, series["step_seconds"]) for one, series in zip(jobs, whole, strict=True)]
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
            for key in asked
        },
        differences=list(_differences(documents)),
        parted_at={key: _parted_at([series[key] for series in whole]) for key in asked},
    )


def _axis(by: Axis, spec: Mapping[str, Any], step_seconds: Points) -> Any:
    """From a step to where it stands on the axis."""
    if by == "step":
        return float
    if by == "tokens":
        return lambda step: float(step * spec.get("tokens_per_step", 0))
    # what was evaluated at a step that the guard skipped stands behind the steps before it
    spent = [0.0, *accumulate(step_seconds.value)]
    return lambda step: spent[bisect_right(step_seconds.step, step)]


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


def _parted_at(curves: Sequence[Points]) -> int | None:
    """Values are compared as written: runs that should be alike are alike to the last bit."""
    first, *others = (dict(zip(points.step, map(repr, points.value), strict=True)) for points in curves)
    for step, value in first.items():
        if any(other.get(step, value) != value for other in others) and all(step in other for other in others):
            return step
    return None
