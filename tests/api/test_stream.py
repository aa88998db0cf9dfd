"""Server-sent events: live, in order, each once, resumable, with an end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx2
import pytest
import redis

from gptcore.events import Notice
from tests.api.server import FakeRun, Server, evaluated, step, train_spec
from tests.conftest import wait_until
from worker.store import Store


@contextmanager
def stream(http: httpx2.Client, path: str, **headers: str) -> Iterator[Iterator[httpx2.ServerSentEvent]]:
    """The messages that carry data."""
    with http.stream("GET", path, headers={"Accept": "text/event-stream", **headers}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        yield (message for message in httpx2.EventSource(response) if message.data)


def test_a_stream_gives_what_was_and_what_comes_and_ends(http: httpx2.Client, run: FakeRun) -> None:
    run.write(step(1, 3.0))
    with stream(http, f"/jobs/{run.id}/events") as messages:
        first = next(messages)
        assert (first.id, first.event, json.loads(first.data)["train_loss"]) == ("1-1", "step", 3.0)
        run.write(evaluated(1, 2.5))
        second = next(messages)
        assert (second.id, second.event, json.loads(second.data)["val_loss"]) == ("1-2", "evaluated", 2.5)
        run.write(Notice(message="multi\nline"))
        assert json.loads(next(messages).data)["message"] == "multi\nline"
        run.end("succeeded")
        end = next(messages)
        assert (end.event, json.loads(end.data)) == ("end", {"status": "succeeded"})
        assert list(messages) == []


def test_a_stream_goes_on_behind_the_last_event_seen(http: httpx2.Client, run: FakeRun) -> None:
    run.write(*(step(i) for i in range(1, 6)))
    run.begin_attempt()
    run.write(*(step(i) for i in range(4, 8)))
    run.end()
    path = f"/jobs/{run.id}/events"
    with stream(http, path) as messages:
        every = [message.id for message in messages if message.event != "end"]
    assert every == [*(f"1-{i}" for i in range(1, 6)), *(f"2-{i}" for i in range(1, 5))]
    for seen in range(1, len(every) + 1):
        with stream(http, path, **{"Last-Event-ID": every[seen - 1]}) as messages:
            assert [message.id for message in messages if message.event != "end"] == every[seen:]
    with stream(http, f"{path}?after={every[2]}") as messages:
        assert next(messages).id == every[3]
    # a browser that reconnects asks for the same URL again: what it has seen since counts
    with stream(http, f"{path}?after={every[2]}", **{"Last-Event-ID": every[6]}) as messages:
        assert next(messages).id == every[7]


def test_the_stream_of_metrics_carries_numbers_only(http: httpx2.Client, run: FakeRun) -> None:
    run.write(Notice(message="eager"), step(1), Notice(message="still"), evaluated(1, 2.0))
    run.end("failed")
    with stream(http, f"/jobs/{run.id}/metrics") as messages:
        assert [(m.event, m.id) for m in messages] == [("step", "1-2"), ("evaluated", "1-4"), ("end", "1-4")]


def test_a_job_cancelled_in_the_queue_ends_its_stream(http: httpx2.Client) -> None:
    job_id = http.post("/jobs", json=train_spec()).json()["id"]
    with stream(http, f"/jobs/{job_id}/events") as messages:
        http.post(f"/jobs/{job_id}/cancel")
        assert json.loads(next(messages).data) == {"status": "cancelled"}


def test_pages_of_events_join_without_gap(http: httpx2.Client, run: FakeRun) -> None:
    run.write(*(step(i) for i in range(1, 8)))
    seen, query = [], {"limit": "3"}
    while True:
        page = http.get(f"/jobs/{run.id}/events", params=query).json()
        seen += [(event["type"], event["step"]) for event in page["data"]]
        if not page["has_more"]:
            break
        query["after"] = page["next"]
    assert seen == [("step", i) for i in range(1, 8)]


def test_watchers_leave_requests_their_threads(server: Server, run: FakeRun) -> None:
    """More streams than the server has threads for routes, and it still answers."""
    limits = httpx2.Limits(max_connections=None)
    with httpx2.Client(base_url=server.url, timeout=30, trust_env=False, limits=limits) as http:
        open_streams = [stream(http, f"/jobs/{run.id}/events") for _ in range(60)]
        run.write(step(1))
        try:
            for one in open_streams:
                assert next(one.__enter__()).id == "1-1"
            assert http.get(f"/jobs/{run.id}").status_code == 200
        finally:
            run.end()
            for one in open_streams:
                one.__exit__(None, None, None)


def test_a_watcher_who_leaves_takes_its_connection_along(http: httpx2.Client, run: FakeRun, redis_url: str) -> None:
    run.write(step(1))
    with redis.Redis.from_url(redis_url) as client:

        def readers() -> int:
            return sum(connection["cmd"] == "xread" for connection in client.client_list())

        for _ in range(5):
            with stream(http, f"/jobs/{run.id}/events") as messages:
                next(messages)
                wait_until(readers)
        wait_until(lambda: readers() == 0)


@pytest.mark.parametrize("attempt", [None, 1])
def test_a_log_is_shown_as_text(http: httpx2.Client, run: FakeRun, attempt: int | None) -> None:
    query = {"attempt": attempt} if attempt else {}
    path = f"/jobs/{run.id}/logs"
    assert (http.get(path, params=query).status_code, http.get(path).json()["code"]) == (404, "log_not_found")
    run.log_file.write_text("<b>loss</b> 2.5\n")
    answer = http.get(path, params=query)
    assert (answer.text, answer.headers["content-type"]) == ("<b>loss</b> 2.5\n", "text/plain; charset=utf-8")
    assert http.get(path, params={"attempt": 9}).status_code == 404


def test_an_event_of_an_unknown_type_does_not_stop_a_stream(
    http: httpx2.Client, new_run: Callable[..., FakeRun], store: Store
) -> None:
    """A newer trainer may report what this server does not know yet."""
    run = new_run()
    store.ship(run.id, run.number, "0-0", [("1-1", '{"type": "novel", "attempt": 1, "seq": 1}')], {})
    run.end()
    with stream(http, f"/jobs/{run.id}/events") as messages:
        assert [message.event for message in messages] == ["novel", "end"]
