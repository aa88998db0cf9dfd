"""Models that are there already: what they write, and how they were made."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gptcore.export import export_model
from tests.gptcore.conftest import randomised, tiny_model
from tests.gptcore.hub_models import ModelHub, Repo
from tests.trainmaster.conftest import Start, run
from tests.trainmaster.test_cli import demo_spec


@pytest.fixture
def repos(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Repo]]:
    """The repositories of a Hub that the command line's environment names."""
    repos: dict[str, Repo] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHub", (ModelHub,), {"repos": repos}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield repos
    server.shutdown()
    server.server_close()


def test_a_published_models_spec_is_read_from_its_repository(home: Path, repos: dict[str, Repo]) -> None:
    spec: dict[str, Any] = json.loads(demo_spec(publish={"repo": "me/tiny"}))
    repos["me/tiny"] = Repo(private=False)
    repos["me/tiny"].commits.append(("1" * 40, {"trainmaster.json": json.dumps(spec).encode()}))
    planned = json.loads(run("plan", "hf://me/tiny", "--json").stdout)["spec"]
    assert planned["publish"] is None  # made again, it does not overwrite the first
    assert planned["optim"]["lr"] == spec["optim"]["lr"] and planned["max_steps"] == spec["max_steps"]


def test_a_repository_without_a_spec_is_named(home: Path, repos: dict[str, Repo]) -> None:
    repos["me/empty"] = Repo(private=False)
    done = run("submit", "hf://me/empty")
    assert done.returncode == 1 and "404" in done.stderr and "trainmaster.json" in done.stderr
    repos["me/empty"].commits.append(("1" * 40, {"trainmaster.json": b"[1]"}))
    done = run("submit", "hf://me/empty")
    assert done.returncode == 1 and "is not a JSON object, so it holds no spec" in done.stderr


@pytest.mark.slow
def test_a_model_writes_as_it_goes_on_from_the_prompt(home: Path, start: Start) -> None:
    model = randomised(tiny_model("llama", vocab_size=256, block_size=1024))
    export = home / "runs" / "job-1" / "export"
    export.parent.mkdir(parents=True)
    export_model(export, model.spec, {k: p.detach() for k, p in model.named_parameters()}, "bytes")
    process = start("sample", "job-1", "--prompt", "def f(x): ", "--max-tokens", "900")
    assert process.stdout is not None
    assert process.stdout.read(4) == "def "
    assert process.poll() is None  # it is still writing
    assert len(process.stdout.read()) > 300 and process.wait(60) == 0
    again = [run("sample", str(export), "--max-tokens", "20", "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert again[0] == again[1] != again[2]


def test_a_prompt_counts_though_more_is_asked_for_than_the_context_holds(tmp_path: Path) -> None:
    model = randomised(tiny_model("llama", vocab_size=256, block_size=32))
    export_model(tmp_path / "e", model.spec, {k: p.detach() for k, p in model.named_parameters()}, "bytes")
    prompt = "def f(x): return"
    code = (
        "import json, sys; from trainmaster.sample import main\n"
        "for prompt, most in json.loads(sys.argv[2]): main(sys.argv[1], prompt, most, 0.0, 0, as_json=True)"
    )
    asked = [(prompt, 10), (prompt, 200), ("x" * 40 + prompt, 200)]
    # a process of its own: what sampling asks of the Hub's client holds for the whole process
    command = [sys.executable, "-c", code, str(tmp_path / "e"), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    few, many, cut = (json.loads(line)["sample"] for line in done.stdout.splitlines())
    assert few.startswith(prompt) and many.startswith(prompt) and len(prompt) < len(few) < len(many)
    assert cut.startswith("x" * 15 + prompt)


def test_a_job_without_an_export_cannot_be_sampled(home: Path) -> None:
    done = run("sample", "job-none")
    assert done.returncode == 1 and "no exported model" in done.stderr
