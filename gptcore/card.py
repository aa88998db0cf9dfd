"""The model card, and the files beside it that say how the model was made. The same run gives the same bytes."""

import json
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData
from huggingface_hub import eval_result_entries_to_yaml as entries_to_yaml

from gptcore.dataset import Dataset, read_dataset
from gptcore.events import Evaluated, Scored, Started, Step
from gptcore.hellaswag import REPO
from gptcore.native import native_class
from gptcore.plan import count_parameters
from gptcore.rundir import RunDir, datasets_root
from gptcore.spec import PublishSpec
from gptcore.subject import Trained

SHARDS_SHOWN = 4


def write_card(folder: Path, spec: PublishSpec, subject: Trained, checked: str) -> None:
    """README.md, .eval_results/, loss.png, trainmaster.json (the spec), dataset.json (every shard's sha256)."""
    dataset = read_dataset(datasets_root(), subject.spec.data.dataset)
    assert dataset is not None
    scored = _scored(subject)
    (folder / "trainmaster.json").write_text(subject.spec.model_dump_json(indent=2) + "\n", "utf-8")
    (folder / "dataset.json").write_text(dataset.model_dump_json(indent=2) + "\n", "utf-8")
    draw_loss(subject.run, folder / "loss.png")
    entries = [
        EvalResultEntry(dataset_id=REPO, task_id="default", value=round(100 * value, 2), notes=_notes(name))
        for event in scored
        for name, value in event.results.items()
        if name.startswith("hellaswag")
    ]
    if entries:
        (folder / ".eval_results").mkdir(exist_ok=True)
        text = yaml.safe_dump(entries_to_yaml(entries), sort_keys=False)
        (folder / ".eval_results" / "hellaswag.yaml").write_text(text, "utf-8")
    (folder / "README.md").write_text(_card(spec, subject, dataset, scored, checked), "utf-8")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _scored(subject: Trained) -> list[Scored]:
    """Results at this step, in training and by eval jobs since; of a task scored twice the later ones."""
    found = [e for e in subject.run.events() if isinstance(e, Scored)]
    for path in sorted(subject.run.evaluations.glob("*.json")):
        found += [Scored.model_validate(event) for event in json.loads(path.read_text("utf-8"))]
    latest = {e.task: e for e in sorted(found, key=lambda e: e.time) if e.step == subject.checkpoint.step}
    return [latest[task] for task in sorted(latest)]


def _notes(name: str) -> str:
    if name == "hellaswag_completion":
        return "0-shot, log-probability per token (llm.c's convention)"
    return f"{name.partition('@')[2] or 0}-shot acc_norm (lm-evaluation-harness's convention)"


def draw_loss(run: RunDir, path: Path) -> None:
    """Training and validation loss over the steps, as a picture."""
    from matplotlib.figure import Figure

    steps = {e.step: e.train_loss for e in run.events() if isinstance(e, Step)}
    evaluated = {e.step: e.val_loss for e in run.events() if isinstance(e, Evaluated)}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(sorted(steps), [steps[step] for step in sorted(steps)], linewidth=0.7, label="training")
    axes.plot(sorted(evaluated), [evaluated[step] for step in sorted(evaluated)], marker=".", label="validation")
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _hardware(run: RunDir) -> tuple[str, float, str]:
    """What it ran on, the hours of all ranks in all attempts, and the versions of the last attempt."""
    hours, device, versions = 0.0, "", ""
    by_attempt: Any = groupby(run.events(), key=attrgetter("attempt"))
    for events in (list(group) for _, group in by_attempt):
        started = [e for e in events if isinstance(e, Started)]
        if started:
            first = started[0]
            hours += first.world_size * (events[-1].time - events[0].time).total_seconds() / 3600
            device = f"{first.world_size} × {first.device_name} ({first.device}), {first.precision}"
            versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    return device, hours, versions


def _front_matter(spec: PublishSpec, subject: Trained, dataset: Dataset, scored: list[Scored]) -> str:
    name = spec.repo.partition("/")[2]
    results = [
        EvalResult(
            task_type="text-generation", dataset_type=REPO if event.task.startswith("hellaswag") else event.task,
            dataset_name=event.task, metric_type=metric, metric_value=round(value, 6), metric_name=metric,
        )
        for event in scored
        for metric, value in event.results.items()
    ]  # fmt: skip
    results.append(
        EvalResult(
            task_type="text-generation", dataset_type=dataset.name, dataset_name=f"{dataset.name}, validation split",
            metric_type="loss", metric_value=round(subject.val_loss() or 0.0, 6), metric_name="validation loss",
        )
    )  # fmt: skip
    origin = subject.spec.init_from.source if subject.spec.init_from else ""
    base = origin.removeprefix("hf://").partition("@")[0] if origin.startswith("hf://") else None
    data = ModelCardData(
        license=spec.license, library_name="transformers", pipeline_tag="text-generation", tags=["trainmaster"],
        model_name=name, eval_results=results, base_model=base,
    )  # fmt: skip
    return str(data.to_yaml())


def _card(spec: PublishSpec, subject: Trained, dataset: Dataset, scored: list[Scored], checked: str) -> str:
    trained, model, state = subject.spec, subject.spec.model, subject.checkpoint.state()
    optim, native = trained.optim, native_class(trained.model)[0]
    device, hours, versions = _hardware(subject.run)
    parameters = count_parameters(model).exported
    architecture = [
        ("class", f"`{native}`"), ("parameters", f"{parameters:,}"), ("layers", model.n_layer),
        ("width", model.n_embd), ("query heads", model.n_head), ("key/value heads", model.n_kv_head),
        ("MLP", f"{model.mlp}, {model.n_hidden} wide"), ("norm", model.norm), ("positions", model.position),
        ("context", f"{model.block_size} tokens"), ("vocabulary", f"{model.vocab_size} ({dataset.tokenizer})"),
        ("embeddings", "tied" if model.tie_embeddings else "untied"), ("weights", spec.dtype),
    ]  # fmt: skip
    recipe = [
        ("tokens", f"{state.tokens:,} ({state.tokens / parameters:.1f} a parameter)"),
        ("steps", f"{state.step:,} of {trained.max_steps:,}, {trained.tokens_per_step:,} tokens each"),
        ("optimiser", f"{optim.name}, lr {optim.lr:g} to {optim.min_lr:g}, {optim.schedule}, "
                      f"{optim.warmup_steps} warm-up steps"),
        ("weight decay, clipping", f"{optim.weight_decay:g}, {optim.grad_clip}"), ("seed", trained.seed),
        ("hardware", device), ("device hours", f"{hours:.3f}"), ("software", versions),
    ]  # fmt: skip
    results: list[tuple[str, object]] = [("validation loss", f"{subject.val_loss():.4f} nats a token")]
    for event in scored:
        for name, value in event.results.items():
            error = f" ± {event.stderr[name]:.4f}" if name in event.stderr else ""
            results.append((f"`{name}`", f"{value:.4f}{error} ({event.items} items)"))
    began = f", beginning with the weights of {trained.init_from.source}" if trained.init_from else ""
    shards = [*dataset.val.shards, *dataset.train.shards]
    hashes = [(f"`{shard.file}`", f"{shard.tokens:,} tokens, sha256 `{shard.sha256}`") for shard in shards]
    more = f"\n`dataset.json` has all {len(shards)}.\n" if len(shards) > SHARDS_SHOWN else ""
    return f"""---
{_front_matter(spec, subject, dataset, scored)}
---

# {spec.repo.partition("/")[2]}

A GPT trained by Trainmaster on {dataset.source}{began}; the weights are those of step {state.step}.

```python
from transformers import pipeline

generate = pipeline("text-generation", "{spec.repo}")
print(generate("Once upon a time", max_new_tokens={min(100, model.block_size // 2)})[0]["generated_text"])
```

## Results

{_table("what", "value", results)}
![training and validation loss](loss.png)

## Architecture

{_table("", "", architecture)}
## Training

{_table("", "", recipe)}
## Data

`{dataset.name}`: {dataset.source}; {dataset.train.tokens:,} tokens to train on, {dataset.val.tokens:,} to validate.

{_table("shard", "", hashes[:SHARDS_SHOWN])}{more}
## Reproduce

`trainmaster.json` is the job's exact spec:

```sh
trainmaster submit hf://{spec.repo}
```

Before the upload, stock `transformers` loaded this folder in a process of its own and was compared with
the model that was trained: {checked}.

## Limitations

A base model: it continues text as its training data would, true or not, and has no safeguards.
"""


def _table(left: str, right: str, rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {left} | {right} |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]
    return "\n".join(lines) + "\n"
