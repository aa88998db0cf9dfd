"""What a submitted spec comes to on the hardware there is, or why it cannot run."""

import json
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from api.estimate import estimate
from gptcore.dataset import refuse_reserved, tokenizer_of, tokenizer_of_checkpoint
from gptcore.init_check import (
    CONFIG_BYTES,
    TOKENIZER_BYTES,
    fetch_from_hub,
    refuse_another_config,
    refuse_another_tokenizer,
    refuse_another_vocabulary,
)
from gptcore.native import native_class
from gptcore.plan import Hardware, Plan, plan, refuse_another_run, resolve
from gptcore.rundir import RunDir
from gptcore.spec import (
    HUB_PREFIX,
    AnySpec,
    EvalSpec,
    InitSpec,
    PrepareSpec,
    PublishSpec,
    TrainSpec,
    children_of,
    refusal,
)
from worker.place import runs_root_id
from worker.settings import Settings
from worker.store import JobNotFound, Store

ANY_RANKS = 1 << 20  # nobody is there to say how many are too many


class Planned(BaseModel):
    spec: AnySpec = Field(description="resolved: presets expanded, everything explicit")
    plan: Plan | None = Field(description="the numbers that follow; null for jobs that train nothing")
    children: list[AnySpec] = Field([], description="the jobs that follow once it has succeeded")
    parent_job_id: str | None = Field(None, description="the job it is about")
    device: Literal["cpu", "cuda"] | None = Field(
        None, description="what it and its children run on if they say auto; null if the pool has no live worker"
    )


def real_path(path: Path) -> Path | None:
    """Where links lead; None where nothing is."""
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # names too long, links in a circle, a NUL
        return None


def is_inside(path: Path, root: Path) -> bool:
    real = real_path(path)
    return real is not None and real.is_relative_to(root.resolve())


def planned(spec: AnySpec, settings: Settings, store: Store) -> Planned:
    """Raises SpecError for what would fail once it ran."""
    if isinstance(spec, PrepareSpec):
        _check_source(spec, settings)
        return Planned(spec=spec, plan=None)
    if isinstance(spec, EvalSpec | PublishSpec):
        parent = _check_subject(spec, settings, store)
        hardware = store.pool_hardware(spec.resources.pool) if isinstance(spec, EvalSpec) else None
        return Planned(spec=spec, plan=None, parent_job_id=parent, device=hardware and hardware.device)
    resolved = resolve(spec, settings.datasets)
    pool, device = spec.resources.pool, spec.resources.device
    hardware = store.pool_hardware(pool, device, spec.resources.ranks_per_node)
    children = children_of(resolved)
    if resolved.init_from is not None:
        _check_init(resolved, resolved.init_from, settings)
    if resolved.publish is not None:
        _check_repo(resolved.publish.repo, "/publish/repo", pool, settings, store)
        _check_exportable(resolved, "/publish")
    guess, warnings = None, list[str]()
    if hardware is None:
        numbers = plan(resolved, Hardware(device="cpu" if device == "auto" else device, ranks=ANY_RANKS))
        warnings = [f"pool {pool} has no live worker; the job waits until one joins, and may not fit it"]
    else:
        numbers = plan(resolved, hardware)
        guess = estimate(resolved, numbers, hardware, settings, store)
        nodes, asked = store.live_nodes(pool), spec.resources
        large = sum(any(slot.hardware.ranks >= asked.ranks_per_node for slot in node.slots) for node in nodes)
        if large < asked.nodes:
            warnings.append(f"pool {pool} has {large} live nodes of {asked.nodes}; the job waits until more join")
        if all(node.runs_root not in ("", runs_root_id(settings)) for node in nodes):
            why = f"no worker of pool {pool} shares this server's TRAINMASTER_HOME, {settings.home}"
            warnings.append(f"{why}, so it will have no curves, logs, checkpoints or files of the run to show")
    numbers = numbers.model_copy(update={"warnings": [*numbers.warnings, *warnings], "estimate": guess})
    return Planned(spec=resolved, plan=numbers, children=children, device=hardware and hardware.device)


def _check_subject(spec: EvalSpec | PublishSpec, settings: Settings, store: Store) -> str | None:
    """Refuse what is known not to be there; the id of the job that it is about, once that has succeeded."""
    if isinstance(spec, PublishSpec):
        _check_repo(spec.repo, "/repo", spec.resources.pool, settings, store)
    if spec.source.startswith("hf://"):
        if isinstance(spec, PublishSpec):
            _refuse("/source", f"source {spec.source!r} is on the Hub already; publish takes a train job's id")
        return None
    _run_with_weights(spec.source, "/source", settings, exported_too=isinstance(spec, EvalSpec))
    try:
        job = store.get_job(spec.source)
    except JobNotFound:
        return None
    if job.spec.get("kind") == "train" and isinstance(spec, PublishSpec):
        _check_exportable(TrainSpec.model_validate(job.spec), "/source")
    return job.id if job.status == "succeeded" else None


def _check_init(spec: TrainSpec, init: InitSpec, settings: Settings) -> None:
    """Refuse first weights that are not there or do not fit. A Hub that does not answer soon is left to the trainer."""
    source, pointer = init.source, "/init_from/source"
    tokenizer = tokenizer_of(settings.datasets, spec.data.dataset)
    if source.startswith(HUB_PREFIX):
        read = partial(fetch_from_hub, source)
    else:
        run = _run_with_weights(source, pointer, settings, exported_too=True)
        if not (run.path / "config.json").exists():
            newest, step, _ = run.complete_checkpoints()[-1]
            meta = json.loads((newest / "state.json").read_text("utf-8"))
            refuse_another_run(spec, init, meta["spec"], step)
            refuse_another_tokenizer(source, tokenizer_of_checkpoint(settings.datasets, meta), spec, tokenizer)
            return
        read = partial(_read_inside, run.path, settings)
    if init.optimizer:
        _refuse(pointer, f"{source} is a Hub folder, which has no optimiser state; leave optimizer out")
    if (config := read("config.json", CONFIG_BYTES)) is not None:
        refuse_another_config(source, spec.model, config)
    if (vocabulary := read("tokenizer.json", TOKENIZER_BYTES)) is not None:
        refuse_another_vocabulary(source, vocabulary, spec, tokenizer)


def _read_inside(folder: Path, settings: Settings, name: str, limit: int) -> bytes | None:
    """A file of a folder in the runs root; None if it is not there, is larger than `limit` or lies elsewhere."""
    path = folder / name
    if not is_inside(path, settings.runs) or not path.is_file() or path.stat().st_size > limit:
        return None
    return path.read_bytes()


def _run_with_weights(source: str, pointer: str, settings: Settings, exported_too: bool) -> RunDir:
    folder = settings.runs / source
    if not is_inside(folder, settings.runs) or not folder.is_dir():
        _refuse(pointer, f"source {source!r} is no job with a run directory and no folder of {settings.runs}")
    run = RunDir(folder)
    if not (exported_too and (folder / "config.json").exists()) and not run.complete_checkpoints():
        _refuse(pointer, f"source {source!r} has no checkpoint yet; name a train job that has saved one")
    return run


def _check_repo(repo: str, pointer: str, pool: str, settings: Settings, store: Store) -> None:
    owner, nodes = repo.partition("/")[0], store.live_nodes(pool)
    _refuse(pointer, settings.refuses_repo(repo))
    if nodes and not any(node.publishes_as is None or owner in node.publishes_as for node in nodes):
        way_out = f"start one with HF_TOKEN and TRAINMASTER_HF_NAMESPACES={owner} in its environment, or publish later"
        _refuse(pointer, f"no live worker of pool {pool} publishes as {owner}; {way_out}")


def _check_exportable(spec: TrainSpec, pointer: str) -> None:
    name, reason = native_class(spec.model)
    _refuse(pointer, "" if name else f"no stock transformers class holds this model: {reason}")


def _refuse(pointer: str, message: str) -> None:
    if message:
        raise refusal(pointer, message)


def _check_source(spec: PrepareSpec, settings: Settings) -> None:
    refuse_reserved(spec.dataset, spec.source.format == "shards")
    sources = settings.datasets / "sources"
    if spec.source.repo is None and real_path(sources / spec.source.path) is None:
        message = f"path {spec.source.path!r} is not in {sources}; put the text there, or use another path"
        raise refusal("/source/path", message)
