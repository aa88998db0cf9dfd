"""What a submitted spec comes to on the hardware there is, or why it cannot run."""

from __future__ import annotations

from pydantic import BaseModel, Field

from api.estimate import estimate
from gptcore.plan import Hardware, Plan, plan, resolve
from gptcore.spec import PrepareSpec, Problem, SpecError, TrainSpec
from worker.settings import Settings
from worker.store import Store

ANY_RANKS = 1 << 20  # nobody is there to say how many are too many


class Planned(BaseModel):
    spec: TrainSpec | PrepareSpec = Field(description="resolved: presets expanded, everything explicit")
    plan: Plan | None = Field(description="the numbers that follow; null for jobs that train nothing")


def planned(spec: TrainSpec | PrepareSpec, settings: Settings, store: Store) -> Planned:
    """Raises SpecError for what would fail once it ran."""
    if isinstance(spec, PrepareSpec):
        _check_source(spec, settings)
        return Planned(spec=spec, plan=None)
    resolved = resolve(spec, settings.datasets)
    pool, device = spec.resources.pool, spec.resources.device
    hardware = store.pool_hardware(pool, device)
    if hardware is not None:
        numbers = plan(resolved, hardware)
        if (live := store.live_nodes(pool, spec.resources.ranks_per_node)) < spec.resources.nodes:
            warning = f"pool {pool} has {live} live nodes of {spec.resources.nodes}; the job waits until more join"
            numbers = numbers.model_copy(update={"warnings": [*numbers.warnings, warning]})
        guess = estimate(resolved, numbers, hardware, settings, store)
        return Planned(spec=resolved, plan=numbers.model_copy(update={"estimate": guess}))
    numbers = plan(resolved, Hardware(device="cpu" if device == "auto" else device, ranks=ANY_RANKS))
    warning = f"pool {pool} has no live worker; the job waits until one joins, and may not fit it"
    return Planned(spec=resolved, plan=numbers.model_copy(update={"warnings": [*numbers.warnings, warning]}))


def _check_source(spec: PrepareSpec, settings: Settings) -> None:
    sources = settings.datasets / "sources"
    if spec.source.repo is None and not (sources / spec.source.path).exists():
        message = f"path {spec.source.path!r} is not in {sources}; put the text there, or use another path"
        raise SpecError([Problem(pointer="/source/path", message=message)])
