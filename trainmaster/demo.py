"""`trainmaster demo`: a small GPT trained on this machine, from nothing to a model that loads anywhere."""

import json
import os
import signal
import statistics
import subprocess
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from gptcore.procs import die_with_parent, python_module
from gptcore.rundir import RunDir
from trainmaster.client import Client, TrainmasterError
from trainmaster.stack import Stack, interruptible
from trainmaster.tables import facts
from trainmaster.terminal import Terminal
from trainmaster.watch import INTERRUPTED, follow
from worker.settings import Settings

SPEC = Path(__file__).parent.parent / "examples" / "demo.json"
# a table of byte pairs reaches 2.45 nats a byte on this text, of triples 1.83
VAL_LOSS_LIMIT = 1.80


class Result(BaseModel, frozen=True):
    """What --json prints. Losses in nats a byte; null: not known."""

    job_id: str
    status: str
    val_loss_first: float | None
    val_loss_best: float | None
    tokens_per_second: float | None
    export_dir: str | None
    sample: str | None
    seconds: float


def run_demo(settings: Settings, url: str | None, own_redis: bool, as_json: bool) -> int:
    """Run the demo on a stack of its own, or on the server at `url` → exit code.

    0 only where the job succeeded, its validation loss is below the limit, and its export loaded.
    On another machine's server the export is out of reach; then it need only have been written.
    """
    began = time.monotonic()
    console = Terminal(stderr=as_json)
    try:
        with interruptible(), ExitStack() as left:
            watched: AbstractContextManager[None] = nullcontext()
            if url is None:
                console.print("starting Redis, the API and a worker")
                # nobody else is to reach it, whatever name this machine's server has
                local = replace(settings, url="", hosts=())
                stack = left.enter_context(Stack(local, own_redis=own_redis))
                url, watched = stack.url, stack.watched()
            client = left.enter_context(Client(url))
            with watched:
                job = _train(client, console)
            result, problem = _result(client, job, settings, began)
    except KeyboardInterrupt:
        console.print("interrupted: the job is cancelled, nothing is left running")
        return INTERRUPTED
    if as_json:
        typer.echo(json.dumps(result.model_dump(mode="json")))
    else:
        _print(result, console)
    if problem:
        console.print(problem, markup=False, style="red", soft_wrap=True)
    return 1 if problem else 0


def _train(client: Client, console: Console) -> dict[str, Any]:
    """Submit the demo's spec and follow it → the job as it ended."""
    job = client.submit(json.loads(SPEC.read_text("utf-8")))
    console.print(f"{job['id']}: {SPEC.parent.name}/{SPEC.name}, {client.url}/")
    try:
        follow(client.events(job["id"]), job, console)
    except KeyboardInterrupt:
        with suppress(TrainmasterError):  # the server may be gone already
            client.cancel(job["id"])
        raise
    return client.job(job["id"])


def _result(client: Client, job: dict[str, Any], settings: Settings, began: float) -> tuple[Result, str]:
    """The result, and what is wrong with it: "" where the demo did what it should."""
    series = client.metrics(job["id"])["series"]
    losses, speeds = (series[key]["value"] for key in ("val_loss", "tokens_per_second"))
    export = RunDir(settings.runs / job["id"]).export
    sample, problem = None, ""
    if job["status"] != "succeeded":
        error = job["error"] or {"message": job["status_reason"], "log": []}
        problem = "\n".join([f"the job {job['status']}: {error['message']}", *error["log"]])
    elif min(losses) >= VAL_LOSS_LIMIT:
        problem = f"best validation loss {min(losses):.3f} is not below {VAL_LOSS_LIMIT:.2f} nats a byte"
    elif export.is_dir():
        sample, problem = _load_and_sample(export)
    result = Result(
        job_id=job["id"], status=job["status"],
        val_loss_first=losses[0] if losses else None, val_loss_best=min(losses, default=None),
        tokens_per_second=round(statistics.median(speeds), 1) if speeds else None,
        export_dir=str(export) if export.is_dir() else None, sample=sample,
        seconds=round(time.monotonic() - began, 1),
    )  # fmt: skip
    return result, problem


def _load_and_sample(export: Path) -> tuple[str | None, str]:
    """A sample by stock transformers in a process of its own, or why there is none."""
    parent = os.getpid()
    command = python_module("trainmaster.cli", "sample", str(export), "--prompt=def ", "--json")
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", start_new_session=True,
        preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent),
    )  # fmt: skip
    if done.returncode != 0:
        return None, f"transformers did not load {export}:\n{done.stderr.strip()}"
    return str(json.loads(done.stdout.splitlines()[-1])["sample"]), ""


def _print(result: Result, console: Console) -> None:
    first, best, speed = result.val_loss_first, result.val_loss_best, result.tokens_per_second
    rows = [
        ("job", f"{result.job_id} {result.status} in {result.seconds:.0f} s"),
        ("validation loss", f"{first:.3f} → {best:.3f} nats a byte" if first and best else "none"),
        ("speed", f"{speed:,.0f} tokens a second" if speed else "unknown"),
        ("model", result.export_dir or "on the server; its folder cannot be read from here"),
        ("see it again", f"make up, then http://127.0.0.1:8000 or trainmaster show {result.job_id}"),
    ]
    console.print(facts("demo", rows))
    if result.sample is not None:
        console.print(Panel(Text(result.sample), title="a sample, by stock transformers", title_align="left"))
