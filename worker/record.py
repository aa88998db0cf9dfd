"""A job as it is stored: a flat hash of texts, JSON where a field has parts."""

import hashlib
import json
import posixpath
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from gptcore.plan import Plan
from gptcore.spec import AnySpec, EvalSpec, TrainSpec
from worker.job import Job, StatusChange

# fields of the job's hash that hold JSON; the others are plain text, which Pydantic reads
_JSON_FIELDS = ("labels", "nodes", "spec", "plan", "best_checkpoint", "published", "results", "error")


def new_record(
    job_id: str, parent: str | None, spec: AnySpec, plan: Plan | None, device: str | None, owner: str
) -> dict[str, Any]:
    """Return a new job in the form that create.lua takes. It is placed on `device` if its spec says "auto"."""
    asked = spec.resources
    # all else takes one core of one node, whatever the spec asks for
    trains, ranked = isinstance(spec, TrainSpec), isinstance(spec, TrainSpec | EvalSpec)
    document = spec.model_dump(mode="json")
    fields = {
        "kind": spec.kind, "name": spec.name, "labels": spec.labels, "owner": owner,
        "spec": document, "plan": plan, "likeness": likeness(document), "reads": job_read(document),
        "total_steps": spec.max_steps if isinstance(spec, TrainSpec) else None,
        "pool": asked.pool, "priority": asked.priority,
        "wanted_nodes": asked.nodes if trains else 1,
        "wanted_ranks": asked.ranks_per_node if ranked else 1,
        "wanted_device": _wanted_device(asked.device, device) if ranked else "any",
    }  # fmt: skip
    return {"id": job_id, "parent": parent or "", "fields": flat(fields)}


def _wanted_device(asked: str, planned: str | None) -> str:
    return planned or "auto" if asked == "auto" else asked


def likeness(spec: Mapping[str, Any]) -> str | None:
    """Return a hash that train specs share if their runs take equally long per token; None for other kinds."""
    if spec.get("kind") != "train":
        return None
    resources = spec.get("resources") or {}
    alike = [spec.get(name) for name in ("model", "tokens_per_step", "micro_batch_size", "precision", "compile")]
    alike += [resources.get(name) for name in ("pool", "device", "nodes", "ranks_per_node")]
    return hashlib.sha256(json.dumps(alike, sort_keys=True).encode()).hexdigest()[:16]


def job_read(spec: Mapping[str, Any]) -> str | None:
    """Return the id of the job whose run directory a job of this spec reads; None if it reads none."""
    source = (spec.get("init_from") or spec).get("source")  # a prepare job's is an object: text, not a run
    if not isinstance(source, str) or source.startswith("hf://"):
        return None
    return posixpath.normpath(source).partition("/")[0]


def flat(fields: Mapping[str, Any]) -> list[str]:
    """Field, value, field, value for HSET; those that are None are left as they were."""
    return [text for field, value in fields.items() if value is not None for text in (field, _text(value))]


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, BaseModel):
        return value.model_dump_json()
    return json.dumps(value)


def changes_of(entries: list[Any]) -> list[StatusChange]:
    """Return the changes of status that entries of their stream hold."""
    return [
        StatusChange.model_validate(
            {"id": f"{fields.get('behind', '0-0')}.{entry_id.partition('-')[2]}"}
            | {"from_status": fields["from"], "to_status": fields["to"]}
            | {name: fields[name] for name in ("time", "who", "why")}
        )
        for entry_id, fields in entries
    ]


def change_entry(after: str) -> str:
    """Return the id that a change at this place has in the stream of status changes: see `add_change` in shared.lua."""
    attempt, seq, *number = place(after)
    return f"{attempt * 2**32 + seq}-{number[0] if number else 0}"


def place(entry_id: str) -> tuple[int, ...]:
    """Where an event or a status change stands among all of its job."""
    return tuple(map(int, entry_id.replace("-", ".").split(".")))


def job_of(fields: dict[str, str], rank: int | None) -> Job:
    """Return the job of a record that has an `id`, and its place in the queue counted from `rank` 0.

    Fields that are lost or cannot be read are named in `damaged`: one bad record must not hide the jobs beside it.
    """
    decoded: dict[str, Any] = {"queue_position": None if rank is None else rank + 1}
    damaged = []
    for name, text in fields.items():
        try:
            decoded[name] = json.loads(text) if name in _JSON_FIELDS else text
        except ValueError:
            damaged.append(name)
    if not damaged:
        try:
            return Job.model_validate(decoded)
        except ValidationError as error:
            damaged = sorted({str(one["loc"][0]) for one in error.errors()})
    return _damaged_job(decoded, damaged)


def _damaged_job(decoded: dict[str, Any], damaged: list[str]) -> Job:
    """Return what can be read of a record. A job of unknown status counts as failed, and can be deleted."""
    stand_ins: dict[str, Any] = {
        "kind": "unknown", "name": "", "labels": {}, "status": "failed", "created_at": 0, "queued_at": 0, "spec": {},
    }  # fmt: skip
    readable = {name: value for name, value in decoded.items() if name not in damaged}
    try:
        job = Job.model_validate(stand_ins | readable)
    except ValidationError as error:  # more is damaged than JSON that cannot be parsed
        return _damaged_job(readable, damaged + [str(one["loc"][0]) for one in error.errors()])
    damaged = sorted({*damaged, *(name for name in stand_ins if name not in readable)})
    why = f"its record is damaged: {', '.join(damaged)} cannot be read; delete it once nothing of it runs"
    return job.model_copy(update={"damaged": damaged, "status_reason": why})
