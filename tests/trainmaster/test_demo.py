"""The demo, whole: the project's main promise."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.trainmaster.conftest import Start, line, processes_of, run
from trainmaster import Client

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_demo_trains_a_model_that_transformers_loads_and_leaves_only_its_run(start: Start, home: Path) -> None:
    demo = start("demo", "--json")
    answer = json.loads(line(demo, "{"))
    assert demo.wait(30) == 0
    assert not processes_of(home)
    assert answer["status"] == "succeeded"
    assert answer["val_loss_best"] < 1.80 < answer["val_loss_first"]
    assert answer["tokens_per_second"] > 0
    assert answer["sample"].startswith("def ")
    assert (Path(answer["export_dir"]) / "model.safetensors").is_file()

    up = start("up", "--port", "0")
    url = line(up, "trainmaster is up at ").split()[4]
    job = json.loads(run("show", answer["job_id"], "--json", "--url", url).stdout)
    assert job["status"] == "succeeded"
    assert job["best_checkpoint"]["val_loss"] == answer["val_loss_best"]


def test_ctrl_c_in_the_middle_of_the_demo_cancels_it_and_leaves_no_process(start: Start, home: Path) -> None:
    demo = start("demo")
    job_id = line(demo, "job-").split(":")[0]
    line(demo, "  step 50: ")
    demo.send_signal(signal.SIGINT)
    said = demo.communicate(timeout=60)[0]
    assert demo.returncode == 130, said
    assert "Traceback" not in said
    assert not processes_of(home)

    up = start("up", "--port", "0")
    with Client(line(up, "trainmaster is up at ").split()[4]) as client:
        *_, stopped, cancelled = client.events(job_id)
        assert (stopped["type"], cancelled["to_status"]) == ("stopped", "cancelled")
        assert client.job(job_id)["status"] == "cancelled"
