"""An `eval` job as a process, one a rank: `torchrun -m gptcore.eval_job RUN_DIR --attempt N`.

val_loss and HellaSwag are computed here, shared by the ranks; lm-evaluation-harness's tasks by its own
`hf` model on the exported folder, in the first rank, once the others have left.
"""

import importlib.util
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gptcore.data import Windows
from gptcore.dataset import read_dataset
from gptcore.dist import Dist, close, start
from gptcore.evaluate import bits_per_byte, val_windows, validation_loss
from gptcore.events import Finished, PhaseChanged, Scored
from gptcore.export import export_model
from gptcore.hellaswag import evaluate, load_items_together
from gptcore.job_process import Process, run_job
from gptcore.native import native_class
from gptcore.rundir import datasets_root, write_atomically
from gptcore.scorer import Scorer
from gptcore.spec import EvalSpec, refusal
from gptcore.subject import HubFolder, Trained, find_subject
from gptcore.tokenizer import PROBE, tokenizer_difference

HARNESS = "lm_eval:"
LONGEST_WINDOW = 1024  # of val_loss for models of others, whose contexts may be huge


def main(argv: list[str] | None = None) -> int:
    return run_job(EvalSpec, _run, argv)


def _run(process: Process[EvalSpec]) -> Finished | None:
    began, spec = time.monotonic(), process.spec
    dist = start(spec.resources.device)
    process.started("eval", dist.device.type, dist.world_size)
    process.report(PhaseChanged(phase="preparing"))
    subject = find_subject(spec, process.run.path.parent, datasets_root())
    ours = [task for task in spec.tasks if not task.startswith(HARNESS)]
    theirs = [task for task in spec.tasks if task.startswith(HARNESS)]
    manager = _task_manager(theirs, subject) if theirs and dist.first else None
    step = subject.checkpoint.step if isinstance(subject, Trained) else 0
    folder = subject.path if isinstance(subject, HubFolder) else process.run.path / "model"
    if theirs and dist.first and isinstance(subject, Trained):  # a run in training may drop the checkpoint by then
        export_model(folder, subject.spec.model, subject.checkpoint.weights(), subject.tokenizer)
    process.report(PhaseChanged(phase="evaluating"))
    scored = []
    if ours:
        scorer = subject.scorer(dist.device)
        for task in ours:
            scored.append(_score(task, process, subject, scorer, dist, step))
            process.report(scored[-1])
    close()
    if not dist.first:
        return None
    if theirs:
        for task in theirs:
            process.heed()
            scored.append(_run_harness(task, manager, folder, spec.limit, dist, step))
            process.report(scored[-1])
        if isinstance(subject, Trained):
            shutil.rmtree(folder)
    if isinstance(subject, Trained):
        # what the model card shows, beside the run that it is about
        path = subject.run.evaluations / f"{process.run.path.name}.json"
        write_atomically(path, json.dumps([event.model_dump(mode="json") for event in scored], indent=2))
    return Finished(step=step, seconds=time.monotonic() - began)


def _score(
    task: str, process: Process[EvalSpec], subject: Trained | HubFolder, scorer: Scorer, dist: Dist, step: int
) -> Scored:
    if task == "val_loss":
        return _score_val_loss(process.spec, subject, scorer, dist, step, process.is_stopped)
    examples = int(task.partition("@")[2] or 0)
    try:
        items = load_items_together(datasets_root(), "validation", dist)[: process.spec.limit]
        pool = load_items_together(datasets_root(), "train", dist) if examples else []
    except FileNotFoundError as error:
        raise refusal("/tasks", str(error)) from error
    return evaluate(items, scorer, dist, step, examples, pool, process.is_stopped)


@torch.no_grad()
def _score_val_loss(
    spec: EvalSpec, subject: Trained | HubFolder, scorer: Scorer, dist: Dist, step: int,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Scored:  # fmt: skip
    began, trained = time.perf_counter(), subject.spec if isinstance(subject, Trained) else None
    name = spec.dataset or (trained.data.dataset if trained else None)
    if name is None:
        raise refusal("/dataset", "dataset is missing: val_loss of a Hub folder needs one")
    dataset = read_dataset(datasets_root(), name)
    if dataset is None:
        raise refusal("/dataset", f"dataset {name!r} is not prepared on this machine; trainmaster prepare makes it")
    if difference := tokenizer_difference(scorer.encode(PROBE), dataset.tokenizer):
        raise refusal("/dataset", f"dataset {name!r} has another tokenizer than the model: {difference}")
    windows = Windows(datasets_root() / name, dataset.val, min(scorer.block_size, LONGEST_WINDOW)
                      if trained is None else scorer.block_size)  # fmt: skip
    if not windows.count:
        raise refusal("/dataset", f"no shard of dataset {name!r} to validate on holds {windows.block_size + 1} tokens")
    asked = spec.eval_tokens or (trained.evaluate.eval_tokens if trained else 10_485_760)
    batch = max(1, scorer.most_tokens // windows.block_size)
    val_loss = validation_loss(scorer.loss, windows, asked, batch, dist, is_stopped)
    of = f":{name}" if trained and name != trained.data.dataset else ""
    results = {
        f"val_loss{of}": val_loss,
        f"bits_per_byte{of}": bits_per_byte(val_loss, windows, asked, dataset.tokenizer),
    }
    count = val_windows(windows, asked)
    return Scored(step=step, task=f"val_loss{of}", results=results, items=count, seconds=time.perf_counter() - began)


# ---- lm-evaluation-harness


def _task_manager(asked: list[str], subject: Trained | HubFolder) -> Any:
    """The harness's, which knows all that is asked. Also YAML files in the datasets folder's `lm_eval/` are tasks."""
    if isinstance(subject, Trained):
        name, reason = native_class(subject.spec.model)
        if name is None:
            raise refusal("/source", f"lm_eval needs an exported model, which this one cannot be: {reason}")
    if importlib.util.find_spec("lm_eval") is None:
        raise refusal("/tasks", "lm-evaluation-harness is not on this worker; pip install 'lm-eval[hf]'")
    from lm_eval.tasks import TaskManager

    own = datasets_root() / "lm_eval"
    manager = TaskManager(include_path=str(own) if own.is_dir() else None)
    unknown = [task for task in asked if not manager.match_tasks([_harness_name(task)])]
    if unknown:
        message = f"lm-evaluation-harness knows no {', '.join(unknown)}; lm_eval ls tasks lists what there is"
        raise refusal("/tasks", message)
    return manager


def _harness_name(task: str) -> str:
    return task.removeprefix(HARNESS).partition("@")[0]


def _run_harness(task: str, manager: Any, folder: Path, limit: int | None, dist: Dist, step: int) -> Scored:
    import lm_eval

    began, examples = time.perf_counter(), task.partition("@")[2]
    model = {
        "pretrained": str(folder), "dtype": "float32", "trust_remote_code": False, "attn_implementation": "sdpa"
    }  # fmt: skip
    answer = lm_eval.simple_evaluate(
        model="hf", model_args=model, tasks=[_harness_name(task)],
        num_fewshot=int(examples) if examples else None, limit=limit, task_manager=manager,
        device=dist.device.type, batch_size="auto" if dist.device.type == "cuda" else 8, log_samples=False,
    )  # fmt: skip
    results: dict[str, float] = {}
    stderr: dict[str, float] = {}
    for name, found in answer["results"].items():
        for metric, value in found.items():
            kind, _, how = metric.partition(",")
            if isinstance(value, str) or not how:  # its name, "N/A", a count
                continue
            label = f"{HARNESS}{name}/{kind.removesuffix('_stderr')}" + (f",{how}" if how != "none" else "")
            label += f"@{examples}" if examples else ""
            (stderr if kind.endswith("_stderr") else results)[label] = float(value)
    count = sum(n["effective"] for n in answer["n-samples"].values())
    return Scored(
        step=step, task=task, results=results, stderr=stderr, items=count, seconds=time.perf_counter() - began
    )


if __name__ == "__main__":
    raise SystemExit(main())
