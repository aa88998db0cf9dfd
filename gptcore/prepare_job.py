"""A `prepare` job as a process: `python -m gptcore.prepare_job RUN_DIR --attempt N`."""

import time

from huggingface_hub.errors import HfHubHTTPError

from gptcore.dataset import refuse_reserved
from gptcore.events import Finished, PhaseChanged
from gptcore.failure import may_pass
from gptcore.job_process import Process, run_job
from gptcore.prepare import adopt_shards, begun_commit, prepare
from gptcore.rundir import datasets_root
from gptcore.sources import Source, hub_files, local_files
from gptcore.spec import PrepareSpec, refusal

REPORT_EVERY_SECONDS = 1.0


def main(argv: list[str] | None = None) -> int:
    return run_job(PrepareSpec, _run, argv)


def _run(process: Process[PrepareSpec]) -> Finished:
    spec, report = process.spec, process.report
    began = last = time.monotonic()
    process.started("prepare")

    def progress(documents: int, tokens: int) -> None:
        nonlocal last
        process.heed()
        if time.monotonic() - last >= REPORT_EVERY_SECONDS:
            last = time.monotonic()
            share = tokens / spec.max_tokens if spec.max_tokens else None
            said = f"{documents:,} documents, {tokens:,} tokens"
            report(PhaseChanged(phase="preparing", message=said, progress=share))

    report(PhaseChanged(phase="preparing"))
    refuse_reserved(spec.dataset, spec.source.format == "shards")
    try:
        if spec.source.format == "shards":
            folder = datasets_root() / "sources" / spec.source.path
            dataset = adopt_shards(datasets_root(), spec.dataset, folder, spec.tokenizer)
        else:
            dataset = prepare(
                datasets_root(), spec.dataset, _open_source(spec), spec.tokenizer,
                val_fraction=spec.val_fraction, max_tokens=spec.max_tokens, shard_tokens=spec.shard_tokens,
                progress=progress,
            )  # fmt: skip
    except (FileNotFoundError, ValueError) as error:  # which name what is wrong with the text
        raise refusal("/source", str(error)) from error
    except HfHubHTTPError as error:
        if may_pass(error):
            raise
        raise refusal("/source/repo", f"the Hub does not give {spec.source.repo} to this worker: {error}") from error
    return Finished(tokens=dataset.train.tokens + dataset.val.tokens, seconds=time.monotonic() - began)


def _open_source(spec: PrepareSpec) -> Source:
    """Return the documents that a spec names; its paths lie in the datasets root's `sources/`."""
    source, root = spec.source, datasets_root()
    if source.repo is not None:
        begun = begun_commit(root, spec.dataset, source.repo, source.path)
        return hub_files(source.repo, source.path, source.field, begun)
    return local_files(source.format, [root / "sources" / source.path], source.field)


if __name__ == "__main__":
    raise SystemExit(main())
