"""The command line against a real server."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from gptcore.control_characters import has_controls
from gptcore.events import Notice, Scored
from gptcore.plan import Hardware
from tests.api.server import FakeRun, Server, node, train_spec
from tests.trainmaster.conftest import run as command
from worker.job import JobError
from worker.store import Store


def test_results_that_are_no_numbers_are_shown_and_watched(server: Server, run: FakeRun) -> None:
    results = {"val_loss": math.nan, "acc": math.inf}
    run.write(Scored(step=3, task="val_loss", results=results, items=1, seconds=0.1))
    run.end(results=results)
    for verb in ("show", "watch"):
        done = command(verb, run.id, "--url", server.url)
        assert (done.returncode, done.stderr) == (0, "")
        assert "nan" in done.stdout and "inf" in done.stdout


def test_control_characters_of_others_do_not_reach_the_terminal(server: Server, run: FakeRun, store: Store) -> None:
    hostile = "a\x1b]0;title\x07b\x9b2Jc\x08d\u202ee"
    machine = node(1, name="other")
    slot = machine.slots[0].model_copy(update={"hardware": Hardware(ranks=1, device_name=hostile)})
    store.register_node(machine.model_copy(update={"slots": [slot]}))
    run.write(Notice(message=hostile))
    run.log_file.write_text(f"first {hostile}\nlast\n")
    run.end("failed", error=JobError(reason="crash", message=hostile, log=[hostile]))
    for verb in (["show", run.id], ["watch", run.id], ["logs", run.id], ["workers"], ["show", hostile]):
        done = command(*verb, "--url", server.url)
        shown = done.stdout + done.stderr
        assert "\\x1b]0;title" in shown, (verb, shown)
        assert not has_controls(shown.replace("\n", "").replace("\t", "")), (verb, shown)


def test_only_what_failed_or_was_cancelled_is_continued(server: Server, new_run: Callable[..., FakeRun]) -> None:
    run = new_run()
    refused = command("continue", run.id, "--url", server.url)
    assert (refused.returncode, refused.stderr) == (
        1,
        f"{run.id} is running; pause and resume it, or cancel it first\n",
    )
    run.end()
    refused = command("continue", run.id, "--url", server.url)
    said, _, more = refused.stderr.partition("submit ")
    assert said == f"{run.id} is succeeded; for N steps "
    assert json.loads(more)["overrides"]["init_from"] == {"source": run.id, "optimizer": True}
    failed = new_run()
    failed.end("failed")
    assert "has no checkpoint yet" in command("continue", failed.id, "--url", server.url).stderr


def test_what_a_plan_warns_of_is_said_when_a_job_is_submitted(server: Server, tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(json.dumps(train_spec(evaluate={"every_steps": 4})))
    done = command("submit", str(tmp_path / "spec.json"), "--url", server.url, "--json")
    said = "pool default has no live worker; the job waits until one joins, and may not fit it"
    assert (done.returncode, done.stderr) == (0, f"warning: {said}\n")
    assert json.loads(done.stdout)["status"] == "queued"


@pytest.mark.parametrize("job", ["../healthz", "job-0?x=1", "job-0#x"])
def test_an_id_is_no_path(server: Server, job: str) -> None:
    done = command("show", job, "--url", server.url)
    assert done.returncode == 1 and job in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_what_a_list_may_be_asked_for_is_said_before_it_is_asked() -> None:
    for wrong, right in (("--limit=101", "equal to 100"), ("--kind=trian", "'train'")):
        done = command("list", wrong)
        assert done.returncode == 2 and right in done.stderr, done.stderr
