"""A `prepare` job as a process: `python -m gptcore.prepare RUN_DIR --attempt N`."""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

from gptcore.dataset import Dataset
from gptcore.events import Finished, PhaseChanged, Report, Started, Stopped
from gptcore.failure import report_failure
from gptcore.locks import shared
from gptcore.log import reporter
from gptcore.prepare import adopt_shards, prepare
from gptcore.procs import die_with_parent
from gptcore.rundir import Attempt, RunDir, datasets_root
from gptcore.sources import Source, hub_files, jsonl_files, parquet_files, text_files
from gptcore.spec import PrepareSpec, SourceSpec, read_spec

REPORT_EVERY_SECONDS = 1.0


class Told(Exception):
    """The stop file appeared; what is done so far is kept."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gptcore.prepare", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    arguments = parser.parse_args(argv)
    die_with_parent()
    run = RunDir(arguments.run_dir.absolute())
    attempt = run.attempt(arguments.attempt)
    with shared(attempt.lock):
        report = reporter(attempt, first=True)
        try:
            spec = read_spec(run.spec)
            assert isinstance(spec, PrepareSpec), f"a {spec.kind} job came to prepare"
            _run(spec, attempt, report)
        except Told as told:
            report(Stopped.model_validate({"step": 0, "reason": str(told)}))
        except (KeyboardInterrupt, Exception) as error:
            report_failure(error, 0, attempt, report)
            raise
    return 0


def _run(spec: PrepareSpec, attempt: Attempt, report: Report) -> Dataset:
    began = last = time.monotonic()
    report(
        Started(
            kind="prepare", device="cpu", device_name="cpu", world_size=1, threads=1, precision="", compiled=False,
            micro_batch_size=0, grad_accum_steps=0, parameters=0, total_steps=0, tokens_per_step=0,
            versions={"python": platform.python_version()},
        )
    )  # fmt: skip

    def progress(documents: int, tokens: int) -> None:
        nonlocal last
        if attempt.stop.exists():
            raise Told(attempt.stop.read_text().strip())
        if time.monotonic() - last >= REPORT_EVERY_SECONDS:
            last = time.monotonic()
            share = tokens / spec.max_tokens if spec.max_tokens else None
            report(
                PhaseChanged(phase="preparing", message=f"{documents:,} documents, {tokens:,} tokens", progress=share)
            )

    report(PhaseChanged(phase="preparing"))
    if spec.source.format == "shards":
        folder = datasets_root() / "sources" / spec.source.path
        dataset = adopt_shards(datasets_root(), spec.dataset, folder, spec.tokenizer)
    else:
        dataset = prepare(
            datasets_root(), spec.dataset, open_source(spec.source), spec.tokenizer,
            val_fraction=spec.val_fraction, max_tokens=spec.max_tokens, shard_tokens=spec.shard_tokens,
            progress=progress,
        )  # fmt: skip
    report(Finished(tokens=dataset.train.tokens + dataset.val.tokens, seconds=time.monotonic() - began))
    return dataset


def open_source(source: SourceSpec) -> Source:
    """The documents a spec names; its paths lie in the datasets root's `sources/`."""
    if source.repo is not None:
        return hub_files(source.repo, source.path, source.field)
    path = datasets_root() / "sources" / source.path
    if source.format == "text":
        return text_files([path])
    return (jsonl_files if source.format == "jsonl" else parquet_files)([path], source.field)
