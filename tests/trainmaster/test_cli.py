"""Commands that need no server."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest
from rich.console import Console

from gptcore.spec import read_spec
from tests.conftest import free_port, wait_until
from tests.trainmaster.conftest import Start, run
from trainmaster import Client
from trainmaster.cli import _overridden, _watch
from trainmaster.tables import job_table, plan_table

DEMO = Path(__file__).parents[2] / "examples" / "demo.json"


def demo_spec(**changes: object) -> str:
    return json.dumps({**json.loads(DEMO.read_text()), **changes})


def test_the_command_line_starts_without_its_heavy_parts() -> None:
    code = "import sys, trainmaster.cli; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "numpy", "redis", "rq", "fastapi"} & set(loaded)


def test_plan_gives_the_numbers_without_a_server_and_without_torch(home: Path) -> None:
    code = (
        "import sys; from trainmaster.cli import main; sys.argv = ['trainmaster', 'plan', sys.argv[1], '--json']\n"
        "try: main()\n"
        "finally: sys.stderr.write(str('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(DEMO)], capture_output=True, text=True)
    planned = json.loads(done.stdout)
    assert planned["plan"]["total_tokens"] == json.loads(DEMO.read_text())["max_steps"] * 8192
    assert planned["spec"]["model"]["vocab_size"] == 256
    assert done.stderr == "False"


def test_plan_reads_standard_input_and_shows_a_table(home: Path) -> None:
    done = run("plan", "-", stdin=demo_spec(max_steps=7))
    assert done.returncode == 0
    assert "7 of 8,192 tokens" in done.stdout


def test_a_spec_is_read_as_utf8_whatever_the_locale_and_with_a_byte_order_mark(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "spec.json"
    spec = {**json.loads(demo_spec()), "labels": {"text": "größer"}}
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(spec, ensure_ascii=False).encode())
    assert json.loads(run("plan", str(file), "--json").stdout)["spec"]["labels"] == spec["labels"]
    assert read_spec(file).labels == spec["labels"]
    file.write_bytes(demo_spec(name="x").encode("utf-16"))
    done = run("plan", str(file))
    assert done.returncode == 1 and f"{file} is not UTF-8: " in done.stderr, done.stderr


def test_a_spec_that_cannot_run_is_refused_field_by_field(home: Path) -> None:
    done = run("plan", "-", stdin=demo_spec(tokens_per_step=1000, nam="x"))
    assert done.returncode == 1
    assert "/nam: nam is no field here" in done.stderr
    done = run("plan", "-", stdin=demo_spec(tokens_per_step=1000))
    assert done.returncode == 1
    assert done.stderr.startswith("/tokens_per_step: ") and "1000" in done.stderr and "768 or 1024" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("stdin", "said"), [("{", "is not JSON"), ("[]", "holds a list"), ('"x"', "holds a str")])
def test_what_is_no_spec_at_all_is_named(home: Path, stdin: str, said: str) -> None:
    done = run("plan", "-", stdin=stdin)
    assert done.returncode == 1
    assert said in done.stderr


@pytest.mark.parametrize(
    ("stdin", "said"),
    [('{"a": NaN}', "not JSON compliant"), (r'{"a": "\ud800"}', "surrogates"), ("[" * 100_000, "recursion depth")],
)
def test_what_python_reads_but_is_no_json_is_named(home: Path, stdin: str, said: str) -> None:
    for command in ("plan", "submit"):
        done = run(command, "-", stdin=stdin)
        assert done.returncode == 1
        assert done.stderr.startswith("- is not JSON: ") and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"name": "a", "resources": {"priority": 1}}, {"name": "b", "resources": {"priority": 1, "pool": "gpu"}}),
        ({"name": "a"}, {"name": "b", "resources": {"pool": "gpu"}}),
        ({"name": "a", "resources": []}, {"name": "b", "resources": []}),  # for the server to refuse
        ({"from": "job-1"}, {"from": "job-1", "overrides": {"resources": {"pool": "gpu"}, "name": "b"}}),
        ({"from": "job-1", "overrides": 7}, {"from": "job-1", "overrides": 7}),
    ],
)
def test_options_stand_in_for_what_a_spec_says(given: dict[str, Any], sent: dict[str, Any]) -> None:
    assert _overridden(given, "b", "gpu") == sent
    assert _overridden(given, None, None) in (given, {"overrides": {}} | given)


def test_a_plan_is_made_for_the_pool_that_is_asked_for(home: Path) -> None:
    done = run("plan", str(DEMO), "--pool", "gpu", "--json")
    assert json.loads(done.stdout)["spec"]["resources"]["pool"] == "gpu"
    done = run("plan", str(DEMO), "--pool", "no pool")
    assert done.returncode == 1 and "/resources/pool" in done.stderr


def test_a_missing_file_is_named(home: Path) -> None:
    done = run("plan", "no-such.json")
    assert (done.returncode, done.stderr) == (1, "no-such.json cannot be read: No such file or directory\n")


@pytest.mark.parametrize("command", [["up"], ["api"]])
def test_an_open_address_is_refused_while_there_are_no_keys(home: Path, command: list[str]) -> None:
    done = run(*command, "--host", "0.0.0.0")
    assert done.returncode == 1
    assert "trainmaster keys create" in done.stderr


def test_prepare_makes_a_dataset_that_a_spec_can_name(home: Path, tmp_path: Path) -> None:
    text = tmp_path / "my.txt"
    text.write_text("\n".join(f"line {n} of a text of my own" for n in range(40_000)))
    done = run("prepare", "mytext", "--text", str(text), "--tokenizer", "bytes", "--json")
    assert done.returncode == 0, done.stderr
    dataset = json.loads(done.stdout)
    assert dataset["train"]["bytes"] + dataset["val"]["bytes"] == text.stat().st_size
    assert dataset["val"]["documents"] > 0
    planned = run("plan", "-", "--json", stdin=demo_spec(data={"dataset": "mytext"}))
    assert json.loads(planned.stdout)["spec"]["data"] == {"dataset": "mytext"}


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden"])
def test_prepare_refuses_a_name_that_leaves_the_datasets(home: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "my.txt").write_text("text")
    assert run("prepare", name, "--text", str(tmp_path / "my.txt")).returncode == 2
    assert not home.exists()


def test_prepare_names_the_text_that_is_missing(home: Path) -> None:
    done = run("prepare", "mytext", "--text", "no-such.txt")
    assert (done.returncode, done.stderr) == (1, "no-such.txt does not exist\n")


def test_a_setting_that_cannot_be_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINMASTER_DEVICE", "tpu")
    done = run("up")
    assert done.returncode == 1
    assert done.stderr.startswith("TRAINMASTER_DEVICE 'tpu': input should be 'auto', 'cpu' or 'cuda'")


NOT_TO_BE_USED: dict[str, tuple[dict[str, str], list[str], str]] = {
    "a server's URL": ({"URL": "http://a:b:c"}, ["list"], "the URL 'http://a:b:c' cannot be used"),
    "a key": ({"API_KEY": "ключ"}, ["list"], "the API key cannot be used"),
    "no Redis URL": ({"REDIS_URL": "foo"}, ["up"], "Redis at foo,"),
    "no Redis URL for an API": ({"REDIS_URL": "foo"}, ["api", "--port", "0"], "Redis at foo,"),
    "no Redis there": ({"REDIS_URL": "redis://:secret@127.0.0.1:1/0"}, ["keys", "list"], "Redis at 127.0.0.1:1/0,"),
    "no Redis there for an API": (
        {"REDIS_URL": "redis://127.0.0.1:1/0?password=secret"},
        ["api", "--host", "0.0.0.0", "--port", "0"],
        "127.0.0.1:1/0, as TRAINMASTER_REDIS_URL has it, cannot be used: Error 111",
    ),
    "a setting of a worker that joins": (
        {"REDIS_URL": "redis://127.0.0.1:1/0", "GRACE_SECONDS": "abc"},
        ["worker"],
        "TRAINMASTER_GRACE_SECONDS 'abc': input should be",
    ),
    "no Redis there for a worker": (
        {"REDIS_URL": "redis://:secret@127.0.0.1:1/0"},
        ["worker"],
        "Redis at 127.0.0.1:1/0, as TRAINMASTER_REDIS_URL has it, cannot be used: Error 111",
    ),
    "no server there": (
        {"URL": "http://127.0.0.1:1"},
        ["list"],
        "the server at http://127.0.0.1:1 cannot be reached: [Errno 111] Connection refused; "
        "start it with `trainmaster up`, or set TRAINMASTER_URL or --url",
    ),
    "a home that is a file": (
        {"HOME": "/etc/passwd"},
        ["up"],
        "/etc/passwd cannot be written (File exists); set TRAINMASTER_HOME to",
    ),
    "the Hub's dataset": ({}, ["prepare", "mine", "--hub", "me/mine"], "me/mine: "),
    "the Hub's model": ({}, ["sample", "hf://me/mine"], "me/mine: "),
}


@pytest.mark.parametrize(("variables", "command", "said"), NOT_TO_BE_USED.values(), ids=NOT_TO_BE_USED)
def test_what_cannot_be_used_is_named_at_once(
    home: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], command: list[str], said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"TRAINMASTER_{name}", value)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_HUB_OFFLINE", str(int("sample" in command)))  # transformers knocks for 50 s
    done = run(*command)
    assert done.returncode == 1, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr and "secret" not in done.stderr, done.stderr


def test_a_wrong_redis_password_and_a_place_for_no_key_are_named(
    home: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINMASTER_REDIS_URL", redis_url)
    api = ["api", "--host", "0.0.0.0", "--port", "0"]
    done = run(*api, "--first-key", "/nonexist/key")
    assert (done.returncode, done.stderr) == (1, "[Errno 2] No such file or directory: '/nonexist/key'\n")
    monkeypatch.setenv("TRAINMASTER_REDIS_URL", redis_url.replace("//", "//me:secret@"))
    done = run(*api)
    assert done.returncode == 1 and "cannot be used: " in done.stderr and "secret" not in done.stderr, done.stderr


def test_an_answer_that_is_no_json_is_said_to_be_none(home: Path) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for command in (["list"], ["show", "job-0"], ["watch", "job-0"]):
            done = run(*command, "--url", url)
            assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert f"{url}/jobs answers what is no JSON" in run("list", "--url", url).stderr
        server.shutdown()


def test_prepare_takes_rows_and_shards_too(home: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": f"row {i} of many"}) + "\n" for i in range(200)))
    made = run("prepare", "rows", "--jsonl", str(rows), "--field", "body", "--tokenizer", "bytes", "--json")
    assert json.loads(made.stdout)["train"]["documents"] > 150
    adopted = run("prepare", "again", "--shards", str(home / "datasets" / "rows"), "--tokenizer", "bytes", "--json")
    assert json.loads(adopted.stdout)["train"]["bytes"] == json.loads(made.stdout)["train"]["bytes"]


def test_prepare_wants_one_source(home: Path, tmp_path: Path) -> None:
    assert "give --text" in run("prepare", "mytext").stderr
    both = run("prepare", "mytext", "--text", "a", "--jsonl", "b")
    assert both.returncode == 2
    assert "exclude each other" in both.stderr


def test_keys_are_made_listed_and_revoked(home: Path) -> None:
    made = run("keys", "create", "me", "--scope", "admin")
    assert made.returncode == 0 and made.stdout.startswith("tm_"), made.stderr
    assert "needs a name" in run("keys", "create", " ").stderr
    (listed,) = json.loads(run("keys", "list", "--json").stdout)
    assert (listed["name"], listed["scope"]) == ("me", "admin")
    assert made.stdout.strip().split("_")[1] == listed["id"] and "sha256" not in listed
    assert run("keys", "revoke", listed["id"]).returncode == 0
    again = run("keys", "revoke", listed["id"])
    assert again.returncode == 1 and "keys list" in again.stderr
    assert json.loads(run("keys", "list", "--json").stdout) == []


ONLY_A_WORKERS = ("psutil", "rq", "torch", "numpy", "transformers", "safetensors", "pyarrow", "huggingface_hub", "yaml")


def test_the_first_start_of_an_api_beyond_loopback_leaves_a_key(
    home: Path, start: Start, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINMASTER_REDIS_URL", redis_url)
    # the API's image lacks what only a worker needs
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({ONLY_A_WORKERS})\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    file, port = tmp_path / "api-key", free_port()
    for _ in range(2):
        api = start("api", "--host", "0.0.0.0", "--port", str(port), "--first-key", str(file))
        wait_until(lambda: file.exists() and _status(port) == 401)
        assert file.stat().st_mode & 0o777 == 0o600
        with Client(f"http://127.0.0.1:{port}", file.read_text().strip()) as client:
            assert client.jobs()["data"] == []
        api.terminate()
        api.wait(20)
    assert len(json.loads(run("keys", "list", "--json").stdout)) == 1


def _status(port: int) -> int | None:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/jobs", trust_env=False).status_code
    except httpx2.TransportError:
        return None


def test_a_ctrl_c_leaves_every_job_that_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    followed = []

    class Family:
        """A server's client, of a job with two children of which the first is interrupted."""

        def events(self, job_id: str, last: int | None = None) -> Iterator[Any]:
            followed.append(job_id)
            if job_id != "parent":
                raise KeyboardInterrupt
            yield from ()

        def job(self, job_id: str) -> Any:
            return {"id": job_id, "name": job_id, "status": "succeeded", "total_steps": None}

        def jobs(self, **_: Any) -> Any:
            return {"data": [{"id": "publish"}, {"id": "eval"}]}

    monkeypatch.setattr("trainmaster.cli.job_table", lambda job: job["id"])
    assert _watch(cast(Client, Family()), "parent", as_json=False) == 130
    assert followed == ["parent", "eval"]


def test_a_job_without_a_plan_is_shown_as_one_that_needs_none() -> None:
    console = Console(width=100)
    with console.capture() as shown:
        console.print(plan_table({"spec": {"kind": "prepare", "name": "books"}, "plan": None}))
    assert "plan of books" in shown.get() and "prepare jobs need none" in shown.get()


@pytest.mark.parametrize(("reason", "shown"), [("user_error", False), ("crash", True)])
def test_a_failed_jobs_log_is_shown_where_its_reason_names_no_mistake(reason: str, shown: bool) -> None:
    error = {"reason": reason, "message": "max_steps is 0", "log": ["Traceback (most recent call last):"]}
    job = defaultdict(str, results={}, labels={}, error=error)
    console = Console(width=100)
    with console.capture() as captured:
        console.print(job_table(job))
    assert f"{reason}: max_steps is 0" in captured.get()
    assert ("Traceback" in captured.get()) == shown
