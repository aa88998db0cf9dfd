"""The Python client of a Trainmaster server.

    from trainmaster import Client

    client = Client()
    job = client.submit(spec)
    for event in client.events(job["id"]):
        ...

What goes in and comes out is JSON as the server speaks it. Every call is safe to send twice, so a
lost connection or a server that restarts is tried again before it becomes an error. This module imports
none of the server's packages: a file `worker.py` beside a user's script would be imported in their place.
"""

import ipaddress
import json
import os
import time
import uuid
from collections.abc import Iterator
from typing import Any, Self, cast
from urllib.parse import quote

import httpx2

Json = dict[str, Any]
LOCAL_URL = "http://127.0.0.1:8000"  # of `trainmaster up`
CALL_SECONDS = 3.0  # how long a server may be away within a call
STREAM_SECONDS = 60.0  # and within a stream: it may be restarting
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 2.0
SILENCE_SECONDS = 45.0  # a stream says something every 10 s
MAY_PASS = {None, 429, 502, 503, 504}  # statuses of a server or its Redis that is away for a moment


class TrainmasterError(Exception):
    """The server refused, or could not be reached.

    `status` is the HTTP status, None where there was no answer; `code` names the situation
    ("invalid_spec", "job_not_found", "unreachable", ...); `errors` are {"pointer", "message"} of
    what is wrong in the body, one an error.
    """

    def __init__(self, message: str, *, status: int | None = None, code: str, errors: list[Json] | None = None):
        self.status = status
        self.code = code
        self.errors = errors or []
        super().__init__(message)


class Client:
    """`url` is the server's; by default TRAINMASTER_URL's, else that of a local `trainmaster up`.

    `api_key` is needed once the server has keys; by default TRAINMASTER_API_KEY's. Raises TrainmasterError
    for what can be neither.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None):
        self.url = (url or os.environ.get("TRAINMASTER_URL", "").strip() or LOCAL_URL).rstrip("/")
        key = api_key or os.environ.get("TRAINMASTER_API_KEY", "").strip()
        try:
            self._http = httpx2.Client(
                base_url=self.url,
                headers={"Authorization": f"Bearer {key}"} if key else None,
                timeout=httpx2.Timeout(30.0, connect=5.0),
                trust_env=not _is_loopback(self.url),  # a proxy cannot reach this machine's own server
            )
        except (httpx2.InvalidURL, UnicodeEncodeError) as error:
            what = "the API key" if isinstance(error, UnicodeEncodeError) else f"the URL {self.url!r}"
            raise TrainmasterError(f"{what} cannot be used: {error}", code="bad_setting") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def submit(self, spec: Json, idempotency_key: str | None = None) -> Json:
        """Queue a job spec, or {"from": job id, "overrides": changes to its spec} → the job.

        With the key of an earlier call: that call's job.
        """
        key = idempotency_key or str(uuid.uuid4())
        return self._call("POST", "/jobs", json=spec, headers={"Idempotency-Key": key})

    def plan(self, spec: Json) -> Json:
        """What a spec comes to, nothing queued → {"spec": resolved, "plan": numbers}."""
        return self._call("POST", "/jobs/plan", json=spec)

    def job(self, job_id: str) -> Json:
        return self._call("GET", _job(job_id))

    def jobs(self, **filters: str | int | None) -> Json:
        """A page of jobs, newest first → {"data", "has_more", "next"}. `after` takes a page's `next`."""
        return self._call("GET", "/jobs", params={name: value for name, value in filters.items() if value is not None})

    def cancel(self, job_id: str) -> Json:
        """Ask for a job's end → the job; it ends once it is `cancelled`."""
        return self._call("POST", f"{_job(job_id)}/cancel")

    def pause(self, job_id: str) -> Json:
        """Have a job save a checkpoint and wait → the job; it waits once it is `paused`."""
        return self._call("POST", f"{_job(job_id)}/pause")

    def resume(self, job_id: str) -> Json:
        """Queue a paused job again → the job."""
        return self._call("POST", f"{_job(job_id)}/resume")

    def delete(self, job_id: str) -> None:
        """Delete a job that has ended, with its run directory."""
        self._call("DELETE", _job(job_id))

    def workers(self) -> list[Json]:
        """Every node known, with its slots and who has them."""
        return cast(list[Json], self._call("GET", "/workers"))

    def metrics(self, job_id: str, **query: Any) -> Json:
        """Return a run's curves: {"job_id", "last_event_id", "series": {key: {"step": [], "value": []}}}.

        A curve has at most `max_points` points, by default 2,000; `from_step` and `to_step` choose a part of it.
        """
        return self._call("GET", f"{_job(job_id)}/metrics", params=query)

    def compare(self, *job_ids: str, **query: Any) -> Json:
        """Several runs on one axis (`by`: step, tokens, seconds), what differs in their specs, and where they part."""
        return self._call("GET", "/compare", params={"job": list(job_ids), **query})

    def events(self, job_id: str, after: str | None = None, last: int | None = None) -> Iterator[Json]:
        """Yield every event of a job, live, until the job has ended; `after` is the id of the last one known.

        Without `after`, `last` (1 to 1000) begins with this many of the newest events. Reconnects where it left off:
        no event is missed or seen twice.
        """
        path = f"{_job(job_id)}/events" + (f"?last={last}" if last is not None else "")
        return (json.loads(data) for data in self._follow(path, after))

    def log(self, job_id: str) -> Iterator[str]:
        """What a job's trainers print, from the newest attempt's last MiB on, until the job has ended."""
        return self._follow(f"{_job(job_id)}/logs")

    def _follow(self, path: str, after: str | None = None) -> Iterator[str]:
        """A stream's data, over reconnections."""
        trial = _Trial(STREAM_SECONDS)
        while True:
            asked_at = time.monotonic()
            try:
                for event in self._stream(path, after):
                    if event.event == "end":
                        return
                    after, trial = event.id, _Trial(STREAM_SECONDS)
                    yield event.data
                failure = self._unreachable("it closed the stream")  # without an end: the server is going down
            except httpx2.TransportError as error:
                failure = self._unreachable(error)
            except TrainmasterError as error:
                failure = error
            # it had no event, and yet it was there: a server that is not is given up sooner
            if time.monotonic() - asked_at > STREAM_SECONDS:
                trial = _Trial(STREAM_SECONDS)
            trial.failed(failure)

    def _stream(self, path: str, after: str | None) -> Iterator[httpx2.ServerSentEvent]:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
        timeout = httpx2.Timeout(SILENCE_SECONDS, connect=5.0)
        with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
            if not response.is_success:
                response.read()
                raise _refusal(response)
            yield from (event for event in httpx2.EventSource(response) if event.data)

    def _call(self, method: str, path: str, **request: Any) -> Json:
        trial = _Trial(CALL_SECONDS)
        while True:
            try:
                response = self._http.request(method, path, **request)
            except httpx2.TransportError as error:
                trial.failed(self._unreachable(error))
                continue
            if response.is_success:
                try:
                    return cast(Json, response.json() if response.content else {})
                except ValueError as error:
                    why = f"{self.url}{path} answers what is no JSON; is the URL a Trainmaster server's?"
                    raise TrainmasterError(why, status=response.status_code, code="no_json") from error
            trial.failed(_refusal(response))

    def _unreachable(self, why: object) -> TrainmasterError:
        way_out = "start it with `trainmaster up`, or set TRAINMASTER_URL or --url"
        return TrainmasterError(f"the server at {self.url} cannot be reached: {why}; {way_out}", code="unreachable")


class _Trial:
    """Tries of one thing, with longer pauses between them, until patience since the first failure ends."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._give_up_at: float | None = None
        self._pause = FIRST_PAUSE_SECONDS

    def failed(self, error: TrainmasterError) -> None:
        """Wait before the next try. Raises the error where another try is of no use, or none is left."""
        self._give_up_at = self._give_up_at or time.monotonic() + self._seconds
        if error.status not in MAY_PASS or time.monotonic() + self._pause > self._give_up_at:
            raise error
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)


def _job(job_id: str) -> str:
    return f"/jobs/{quote(job_id, safe='')}"


def _refusal(response: httpx2.Response) -> TrainmasterError:
    """The server's problem+json as an exception; something else's answer (a proxy's) by its status."""
    is_problem = response.headers.get("content-type", "").startswith("application/problem+json")
    problem: Json = response.json() if is_problem else {"detail": response.text[:500] or response.reason_phrase}
    errors: list[Json] = problem.get("errors", [])
    said = [f"{error['pointer'] or '/'}: {error['message']}" for error in errors] or [problem["detail"]]
    code = problem.get("code", "http_error")
    return TrainmasterError("\n".join(said), status=response.status_code, code=code, errors=errors)


def _is_loopback(url: str) -> bool:
    host = httpx2.URL(url).host
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
