"""The live server against its own description, by requests that nobody thought of.

FUZZ_EXAMPLES sets how many an operation; more than the default are for the hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gptcore.events import Sampled
from tests.api.server import FakeRun, Server, evaluated, node, step, train_spec
from tests.api.test_monitoring import numbers
from worker.keyring import KeyRing
from worker.settings import Settings
from worker.store import Store

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "3"))
DEEP = EXAMPLES > 10

CONFIG = """
headers = {{ Authorization = "Bearer {key}" }}
[checks]
# what a spec must fulfil beyond its schema (widths that divide, a dataset that exists) is refused with 422
positive_data_acceptance.expected-statuses = ["2xx", "404", "409", "422"]
"""
# These take the place also of ids that its own requests gave: where it makes jobs and then uses them (the stateful
# phase), each DELETE would be for the one job here, and the second one's 404 read as if a new job were not found.
PARAMETERS = """
[parameters]
"path.job_id" = "{run}"
"path.node_id" = "node"
"path.path" = "spec.json"
"query.job" = ["{run}", "{waiting}"]
[[operations]]
include-path-regex = "pause|resume"
parameters = {{ "path.job_id" = "{waiting}" }}
[[operations]]
include-method = "DELETE"
parameters = {{ "path.job_id" = "{ended}" }}
"""


@pytest.fixture
def live_node(store: Store) -> Iterator[None]:
    machine = node(*[1] * 60)
    store.register_node(machine)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(2):
            store.register_node(machine)

    thread = threading.Thread(target=beat)
    thread.start()
    yield
    over.set()
    thread.join()


def a_run(new_run: Callable[..., FakeRun]) -> str:
    run = new_run()
    run.write(step(1), step(2), evaluated(2, 2.5), Sampled(step=2, prompt="a", text="b"))
    run.log_file.write_text("a line\n")
    run.directory.spec.write_text(json.dumps(train_spec()))
    run.end()
    return run.id


def fuzz(server: Server, folder: Path, config: str, phases: str) -> None:
    file = folder / "schemathesis.toml"
    file.write_text(config)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(file), "run", "--phases", phases]
    options = ["--max-examples", str(EXAMPLES), "--checks", "all", "--continue-on-failure"]
    done = subprocess.run(
        [*command, *options, f"{server.url}/openapi.json"], capture_output=True, text=True, cwd=folder
    )
    print(done.stdout[-20_000:], done.stderr[-5000:])
    assert done.returncode == 0


@pytest.mark.usefixtures("live_node")
@pytest.mark.timeout(1800)
def test_the_server_does_what_its_description_says(
    server: Server, new_run: Callable[..., FakeRun], settings: Settings, tmp_path: Path
) -> None:
    waiting = server.http.post("/jobs", json=train_spec(resources={"pool": "other"})).json()["id"]
    ids = {"run": a_run(new_run), "ended": a_run(new_run), "waiting": waiting}
    key = KeyRing(settings.redis_url, settings.home).create("fuzz", "admin")[1]
    config = CONFIG.format(key=key)
    fuzz(server, tmp_path, config + PARAMETERS.format(**ids), "examples,fuzzing" + ",coverage" * DEEP)
    if DEEP:
        fuzz(server, tmp_path, config, "stateful")
    server.http.headers["Authorization"] = f"Bearer {key}"
    answered = [dict(labels) for name, labels in numbers(server.http) if name == "trainmaster_request_seconds_count"]
    well = {(a["method"], a["route"].replace(":path}", "}")) for a in answered if a["status"] < "300"}
    operations = {
        (method.upper(), path)
        for path, methods in server.http.get("/openapi.json").json()["paths"].items()
        for method in methods
    }
    assert operations - well == set()
