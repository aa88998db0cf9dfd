"""The HTTP interface: one short function a route. What they share stands in the modules they call."""

import hashlib
import json
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Body, Depends, Header, Query, Request, Response
from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field, TypeAdapter
from starlette.concurrency import run_in_threadpool

from api.bodies import BoundedRoute
from api.hub import Hub, read_history
from api.monitoring import Monitor
from api.planning import Planned
from api.problems import ProblemDetails, Refusal
from api.repeat import EXAMPLES, Submission, plan_of
from api.series import EVENT_TYPES, Key, Metrics, ResultKey, RunCache, Sparkline, csv_header, csv_rows
from api.shared_answers import SharedAnswers
from api.stream import LOG_TAIL_BYTES, event_stream, log_stream, logs_of
from gptcore.dataset import BUILTIN, list_datasets
from gptcore.events import Event
from gptcore.presets import PRESETS
from gptcore.rundir import RunDir
from worker.deletion import delete_job
from worker.job import Job, JobPage, JobSummaryPage, Node, Status, StatusChange
from worker.keyring import AUDIT, AuditEntry, AuditKind, KeyRing
from worker.record import place
from worker.settings import Settings
from worker.store import Store

SLOW_READS = 2  # at a time: they parse, so more of them would only take the interpreter from everyone else
DEFAULT_POINTS, MOST_POINTS = 2000, 100_000  # of a curve in JSON; a table has all
Answer = TypeVar("Answer")
STATIC = Path(__file__).parent / "static"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
}


@dataclass(frozen=True)
class Services:
    """What routes work with; made once an application."""

    settings: Settings
    store: Store
    keys: KeyRing
    hub: Hub
    monitor: Monitor
    run: RunCache
    shared: SharedAnswers = field(default_factory=SharedAnswers)
    slow_reads: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(SLOW_READS))

    async def read(self, function: Callable[..., Answer], *arguments: Any) -> Answer:
        """Run what reads run directories in one of few threads of its own: all other requests keep theirs."""
        return await to_thread.run_sync(function, *arguments, limiter=self.slow_reads)

    async def read_jobs(self, request: Request, question: Hashable, read: Callable[[], str]) -> Response:
        """Answer with the JSON that `read` returns, read once for all who ask while no job changes."""
        return await self.shared.answer(
            request,
            question,
            lambda: run_in_threadpool(self.store.revision),
            lambda: run_in_threadpool(lambda: read().encode()),
        )


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


def _who(request: Request) -> str:
    return str(request.state.who)


def _owner(request: Request) -> str:
    return str(request.state.owner)


With = Annotated[Services, Depends(_services)]
Who = Annotated[str, Depends(_who)]
Owner = Annotated[str, Depends(_owner)]
Sent = Annotated[Submission, Body(openapi_examples=EXAMPLES)]
_ID = r"^[0-9]{1,9}-[0-9]{1,15}(\.[0-9]{1,9})?$"
_JOB_ID = r"^job-[0-9a-z]{12}$"
_SPARKLINES = TypeAdapter(dict[str, Sparkline])


def _after(
    after: Annotated[str | None, Query(pattern=_ID, description="only what is newer than this event")] = None,
    last_event_id: Annotated[str | None, Header(pattern=_ID, description="as `after`, and before it")] = None,
) -> str | None:
    return last_event_id or after


After = Annotated[str | None, Depends(_after)]
Limit = Annotated[int, Query(ge=1, le=1000)]

PROBLEMS: dict[int | str, dict[str, Any]] = {
    422: {"model": ProblemDetails, "description": "The request cannot be done, and why"},
    "default": {"model": ProblemDetails, "description": "Any other error"},
}
router = APIRouter(responses=PROBLEMS, route_class=BoundedRoute)


class EventPage(BaseModel):
    """Oldest first. `next` is the `after` of the page that follows, null on the last one."""

    data: list[Event | StatusChange]
    has_more: bool
    next: str | None


class DatasetSummary(BaseModel):
    """What a spec may name as its dataset. A built-in one is prepared when it is first used."""

    name: str
    tokenizer: Literal["bytes", "gpt2"]
    source: str
    prepared: bool
    train_tokens: int | None = Field(None, description="null while it is not prepared")
    val_tokens: int | None = None
    sha256: str | None = Field(None, description="of its tokens, as a run's `dataset_sha256`")


class Health(BaseModel):
    status: str


# ---- jobs


@router.post("/jobs", status_code=201, tags=["jobs"])
def submit(
    submission: Sent,
    response: Response,
    services: With,
    who: Who,
    owner: Owner,
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=200, description="same key, same body: the same job, for 24 h")
    ] = None,
) -> Job:
    """Check a job spec and queue it: a whole one, or another job's with `overrides`."""
    # as Pydantic writes it, which cannot write a lone surrogate: planning refuses that by its field
    text = json.dumps(submission.model_dump(mode="json"), separators=(",", ":"), ensure_ascii=False)
    body_sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    # before planning: a repeated request gets its first answer, whatever the pool has become since
    job = services.store.replayed_job(idempotency_key, body_sha256) if idempotency_key else None
    if job is None:
        accepted = plan_of(submission, services.settings, services.store)
        job, _ = services.store.create_job(
            accepted.spec, accepted.plan, idempotency_key=idempotency_key, body_sha256=body_sha256,
            parent_job_id=accepted.parent_job_id, children=accepted.children, device=accepted.device,
            owner=owner, who=who,
        )  # fmt: skip
    response.headers["Location"] = f"/jobs/{job.id}"
    return job


@router.post("/jobs/plan", tags=["jobs"])
def plan(submission: Sent, services: With) -> Planned:
    """What a job spec comes to; nothing is queued."""
    return plan_of(submission, services.settings, services.store)


@router.get("/jobs", response_model=JobPage | JobSummaryPage, tags=["jobs"])
async def jobs(
    request: Request,
    services: With,
    status: Status | None = None,
    kind: Literal["train", "prepare", "eval", "publish"] | None = None,
    label: Annotated[str | None, Query(description="key, or key=value")] = None,
    name: str | None = None,
    owner: Annotated[str | None, Query(description="name of the API key that submitted them")] = None,
    parent_job_id: Annotated[str | None, Query(description="only jobs about this one: evaluations, publishing")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(description="a page's `next`")] = None,
    view: Annotated[Literal["full", "summary"], Query(description="summary: without `spec` and `plan`")] = "full",
) -> Response:
    """Jobs, newest first. A page may hold fewer than `limit`, or none, and still have more behind its `next`."""
    filters = {"status": status, "kind": kind, "label": label, "name": name, "owner": owner}

    def read() -> str:
        page = services.store.list_jobs(**filters, parent_job_id=parent_job_id, limit=limit, after=after)
        return page.model_dump_json(exclude={"data": {"__all__": {"spec", "plan"}}} if view == "summary" else None)

    question = ("jobs", *filters.values(), parent_job_id, limit, after, view)
    return await services.read_jobs(request, question, read)


@router.get("/sparklines", response_model=dict[str, Sparkline], tags=["runs"])
async def sparklines(
    request: Request,
    services: With,
    job: Annotated[list[Annotated[str, Query(pattern=_JOB_ID)]], Query(min_length=1, max_length=100)],
) -> Response:
    """Return the losses of several runs in at most 80 points per curve, by job id: for lists. Both curves are empty for
    a job that has reported no loss, or that does not exist."""

    def version() -> Hashable:
        return tuple(services.run(one).version() for one in job)

    def read() -> bytes:
        return _SPARKLINES.dump_json({one: services.run(one).sparkline() for one in job})

    question = ("sparklines", *job)
    return await services.shared.answer(request, question, lambda: services.read(version), lambda: services.read(read))


@router.get("/jobs/{job_id}", response_model=Job, tags=["jobs"])
async def job(job_id: str, request: Request, services: With) -> Response:
    return await services.read_jobs(request, ("job", job_id), lambda: services.store.get_job(job_id).model_dump_json())


@router.delete("/jobs/{job_id}", status_code=204, tags=["jobs"])
def delete(job_id: str, services: With) -> None:
    """Delete a job that has ended: record, streams and run directory. What it published stays."""
    delete_job(services.store, services.settings.runs, job_id)


@router.post("/jobs/{job_id}/cancel", tags=["jobs"])
def cancel(job_id: str, services: With, who: Who) -> Job:
    """Ask for a job's end. A running one is `cancelling` until nothing of it lives; asking again changes nothing."""
    return services.store.request_cancel(job_id, who)


@router.post("/jobs/{job_id}/pause", tags=["jobs"])
def pause(job_id: str, services: With, who: Who) -> Job:
    """Have a job save a checkpoint and wait for `resume`; it is `pausing` until then."""
    return services.store.request_pause(job_id, who)


@router.post("/jobs/{job_id}/resume", tags=["jobs"])
def resume(job_id: str, services: With, who: Who) -> Job:
    """Queue a paused job again; it goes on exactly where it was."""
    return services.store.resume(job_id, who)


# ---- what a job reports

_EVENTS = 'id: 1-7\nevent: step\ndata: {"type": "step", "step": 5, …}\n\nevent: end\ndata: {"status": "succeeded"}\n\n'
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}, "example": _EVENTS}}}
}
_TABLE = {"text/csv": {"schema": {"type": "string"}, "example": "step,train_loss,val_loss\n1,5.5,\n2,5.25,5.3\n"}}
_STREAM_OR_TABLE: dict[int | str, dict[str, Any]] = {200: {"content": _STREAM[200]["content"] | _TABLE}}


@router.get("/jobs/{job_id}/metrics", response_model=Metrics, responses=_STREAM_OR_TABLE, tags=["runs"])
async def metrics(
    job_id: str,
    request: Request,
    services: With,
    after: After,
    keys: Annotated[
        list[Key | ResultKey] | None, Query(max_length=100, description="by default all; may be repeated")
    ] = None,
    from_step: Annotated[int | None, Query(ge=0)] = None,
    to_step: Annotated[int | None, Query(ge=0)] = None,
    max_points: Annotated[
        int | None, Query(ge=10, le=MOST_POINTS, description=f"per curve; by default {DEFAULT_POINTS}, as CSV all")
    ] = None,
) -> Response:
    """Return a run's curves, attempts merged: each step once. A longer curve is thinned to `max_points`; the extremes
    and the last point stay, and `from_step` and `to_step` show a part of it in full. `Accept: text/csv` gives a table.

    With `Accept: text/event-stream` its `step` and `evaluated` events as they come, to be resumed by `Last-Event-ID`.
    """
    if _accepts(request, "text/event-stream"):
        await run_in_threadpool(services.store.get_job, job_id)
        return event_stream(services.hub, job_id, after or "0-0", EVENT_TYPES)

    window = {"from_step": from_step, "to_step": to_step, "max_points": max_points or DEFAULT_POINTS}
    if _accepts(request, "text/csv"):
        return await _table(services, job_id, keys, window, is_whole=max_points is None)

    def version() -> Hashable:
        services.store.require_job(job_id)
        return services.run(job_id).version()

    def read() -> bytes:
        return services.run(job_id).metrics(keys, **window).model_dump_json().encode()

    question = ("metrics", job_id, *(keys or []), *window.values())
    return await services.shared.answer(request, question, lambda: services.read(version), lambda: services.read(read))


async def _table(
    services: Services, job_id: str, keys: list[str] | None, window: dict[str, int | None], is_whole: bool
) -> Response:
    """Return CSV: every point, in pieces, or thinned as JSON is."""

    def read() -> Response | Iterator[str]:
        services.store.require_job(job_id)
        run = services.run(job_id)
        if is_whole:
            return run.table(keys, window["from_step"], window["to_step"])
        found = run.metrics(keys, **window)
        return PlainTextResponse(csv_header(found.series) + csv_rows(found.series), media_type="text/csv")

    answer = await services.read(read)
    return answer if isinstance(answer, Response) else _streamed_table(services, answer)


def _streamed_table(services: Services, pieces: Iterator[str]) -> Response:
    async def stream() -> AsyncIterator[str]:
        while (piece := await services.read(next, pieces, None)) is not None:
            yield piece

    return StreamingResponse(stream(), media_type="text/csv")


@router.get("/jobs/{job_id}/events", response_model=EventPage, responses=_STREAM, tags=["runs"])
async def events(
    job_id: str,
    request: Request,
    services: With,
    after: After,
    limit: Limit = 100,
    last: Annotated[int | None, Query(ge=1, le=1000, description="without `after`: begin with this many")] = None,
) -> Response:
    """What the trainer reported, and between it the job's changes of status; a stream with `Accept: text/event-stream`.

    An event's id is {attempt}-{seq}, a change's {attempt}-{seq}.{number}: it stands behind the event newest then.
    """
    await run_in_threadpool(services.store.get_job, job_id)
    if after is None and last is not None:
        attempt, seq, *_ = place(await run_in_threadpool(services.store.last_event, job_id))
        after = f"{attempt}-{max(0, seq - last)}"
    if _accepts(request, "text/event-stream"):
        return event_stream(services.hub, job_id, after or "0-0")

    def read() -> Response:
        found = read_history(services.store, services.settings.runs, job_id, after or "0-0", limit + 1)
        page, has_more = found[:limit], len(found) > limit
        # passed on as the trainer wrote them: a newer one may report what this server does not know
        data = ",".join(line for _, line in page)
        rest = json.dumps({"has_more": has_more, "next": page[-1][0] if has_more else None})
        return Response(f'{{"data":[{data}],{rest[1:]}', media_type="application/json")

    return await services.read(read)


@router.get("/jobs/{job_id}/logs", response_class=PlainTextResponse, responses=_STREAM, tags=["runs"])
async def logs(
    job_id: str,
    request: Request,
    services: With,
    after: After,
    attempt: Annotated[int | None, Query(ge=1, le=999_999_999, description="by default the newest")] = None,
) -> Response:
    """What an attempt's trainer printed: the last MiB. With `Accept: text/event-stream` goes on from there with
    what it prints, and with the attempts that follow; ids are {attempt}-{byte}."""
    await run_in_threadpool(services.store.get_job, job_id)
    run = RunDir(services.settings.runs / job_id)
    if _accepts(request, "text/event-stream"):
        return log_stream(services.hub, run, job_id, attempt, after)
    return PlainTextResponse(await services.read(_last_of_log, run, attempt))


def _last_of_log(run: RunDir, attempt: int | None) -> str:
    """Raises Refusal."""
    logs = logs_of(run)
    wanted = attempt or max(logs, default=0)
    if wanted not in logs:
        have = f"it has logs of {', '.join(map(str, logs))}" if logs else "it has not started yet"
        raise Refusal(404, "log_not_found", f"{run.path.name} has no log of attempt {attempt or 1}; {have}")
    with logs[wanted].open("rb") as file:
        file.seek(max(0, logs[wanted].stat().st_size - LOG_TAIL_BYTES))
        return file.read(LOG_TAIL_BYTES).decode("utf-8", "replace")


def _accepts(request: Request, media_type: str) -> bool:
    return media_type in request.headers.get("accept", "")


# ---- what a spec may name, and who would run it


@router.get("/presets", tags=["service"])
def presets() -> dict[str, dict[str, Any]]:
    """Model presets by name, as the fields they stand for."""
    return PRESETS


@router.get("/datasets", tags=["service"])
def datasets(services: With) -> list[DatasetSummary]:
    prepared = {one.name: one for one in list_datasets(services.settings.datasets)}
    return [
        DatasetSummary(
            name=name, tokenizer=one.tokenizer, source=one.source, prepared=True,
            train_tokens=one.train.tokens, val_tokens=one.val.tokens, sha256=one.sha256,
        )
        for name, one in prepared.items()
    ] + [
        DatasetSummary(name=name, tokenizer=tokenizer, source=source, prepared=False)
        for name, (tokenizer, source) in BUILTIN.items()
        if name not in prepared
    ]  # fmt: skip


@router.get("/workers", tags=["service"])
def workers(services: With) -> list[Node]:
    """Every node known, with its slots and who has them."""
    return services.store.list_nodes()


class NodeChange(BaseModel):
    schedulable: bool = Field(strict=True, description="false: no new job is placed there; those it runs go on")


@router.patch("/workers/{node_id}", tags=["service"])
def change_worker(node_id: str, change: NodeChange, services: With) -> Node:
    """Drain a node, or use it again."""
    return services.store.set_schedulable(node_id, change.schedulable)


@router.get("/audit", tags=["service"])
def audit(services: With, kind: AuditKind | None = None, limit: Limit = 100) -> list[AuditEntry]:
    """Who asked for what, newest first: `administration` (keys, deletions, drained workers), other `requests` except
    reading, and `refusals` for want of a key, equal ones of ten seconds counted together."""
    return services.keys.audit([kind] if kind else AUDIT, limit)


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", tags=["service"])
async def healthz() -> Health:
    """This process answers."""
    # in no thread: a Redis that hangs may hold all of them
    return Health(status="ok")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", tags=["service"])
def readyz(services: With) -> Health:
    """Redis answers, and there is a live worker."""
    if not any(node.live for node in services.store.list_nodes()):
        raise Refusal(503, "no_worker", "no worker is live; start one: trainmaster worker")
    return Health(status="ready")


@router.get(
    "/metrics",
    tags=["service"],
    response_class=PlainTextResponse,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def prometheus(services: With) -> Response:
    """For Prometheus: jobs by status, waiting times, speed and loss of running jobs, requests, streams."""
    return Response(generate_latest(services.monitor.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/", include_in_schema=False)
def page() -> FileResponse:
    return FileResponse(STATIC / "index.html", headers=PAGE_HEADERS)
