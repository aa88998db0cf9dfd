"""A `publish` job as a process: export, gate, model card, upload. Safe to run again from any point."""

import time
from collections.abc import Callable
from typing import TypeVar

import httpx2
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from gptcore import gate
from gptcore.card import write_card
from gptcore.environment import hub_token
from gptcore.events import Exported, Finished, Notice, PhaseChanged, Published, Verified
from gptcore.export import export_model
from gptcore.failure import Mismatch, Unavailable, may_pass
from gptcore.hub_client import prepare_hub_client
from gptcore.job_process import Process, run_job
from gptcore.native import native_class
from gptcore.rundir import datasets_root
from gptcore.spec import PublishSpec, refusal
from gptcore.subject import Trained, find_subject

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PAUSES_SECONDS = (1, 2, 4, 8, 16)  # between tries where the Hub is away; then the job system makes a new attempt
Answer = TypeVar("Answer")


def main(argv: list[str] | None = None) -> int:
    return run_job(PublishSpec, _run, argv)


def _run(process: Process[PublishSpec]) -> Finished:
    began, spec, report = time.monotonic(), process.spec, process.report
    process.started("publish", gate.device().type)
    subject = find_subject(spec, process.run.path.parent, datasets_root())
    if not isinstance(subject, Trained):
        raise refusal("/source", f"source {spec.source} is a folder; give a job's id")
    name, reason = native_class(subject.spec.model)
    if name is None:
        raise refusal("/source", f"no stock transformers class holds it: {reason}")
    hub = _Hub(process)  # before the work: a token that cannot write is known now
    step = subject.checkpoint.step
    report(PhaseChanged(phase="exporting"))
    export_model(
        process.run.export, subject.spec.model, subject.checkpoint.weights(), subject.tokenizer, DTYPES[spec.dtype]
    )
    report(Exported(step=step, path=process.run.export.name, native_class=name))
    process.heed()
    report(PhaseChanged(phase="evaluating", message="comparing the export with the model"))
    checked = _verify(process, subject)
    process.heed()
    write_card(process.run.export, spec, subject, checked)
    report(PhaseChanged(phase="publishing"))
    report(hub.patiently(lambda: hub.upload(step)))
    return Finished(step=step, seconds=time.monotonic() - began)


def _verify(process: Process[PublishSpec], subject: Trained) -> str:
    """What was found equal. Raises Mismatch with the numbers; nothing has been uploaded then."""
    trained, run = subject.spec, process.run
    logged = subject.val_loss()
    if logged is None:
        message = f"step {subject.checkpoint.step} was never evaluated, so the export cannot be checked; name another"
        raise refusal("/step", message)
    asked = (trained.data.dataset, trained.evaluate.eval_tokens)
    ours = gate.look(subject.scorer(gate.device(), DTYPES[process.spec.dtype]), *asked)
    theirs = gate.look_from_outside(run.export, *asked, run.path / "outside.safetensors")
    if isinstance(theirs, str):
        numbers: dict[str, float] = {}
        problems = [f"stock transformers cannot load it: {theirs}"]
    else:
        numbers, problems = gate.compare(ours, theirs, logged)
        if not numbers["hellaswag_items"]:
            process.report(Notice(message="HellaSwag was left out of the comparison: its items are not here"))
    process.report(Verified(step=subject.checkpoint.step, numbers=numbers, problems=problems))
    if problems:
        raise Mismatch(f"the export is not the model that was trained, nothing was uploaded: {'; '.join(problems)}")
    return (
        f"the same tokens, logits within {gate.LOGITS_LIMIT:g} (relative to the largest, above 8), validation loss "
        f"within {gate.VAL_LOSS_LIMIT:g}, the same choice on {numbers['hellaswag_items']:g} HellaSwag items"
    )


class _Hub:
    """The worker's account. Raises SpecError for what the Hub refuses, Unavailable where it stays away."""

    def __init__(self, process: Process[PublishSpec]):
        self._process, self._repo = process, process.spec.repo
        try:
            prepare_hub_client()
            token = hub_token()
        except ValueError as error:
            raise refusal("/repo", str(error)) from error
        if not token:
            raise refusal(
                "/repo", "HF_TOKEN is not in the worker's environment; publishing needs a token that may write"
            )
        self._api = HfApi(token=token)
        found = self.patiently(self._api.whoami)
        if found.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise refusal("/repo", "the worker's HF_TOKEN may only read; publishing needs one that may write")

    def upload(self, step: int) -> Published:
        """One commit of what differs, none where nothing does; the tag follows it. So it may be done again."""
        repo, private, tag = self._repo, self._process.spec.private, f"step-{step}"
        self._api.create_repo(repo, private=private, exist_ok=True)
        # scores of an earlier model would stand beside this one's weights
        stale = [".eval_results/hellaswag.yaml"]
        message = f"Step {step} of {self._process.spec.source}"
        self._api.upload_folder(
            repo_id=repo, folder_path=self._process.run.export, commit_message=message, delete_patterns=stale
        )
        commit = str(self._api.model_info(repo).sha)
        tags = {ref.name: ref.target_commit for ref in self._api.list_repo_refs(repo).tags}
        if tag in tags and tags[tag] != commit:
            self._api.delete_tag(repo, tag=tag)
        if tags.get(tag) != commit:
            self._api.create_tag(repo, tag=tag, revision=commit, exist_ok=True)
        url = f"{self._api.endpoint}/{repo}"
        return Published(step=step, repo=repo, commit=commit, tag=tag, url=url, private=private)

    def patiently(self, call: Callable[[], Answer]) -> Answer:
        for pause in (*PAUSES_SECONDS, None):
            self._process.heed()
            try:
                return call()
            except (HfHubHTTPError, httpx2.TransportError, RuntimeError) as error:
                problem = _cause(error)
            if isinstance(problem, HfHubHTTPError) and not may_pass(problem):
                status = problem.response.status_code
                raise refusal("/repo", f"the Hub refuses {self._repo} with {status}: {problem}") from problem
            if pause is None:
                raise Unavailable(f"the Hub does not take {self._repo}: {problem}") from problem
            self._process.report(Notice(level="warning", message=f"the Hub is away, trying again: {problem}"))
            time.sleep(pause)
        raise AssertionError("the last try returns or raises")


def _cause(error: BaseException) -> BaseException:
    """The answer or broken connection behind an error; of an upload that failed, the client makes a RuntimeError."""
    found: BaseException | None = error
    while not isinstance(found, HfHubHTTPError | httpx2.TransportError):
        if found is None:
            raise error
        found = found.__cause__
    return found


if __name__ == "__main__":
    raise SystemExit(main())
