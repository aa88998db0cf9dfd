"""What the server says about itself: Prometheus's numbers, and a log line of JSON a request."""

import json
import logging
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from worker.job import Status
from worker.store import Store

BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
SLOW_SECONDS = 1.0
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")
STATUSES: tuple[str, ...] = Status.__args__  # type: ignore[attr-defined]

log = logging.getLogger(__name__)
_request_id: ContextVar[str] = ContextVar("request_id", default="")


class Monitor:
    """The numbers of one application."""

    def __init__(self, store: Store):
        self.registry = CollectorRegistry()
        self.request_seconds = Histogram(
            "trainmaster_request_seconds",
            "From a request to the head of its answer; of a stream, to its opening",
            ["method", "route", "status"], buckets=BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.stream_lag_seconds = Histogram(
            "trainmaster_stream_lag_seconds",
            "From a trainer's event until those who watch are told",
            buckets=BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.registry.register(_Jobs(store))


class _Jobs(Collector):
    """Counted anew at each scrape."""

    def __init__(self, store: Store):
        self._store = store

    def collect(self) -> Iterator[GaugeMetricFamily | SummaryMetricFamily]:
        found = self._store.census()
        statuses = dict.fromkeys(STATUSES, 0) | found.statuses
        yield _gauge("trainmaster_jobs", "Jobs by status", "status", statuses)
        yield SummaryMetricFamily(
            "trainmaster_queue_seconds",
            "From submission to start, of the jobs that started",
            count_value=found.started, sum_value=found.queue_seconds,
        )  # fmt: skip
        oldest = found.oldest_waiting_seconds
        yield _gauge("trainmaster_oldest_waiting_seconds", "Age of what waits longest", "pool", oldest)
        for name in ("tokens_per_second", "mfu", "train_loss", "recovery_seconds"):
            known = {job_id: job[name] for job_id, job in found.running.items() if name in job}
            yield _gauge(f"trainmaster_job_{name}", "Of each running job, the newest", "job", known)


def _gauge(name: str, what: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, what, labels=[label])
    for value_of, value in values.items():
        family.add_metric([value_of], value)
    return family


class Observed:
    """Gives each request an id, which its answer and every log line under it carry, and counts it."""

    def __init__(self, app: ASGIApp, monitor: Monitor):
        self._app = app
        self._monitor = monitor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", given) else secrets.token_hex(8)
        _request_id.set(request_id)
        began = time.monotonic()

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                self._note(scope, message["status"], headers.get("location", ""), time.monotonic() - began)
            await send(message)

        return await self._app(scope, receive, noting)

    def _note(self, scope: Scope, status: int, location: str, seconds: float) -> None:
        method, path = scope["method"], scope["path"]
        route = getattr(scope.get("route"), "path", "none")
        # a label is kept for good, and who asks may spell a method as he likes
        self._monitor.request_seconds.labels(method if method in METHODS else "other", route, status).observe(seconds)
        # reading that went well would fill a disk: pages poll
        dull = method in ("GET", "HEAD") and status < 400 and seconds < SLOW_SECONDS
        job = re.match(r"/jobs/(job-\w+)", path) or re.match(r"/jobs/(job-\w+)", location)
        fields = {"method": method, "path": path[:200], "status": status, "seconds": round(seconds, 4)}
        fields |= {"who": scope.get("state", {}).get("who", ""), "job_id": job[1] if job else None}
        log.log(logging.DEBUG if dull else logging.INFO, "request", extra={"fields": fields})


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        made_at = datetime.fromtimestamp(record.created, UTC).isoformat()
        line = {
            "time": made_at, "level": record.levelname.lower(), "message": record.getMessage(),
            "request_id": _request_id.get() or None, **getattr(record, "fields", {}),
        }  # fmt: skip
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_json_lines() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
