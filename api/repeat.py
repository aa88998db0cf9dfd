"""A job's spec again, with changes: `POST /jobs {"from": "job-…", "overrides": {…}}`."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Discriminator, Field, JsonValue, Tag

from api.planning import Planned, planned
from gptcore.spec import JobSpec, ModelSpec, Problem, SpecError, parse_spec, refusal
from worker.settings import Settings
from worker.store import JobNotFound, Store


class Repeat(BaseModel, extra="forbid", frozen=True):
    """Another job's spec with changes."""

    source: str = Field(alias="from", max_length=200, description="a job's id")
    overrides: dict[str, JsonValue] = Field(
        {},
        description="merged into its spec (RFC 7396): objects merge, null takes a field back to its default. "
        "Another `preset` replaces the whole model; widths that follow from a changed one follow again",
        examples=[{"max_steps": 600, "optim": {"lr": 0.001}}],
    )


EXAMPLES: dict[str, Any] = {
    "a small run": {
        "value": {
            "kind": "train", "name": "tiny", "model": {"preset": "llama-tiny", "block_size": 256},
            "data": {"dataset": "python-stdlib"}, "optim": {"lr": 0.003}, "max_steps": 300, "tokens_per_step": 8192,
        }
    },
    "another, with changes": {"value": {"from": "job-t42p5pft0dsr", "overrides": {"max_steps": 600}}},
}  # fmt: skip


def _which(body: object) -> str:
    return "from" if isinstance(body, Repeat) or (isinstance(body, dict) and "from" in body) else "spec"


Submission = Annotated[Annotated[JobSpec, Tag("spec")] | Annotated[Repeat, Tag("from")], Discriminator(_which)]


def plan_of(submission: JobSpec | Repeat, settings: Settings, store: Store) -> Planned:
    """The spec that is meant, planned. Raises SpecError with pointers into the body."""
    if not isinstance(submission, Repeat):
        return planned(submission, settings, store)
    try:
        spec = dict(store.get_job(submission.source).spec)
    except JobNotFound:
        message = f"from {submission.source!r} is no job; GET /jobs lists them"
        raise refusal("/from", message) from None
    changed = submission.overrides
    if changed.get("kind", spec["kind"]) != spec["kind"]:
        message = f"{submission.source} is a {spec['kind']} job, and kind cannot be changed; submit a whole spec"
        raise refusal("/overrides/kind", message)
    if "model" in spec:
        model, data = changed.get("model"), changed.get("data")
        spec["model"] = _given(spec["model"], isinstance(model, dict) and "preset" in model)
        if isinstance(data, dict) and "dataset" in data:
            spec["model"].pop("vocab_size", None)  # follows from the dataset
    try:
        return planned(parse_spec(_merged(spec, changed)), settings, store)
    except SpecError as error:
        moved = [Problem(pointer=f"/overrides{one.pointer}", message=one.message) for one in error.problems]
        raise SpecError(moved) from None


def _given(model: Mapping[str, Any], another_preset: bool) -> dict[str, Any]:
    """A resolved model as its user may have given it: the preset, and what differs from that."""
    if another_preset:
        return {}
    if model.get("preset") is None:
        return dict(model)
    expanded = ModelSpec.model_validate({"preset": model["preset"]}).model_dump()
    return {field: value for field, value in model.items() if field == "preset" or value != expanded[field]}


def _merged(target: object, patch: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        old = merged.pop(name, None)
        if value is not None:
            merged[name] = _merged(old, value) if isinstance(value, dict) else value
    return merged
