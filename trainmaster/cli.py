"""The command line: the local stack, and jobs on a server.

Commands import what they need themselves: `--help` and `plan` must not wait for HTTP or Redis.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import ValidationError

from gptcore.control_characters import escape_controls
from gptcore.procs import python_module
from gptcore.spec import DataSpec, SpecError
from trainmaster.client import Client, TrainmasterError
from trainmaster.mistake import Mistake
from trainmaster.sample import main as sample
from trainmaster.tables import facts, job_table, jobs_table, keys_table, plan_table, workers_table
from trainmaster.terminal import Terminal
from worker.settings import BadSetting, Settings

if TYPE_CHECKING:
    from trainmaster.stack import Stack
    from worker.keyring import KeyRing

app = typer.Typer(
    help="Pretrains GPTs on machines you own.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip
keys = typer.Typer(help="Keys that let others use the API.", no_args_is_help=True)
app.add_typer(keys, name="keys")
console = Terminal()
errors = Terminal(stderr=True)

Url = Annotated[
    str | None, typer.Option(envvar="TRAINMASTER_URL", help="the server; by default the one of `trainmaster up`")
]
PlanUrl = Annotated[str | None, typer.Option(envvar="TRAINMASTER_URL", help="the server that plans; by default none")]
Pool = Annotated[str | None, typer.Option(help="whose workers take it, instead of the spec's resources.pool")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Host = Annotated[str, typer.Option(help="address to listen on")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="port to listen on; 0: any free one")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="the job's id")]
SpecFile = Annotated[
    str,
    typer.Argument(metavar="FILE", help="a job spec in JSON; - reads standard input; hf://owner/name: a model's own"),
]


@app.command()
def up(host: Host = "127.0.0.1", port: Port = 8000) -> None:
    """Start the local stack: Redis, the API and a worker. Ctrl-C stops it."""
    _run_stack(host=host, port=port)


@app.command()
def api(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    first_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="where there is no key yet, make an admin's and leave it here")
    ] = None,
) -> None:
    """Start only the API."""
    if _redis_is_given():
        from trainmaster.serve import listen, serve

        with _keyring() as ring:
            if first_key:
                ring.create_first(first_key)
            listener = listen(host, port, Settings.from_environment())
        serve(listener)
    elif first_key:
        raise Mistake("--first-key goes with TRAINMASTER_REDIS_URL; use trainmaster keys create")
    else:
        _run_stack(host=host, port=port, worker=False, logs=False)


@app.command()
def worker() -> None:
    """Start only a worker: with TRAINMASTER_REDIS_URL set, this machine joins another's stack."""
    if _redis_is_given():
        from trainmaster.redis_server import await_given

        await_given(Settings.from_environment().redis_url)  # a bad setting, or no Redis, is named here, in words
        os.execv(sys.executable, python_module("worker.agent"))
    _run_stack(api=False, logs=False)


@app.command()
def demo(
    url: Annotated[str | None, typer.Option(help="use this running server")] = None, as_json: AsJson = False
) -> None:
    """Train a small GPT on this machine from start to finish, in a few minutes."""
    from trainmaster.demo import run_demo

    raise typer.Exit(run_demo(Settings.from_environment(), url, not _redis_is_given(), as_json))


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="what specs will call the dataset")],
    text: Annotated[list[Path] | None, typer.Option(help="a text file, or a folder of *.txt; may be repeated")] = None,
    jsonl: Annotated[list[Path] | None, typer.Option(help="a file of JSON lines, *.gz too, or a folder")] = None,
    parquet: Annotated[list[Path] | None, typer.Option(help="a Parquet file, or a folder of *.parquet")] = None,
    shards: Annotated[Path | None, typer.Option(help="a folder of token shards (*.bin) that are made already")] = None,
    hub: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="a dataset on the Hugging Face Hub")] = None,
    files: Annotated[str, typer.Option(help="of the --hub dataset: which Parquet files")] = "**/*.parquet",
    field: Annotated[str, typer.Option(help="the column that holds the text")] = "text",
    tokenizer: Annotated[
        Literal["gpt2", "bytes"], typer.Option(help="GPT-2's BPE, or a token a byte: for small models and texts")
    ] = "gpt2",
    val_fraction: Annotated[float, typer.Option(min=0.0, max=1.0, help="share held out for validation")] = 0.05,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="at most this many, both splits together")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a dataset on this machine. Interrupted, it goes on where it stopped."""
    import httpx2

    from gptcore.dataset import refuse_reserved
    from gptcore.prepare import adopt_shards, begun_commit
    from gptcore.sources import hub_files, local_files
    from trainmaster.prepare import run_prepare

    try:
        DataSpec(dataset=name)
    except ValidationError as error:
        raise typer.BadParameter(f"{name!r}: {error.errors()[0]['msg']}", param_hint="NAME") from error
    sources = {"text": text, "jsonl": jsonl, "parquet": parquet, "shards": shards, "hub": hub}
    given = [kind for kind, source in sources.items() if source]
    if len(given) != 1:
        wrong = " and ".join(f"--{kind}" for kind in given) + " exclude each other"
        raise typer.BadParameter(wrong if given else "give --text, --jsonl, --parquet, --shards or --hub")
    settings = Settings.from_environment()
    settings.make_home()
    datasets = settings.datasets
    refuse_reserved(name, shards is not None)
    try:
        if shards:
            dataset = adopt_shards(datasets, name, shards, tokenizer)
        else:
            paths = text or jsonl or parquet or []
            begun = begun_commit(datasets, name, hub, files) if hub else None
            source = hub_files(hub, files, field, begun) if hub else local_files(given[0], paths, field)
            dataset = run_prepare(datasets, name, source, tokenizer, val_fraction, max_tokens, errors)
    except (OSError, ValueError, httpx2.TransportError) as error:  # a file, a spec, the Hub
        raise Mistake(f"{hub}: {error}" if hub else str(error)) from error
    if as_json:
        typer.echo(json.dumps(dataset.model_dump(mode="json")))
        return
    rows = [(s, f"{getattr(dataset, s).tokens:,} tokens") for s in ("train", "val")]
    console.print(facts(f"dataset {name}", [*rows, ("in a spec", f'"data": {{"dataset": "{name}"}}')]))


@app.command()
def plan(file: SpecFile, pool: Pool = None, url: PlanUrl = None, as_json: AsJson = False) -> None:
    """Show what a spec comes to, or why it cannot run. Without --url it is planned right here, for the device that
    the spec names; a server plans for the workers it has, and adds time and cost."""
    spec = _overridden(_read_spec(file), None, pool)
    planned = _client(url).plan(spec) if url else _plan_here(spec)
    _show(planned, as_json, plan_table)


@app.command()
def submit(
    file: SpecFile,
    watch: Annotated[bool, typer.Option("--watch", help="follow the job to its end")] = False,
    name: Annotated[str | None, typer.Option(help="instead of the name in the file")] = None,
    pool: Pool = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Send a job spec to the server."""
    client = _client(url)
    job = client.submit(_overridden(_read_spec(file), name, pool))
    for warning in job["plan"]["warnings"] if job["plan"] else []:
        errors.print(f"warning: {warning}", markup=False, style="yellow", soft_wrap=True)
    if not (as_json and watch):
        _show(job, as_json, _status)
    if watch:
        raise typer.Exit(_watch(client, job["id"], as_json))


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="whose it is, or what for")],
    scope: Annotated[
        Literal["read", "submit", "admin"],
        typer.Option(help="read: look; submit: also run and stop jobs; admin: also delete jobs and drain workers"),
    ] = "submit",
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, once. From the first key on, the server asks for one."""
    if not name.strip():
        raise typer.BadParameter("a key needs a name, by which it is known in the list", param_hint="NAME")
    with _keyring() as ring:
        key, text = ring.create(name, scope)
    if as_json:
        typer.echo(json.dumps({**key.model_dump(mode="json", exclude={"sha256"}), "key": text}, indent=2))
    else:
        errors.print(f"key {key.id} of scope {scope}; keep it, it cannot be shown again:")
        typer.echo(text)


@keys.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List keys, oldest first."""
    with _keyring() as ring:
        found = [key.model_dump(mode="json", exclude={"sha256"}) for key in ring.all()]
    _show(found, as_json, keys_table)


@keys.command("revoke")
def revoke_key(key: Annotated[str, typer.Argument(metavar="KEY", help="the key's id, as `list` shows it")]) -> None:
    """Make a key worthless, at once."""
    with _keyring() as ring:
        if not ring.revoke(key):
            raise Mistake(f"there is no key {key!r}; trainmaster keys list shows what there is")
    console.print(f"{key} revoked")


@contextmanager
def _keyring() -> Iterator["KeyRing"]:
    """Keys lie in Redis: who may reach it may make them. A local one is started where it does not run."""
    from trainmaster.redis_server import await_given
    from worker.keyring import KeyRing

    settings = Settings.from_environment()
    with ExitStack() as left:
        if _redis_is_given():
            url = settings.redis_url
            await_given(url)
        else:
            from trainmaster.stack import Stack  # which the API's image, having no worker, cannot load

            url = left.enter_context(Stack(settings, api=False, worker=False)).redis_url
        yield left.enter_context(closing(KeyRing(url, settings.home)))


@app.command("list")
def list_jobs(
    status: Annotated[str | None, typer.Option(help="only jobs of this status")] = None,
    kind: Annotated[Literal["train", "prepare", "eval", "publish"] | None, typer.Option(help="only such jobs")] = None,
    label: Annotated[str | None, typer.Option(help="only jobs with this label, key=value")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="at most so many, newest first")] = 20,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    _show(_client(url).jobs(status=status, kind=kind, label=label, limit=limit), as_json, jobs_table)


@app.command()
def show(job: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Show a job."""
    _show(_client(url).job(job), as_json, job_table)


@app.command()
def watch(
    job: JobId,
    url: Url = None,
    as_json: AsJson = False,
    replay: Annotated[bool, typer.Option(help="begin with the job's first event, not with its newest ones")] = False,
) -> None:
    """Follow a job, and what follows it, to the end. Exit code 0 when all succeeded. --json prints the job's own
    events, one a line."""
    raise typer.Exit(_watch(_client(url), job, as_json, replay))


@app.command()
def logs(job: JobId, url: Url = None) -> None:
    """Print what a job's trainer prints, from the last MiB on, to the job's end."""
    for text in _client(url).log(job):
        typer.echo(escape_controls(text))


@app.command()
def workers(url: Url = None, as_json: AsJson = False) -> None:
    """List nodes, their slots and who has them."""
    _show(_client(url).workers(), as_json, workers_table)


@app.command()
def delete(job: JobId, url: Url = None) -> None:
    """Delete a job that has ended, with its checkpoints and everything else in its run directory."""
    _client(url).delete(job)
    console.print(f"{job} deleted")


app.command("sample")(sample)


@app.command()
def cancel(job: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Ask for a job's end; a running one writes a checkpoint first."""
    _show(_client(url).cancel(job), as_json, _status)


@app.command()
def pause(job: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Have a job write a checkpoint and wait for `resume`."""
    _show(_client(url).pause(job), as_json, _status)


@app.command()
def resume(job: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Queue a paused job again; it goes on exactly where it was."""
    _show(_client(url).resume(job), as_json, _status)


@app.command("continue")
def continue_job(job: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Go on from the last checkpoint of a run that failed or was cancelled, as a new job."""
    client, overrides = _client(url), {"init_from": {"source": job, "optimizer": True}}
    if (status := client.job(job)["status"]) not in ("failed", "cancelled"):
        more = json.dumps({"from": job, "overrides": {"max_steps": "N", **overrides}})
        way_out = f"for N steps submit {more}" if status == "succeeded" else "pause and resume it, or cancel it first"
        raise Mistake(f"{job} is {status}; {way_out}")
    _show(client.submit({"from": job, "overrides": overrides}), as_json, _status)


def _client(url: str | None) -> Client:
    """Return a client of `url`. Raises BadSetting: a misspelled variable would otherwise be passed over."""
    Settings.from_environment()
    return Client(url)


def _show(answer: Any, as_json: bool, readable: Callable[[Any], Any]) -> None:
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
    else:
        console.print(readable(answer))


def _status(job: dict[str, Any]) -> str:
    return f"{job['id']} {job['status']}"


def main() -> None:
    """Run a command; what a user can mend is said in a line or two, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?" for what it lacks
    try:
        app()
    except SpecError as error:
        for problem in error.problems:
            _complain(f"{problem.pointer or '/'}: {problem.message}")
    except (Mistake, TrainmasterError, BadSetting, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        _complain(str(error))
    else:
        return
    raise SystemExit(1)


def _complain(message: str) -> None:
    errors.print(message, markup=False, style="red", soft_wrap=True)


def _redis_is_given() -> bool:
    return bool(os.environ.get("TRAINMASTER_REDIS_URL"))


def _run_stack(**options: Any) -> None:
    """Run a local stack until Ctrl-C."""
    from trainmaster.stack import Stack, interruptible

    settings = Settings.from_environment()
    try:
        with interruptible(), Stack(settings, own_redis=not _redis_is_given(), **options) as stack:
            _say_where(stack, settings)
            stack.wait()
    except KeyboardInterrupt:
        console.print("stopped")


def _say_where(stack: "Stack", settings: Settings) -> None:
    from worker.keyring import MARKER, KeyRing

    if stack.url:
        console.print(f"trainmaster is up at [link]{stack.url}[/link]  (API and page; Ctrl-C stops it)")
        with closing(KeyRing(stack.redis_url, settings.home)) as ring:
            if not ring.are_required():
                console.print("there is no API key: only this machine can reach it (trainmaster keys create)")
            elif ring.is_empty():
                marker = settings.home / MARKER
                way_out = f"trainmaster keys create me --scope admin, or delete {marker} to use it without keys"
                console.print(f"its API keys are gone, so it refuses requests: {way_out}", markup=False, soft_wrap=True)
    console.print(f"runs, datasets, Redis and logs are in {settings.home}", markup=False, soft_wrap=True)
    if warning := settings.open_to_others():
        errors.print(f"warning: {warning}", markup=False, style="yellow", soft_wrap=True)


def _read_spec(file: str) -> dict[str, Any]:
    """A spec as decoded JSON; what is wrong inside is said by the planner or the server."""
    if file.startswith("hf://"):
        from trainmaster.published import fetch_spec

        return fetch_spec(file)
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        spec = json.loads(data.decode("utf-8-sig"))  # Windows editors write a byte-order mark
        json.dumps(spec, allow_nan=False, ensure_ascii=False).encode()  # Python reads more than JSON has
    except OSError as error:
        raise Mistake(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Mistake(f"{file} is not UTF-8: {error}; save it in that encoding") from error
    except (ValueError, RecursionError) as error:
        raise Mistake(f"{file} is not JSON: {error}") from error
    if not isinstance(spec, dict):
        raise Mistake(f"{file} holds a {type(spec).__name__}, not a JSON object")
    return spec


def _overridden(spec: dict[str, Any], name: str | None, pool: str | None) -> dict[str, Any]:
    """The spec with what options have instead, which goes among the overrides of {"from": job id}."""
    if "from" in spec:
        inner = spec.get("overrides", {})
        return {**spec, "overrides": _overridden(inner, name, pool)} if isinstance(inner, dict) else spec
    resources = spec.get("resources", {})
    if pool and isinstance(resources, dict):
        spec = {**spec, "resources": {**resources, "pool": pool}}
    return {**spec, "name": name} if name else spec


def _plan_here(data: dict[str, Any]) -> dict[str, Any]:
    """What POST /jobs/plan would say, for a machine that has what the spec asks for."""
    from gptcore.plan import Hardware, resolve
    from gptcore.plan import plan as plan_spec
    from gptcore.rundir import datasets_root
    from gptcore.spec import TrainSpec, parse_spec

    spec = parse_spec(data)
    if not isinstance(spec, TrainSpec):
        raise Mistake(f"{spec.kind} jobs need no plan: submit it")
    spec = resolve(spec, datasets_root())
    device = "cpu" if spec.resources.device == "auto" else spec.resources.device
    planned = plan_spec(spec, Hardware(device=device, ranks=spec.resources.ranks_per_node))
    return {"spec": spec.model_dump(mode="json"), "plan": planned.model_dump(mode="json")}


def _watch(client: Client, job_id: str, as_json: bool, replay: bool = False) -> int:
    """Follow a job to its end, and in words also the jobs about it → exit code."""
    from trainmaster.watch import CONTEXT_EVENTS, INTERRUPTED, follow

    events = client.events(job_id, last=None if replay else CONTEXT_EVENTS)
    try:
        if as_json:
            for event in events:
                typer.echo(json.dumps(event))
        else:
            follow(events, client.job(job_id), console)
    except KeyboardInterrupt:
        errors.print(f"the job goes on; trainmaster watch {job_id} follows it, trainmaster cancel {job_id} ends it")
        return INTERRUPTED
    job = client.job(job_id)
    if not as_json:
        console.print(job_table(job))
    if job["status"] != "succeeded":
        return 1
    about_it = [] if as_json else client.jobs(parent_job_id=job_id, limit=100)["data"]
    code = 0
    for one in reversed(about_it):
        code = max(code, _watch(client, one["id"], as_json, replay))
        if code == INTERRUPTED:
            break
    return code


if __name__ == "__main__":
    main()
