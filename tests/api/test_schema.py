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
from worker.store import Store

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "3"))

CONFIG = """
headers = {{ Authorization = "Bearer {key}" }}
[phases.stateful]
enabled = {deep}
[phases.coverage]
enabled = {deep}
[checks]
# what a spec must fulfil beyond its schema (widths that divide, a dataset that exists) is refused with 422
positive_data_acceptance.expected-statuses = ["2xx", "404", "409", "422"]
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
    store.register_node(node(*[1] * 60))
    over = threading.Event()

    def beat() -> None:
        while not over.wait(2):
            store.heartbeat("node")

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


@pytest.mark.usefixtures("live_node")
@pytest.mark.timeout(1800)
def test_the_server_does_what_its_description_says(
    server: Server, new_run: Callable[..., FakeRun], redis_url: str, tmp_path: Path
) -> None:
    waiting = server.http.post("/jobs", json=train_spec(resources={"pool": "other"})).json()["id"]
    ids = {"run": a_run(new_run), "ended": a_run(new_run), "waiting": waiting}
    key = KeyRing.connect(redis_url).create("fuzz", "admin")[1]
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG.format(key=key, deep=str(EXAMPLES > 10).lower(), **ids))
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    options = ["--max-examples", str(EXAMPLES), "--checks", "all", "--continue-on-failure"]
    done = subprocess.run(
        [*command, f"{server.url}/openapi.json", *options], capture_output=True, text=True, cwd=tmp_path
    )
    print(done.stdout[-20_000:], done.stderr[-5000:])
    assert done.returncode == 0
    server.http.headers["Authorization"] = f"Bearer {key}"
    answered = [dict(labels) for name, labels in numbers(server.http) if name == "trainmaster_request_seconds_count"]
    well = {(a["method"], a["route"].replace(":path}", "}")) for a in answered if a["status"] < "300"}
    operations = {
        (method.upper(), path)
        for path, methods in server.http.get("/openapi.json").json()["paths"].items()
        for method in methods
    }
    assert operations - well == set()
