"""Server-sent events: live, in order, each once, resumable, with an end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from pathlib import Path

import httpx2
import pytest
import redis

from api import hub
from api.stream import log_stream
from gptcore.events import Notice
from tests.api.server import FakeRun, Server, evaluated, step, train_spec
from tests.conftest import wait_until
from worker.keys import KEYS
from worker.settings import Settings
from worker.store import Store


@contextmanager
def stream(http: httpx2.Client, path: str, **headers: str) -> Iterator[Iterator[httpx2.ServerSentEvent]]:
    """The messages that carry data, changes of status aside."""
    with raw_stream(http, path, **headers) as messages:
        yield (message for message in messages if message.event != "status")


@contextmanager
def raw_stream(http: httpx2.Client, path: str, **headers: str) -> Iterator[Iterator[httpx2.ServerSentEvent]]:
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


def test_changes_of_status_stand_between_events_once_and_in_order(
    http: httpx2.Client, run: FakeRun, store: Store
) -> None:
    path = f"/jobs/{run.id}/events"
    with raw_stream(http, path) as messages:
        live = [next(messages) for _ in range(3)]  # those before its first event
        run.write(step(1), step(2))
        live += [next(messages) for _ in range(2)]
        run.begin_attempt()
        run.write(step(2))
        run.end()
        live += [message for message in messages if message.event != "end"]
    said = [json.loads(message.data) for message in live]
    assert [event.get("step") or event["to_status"] for event in said] == [
        *("queued", "starting", "running", 1, 2, "recovering", "starting", "running", 2, "succeeded"),
    ]
    ids = [message.id for message in live]
    assert ids == [
        *("0-0.1", "0-0.2", "0-0.3", "1-1", "1-2", "1-2.4", "1-2.5", "1-2.6", "2-1", "2-1.7"),
    ]
    assert [event["id"] for event in said if event["type"] == "status"] == [one for one in ids if "." in one]
    for seen, last in enumerate(ids, 1):
        with raw_stream(http, path, **{"Last-Event-ID": last}) as messages:
            assert [message.id for message in messages if message.event != "end"] == ids[seen:]
        page = http.get(path, params={"after": last, "limit": 2}).json()
        assert page["data"] == said[seen : seen + 2]
        assert page["next"] == (ids[seen + 1] if seen + 2 < len(ids) else None)


def test_events_that_redis_keeps_no_longer_come_from_the_run_directory(
    http: httpx2.Client, run: FakeRun, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.store.EVENTS_KEPT", 100)
    run.write(*(step(i) for i in range(1, 151)))
    run.begin_attempt()
    run.write(*(step(i) for i in range(151, 501)))
    run.end()
    assert len(store.read_events(run.id)) < 350
    every = [*(f"1-{i}" for i in range(1, 151)), *(f"2-{i}" for i in range(1, 351))]
    with stream(http, f"/jobs/{run.id}/events") as messages:
        assert [message.id for message in messages if message.event != "end"] == every
    for after in ("0-0", "1-70", "1-150", "1-150.5", "2-40"):
        page = http.get(f"/jobs/{run.id}/events", params={"after": after, "limit": 300}).json()["data"]
        steps = [event["step"] for event in page if event["type"] == "step"]
        first = every.index(after.partition(".")[0]) + 1 if after != "0-0" else 0
        assert steps == list(range(first + 1, first + 1 + len(steps)))
        assert len(page) == 300


def test_a_run_that_redis_has_forgotten_is_told_from_its_files(http: httpx2.Client, run: FakeRun, store: Store) -> None:
    run.write(*(step(i) for i in range(1, 6)))
    run.end()
    store._redis.delete(KEYS["events"] + run.id)  # as after a month
    page = http.get(f"/jobs/{run.id}/events").json()["data"]
    assert [event["step"] for event in page if event["type"] == "step"] == [1, 2, 3, 4, 5]
    with stream(http, f"/jobs/{run.id}/events", **{"Last-Event-ID": "1-2"}) as messages:
        assert [message.event for message in messages] == ["step", "step", "step", "end"]


@pytest.mark.parametrize("damaged", ["\0" * 20, '{"type": "step", "st', "{}", "1"])
def test_a_damaged_line_of_a_forgotten_run_is_passed_over(
    http: httpx2.Client, run: FakeRun, store: Store, damaged: str
) -> None:
    run.write(*(step(i) for i in range(1, 4)))
    lines = run.events_file.read_text().splitlines()
    run.events_file.write_text("\n".join([lines[0], damaged, lines[2]]) + "\n")
    store._redis.delete(KEYS["events"] + run.id)
    page = http.get(f"/jobs/{run.id}/events").json()["data"]
    assert [event["step"] for event in page if event["type"] == "step"] == [1, 3]
    run.end()
    with stream(http, f"/jobs/{run.id}/events") as messages:
        assert [message.id for message in messages if message.event != "end"] == ["1-1", "1-3"]


@pytest.mark.parametrize("time", ["yesterday", "2026-01-01T00:00:00", 5, None, "2026-01-01T00:00:00Z"])
def test_a_damaged_time_is_no_reason_to_end_a_stream(time: object) -> None:
    line = json.dumps({"type": "new", "attempt": 1, "seq": 1, "time": time})
    made_at = hub._message("1-1", line).made_at
    assert made_at is None or made_at.tzinfo is not None
    assert (made_at is not None) == str(time).endswith("Z")


def test_a_stream_may_begin_with_the_last_events(http: httpx2.Client, run: FakeRun) -> None:
    run.write(*(step(number) for number in range(1, 10)))
    page = http.get(f"/jobs/{run.id}/events", params={"last": 3}).json()
    assert [event["seq"] for event in page["data"] if event["type"] == "step"] == [7, 8, 9]
    run.end()
    with stream(http, f"/jobs/{run.id}/events?last=2") as messages:
        assert [next(messages).id for _ in range(3)] == ["1-8", "1-9", "1-9.4"]
    with stream(http, f"/jobs/{run.id}/events?last=2", **{"Last-Event-ID": "1-5"}) as messages:
        assert next(messages).id == "1-6"  # who comes back misses nothing
    assert http.get(f"/jobs/{run.id}/events", params={"after": "\u0661-\u0661"}).status_code == 422


def test_pages_of_events_join_without_gap(http: httpx2.Client, run: FakeRun) -> None:
    run.write(*(step(i) for i in range(1, 8)))
    seen, query = [], {"limit": "3"}
    while True:
        page = http.get(f"/jobs/{run.id}/events", params=query).json()
        seen += [(event["type"], event["step"]) for event in page["data"] if event["type"] != "status"]
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
    for _ in range(5):
        with stream(http, f"/jobs/{run.id}/events") as messages:
            next(messages)
            wait_until(lambda: xreads(redis_url))
    wait_until(lambda: xreads(redis_url) == 0)


def test_a_reader_ends_at_whatever_moment_its_last_watcher_leaves(
    settings: Settings, store: Store, run: FakeRun
) -> None:
    async def leave_after(turns: int) -> None:
        streams = hub.Hub(store, settings.runs)
        feed = streams._join(run.id, "0-0")
        for _ in range(turns):
            await asyncio.sleep(0)
        streams._leave(run.id, feed)
        assert feed.reader is not None
        _, left = await asyncio.wait([feed.reader], timeout=2)
        assert not left, turns

    for turns in range(0, 200, 2):
        asyncio.run(leave_after(turns))


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


def xreads(redis_url: str) -> int:
    with redis.Redis.from_url(redis_url) as client:
        return sum(connection["cmd"] == "xread" for connection in client.client_list())


def test_many_watchers_of_a_job_are_one_reader_of_redis(server: Server, run: FakeRun, redis_url: str) -> None:
    limits = httpx2.Limits(max_connections=None)
    with httpx2.Client(base_url=server.url, timeout=30, trust_env=False, limits=limits) as http, ExitStack() as left:
        run.write(*(step(i) for i in range(1, 4)))
        watching = [left.enter_context(stream(http, f"/jobs/{run.id}/events")) for _ in range(20)]
        assert [[next(one).id for _ in range(3)] for one in watching] == [["1-1", "1-2", "1-3"]] * 20
        wait_until(lambda: xreads(redis_url) == 1)
        watching.append(left.enter_context(stream(http, f"/jobs/{run.id}/events", **{"Last-Event-ID": "1-2"})))
        assert next(watching[-1]).id == "1-3"
        run.write(step(4))
        assert [next(one).id for one in watching] == ["1-4"] * 21
        assert xreads(redis_url) == 1
        run.end()
        assert {next(one).event for one in watching} == {"end"}
    wait_until(lambda: xreads(redis_url) == 0)


@pytest.mark.parametrize("ahead", ["999-1", "1-1.999"])
def test_who_asks_for_what_is_still_to_come_delays_nobody(
    http: httpx2.Client, run: FakeRun, redis_url: str, ahead: str
) -> None:
    run.write(step(1))
    path = f"/jobs/{run.id}/events"
    with raw_stream(http, path, **{"Last-Event-ID": ahead}), raw_stream(http, path) as messages:
        assert [next(messages).id for _ in range(4)][-1] == "1-1"
        wait_until(lambda: xreads(redis_url))
        began = time.monotonic()
        http.post(f"/jobs/{run.id}/pause")
        assert next(messages).id == "1-1.4"
        run.write(step(2))
        assert next(messages).id == "1-2"
        assert time.monotonic() - began < 5


def test_who_is_too_slow_misses_nothing_and_holds_up_nobody(
    run: FakeRun, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "EVENTS_KEPT", 5)
    seen: dict[str, list[str]] = {"slow": [], "fast": []}

    async def watch(all_watch: hub.Hub, who: str, go_on: asyncio.Event) -> None:
        async with aclosing(all_watch.watch(run.id, "0-0")) as news:
            async for messages in news:
                seen[who] += [message.id for message in messages if message.type != "status"]
                if len(seen[who]) > 1:  # it has joined by then
                    await go_on.wait()

    async def both() -> None:
        all_watch, now, later = hub.Hub(store, settings.runs), asyncio.Event(), asyncio.Event()
        now.set()
        tasks = [asyncio.create_task(watch(all_watch, *one)) for one in (("slow", later), ("fast", now))]
        await asyncio.sleep(0.5)
        await asyncio.to_thread(run.write, step(2))
        while not len(seen["slow"]) == len(seen["fast"]) == 2:
            await asyncio.sleep(0.05)
        for number in range(3, 120):
            await asyncio.to_thread(run.write, step(number))
            await asyncio.sleep(0)
        await asyncio.to_thread(run.end)
        await asyncio.wait_for(tasks[1], 20)
        assert len(seen["slow"]) < 20 and len(seen["fast"]) == 119
        later.set()
        await asyncio.wait_for(tasks[0], 20)

    run.write(step(1))
    asyncio.run(both())
    assert seen["slow"] == seen["fast"] == [f"1-{i}" for i in range(1, 120)]


def test_all_who_watch_logs_share_one_poll(
    run: FakeRun, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls: list[list[str]] = []
    statuses = store.statuses
    monkeypatch.setattr(store, "statuses", lambda job_ids: polls.append(list(job_ids)) or statuses(job_ids))

    async def watch(shared: hub.Hub, began: list[float]) -> bytes:
        said = b""
        async for part in log_stream(shared, run.directory, run.id, None, None).body_iterator:
            began.append(time.monotonic())
            assert isinstance(part, bytes)
            said += part
        return said

    async def all_of_them() -> list[bytes]:
        shared, began = hub.Hub(store, settings.runs), list[float]()
        watching = [asyncio.create_task(watch(shared, began)) for _ in range(30)]
        while len(began) < 30:
            await asyncio.sleep(0.01)
        await asyncio.sleep(1.2)
        assert len(polls) <= 30 + 4  # those who came at once looked for themselves first
        run.log_file.write_text("a line\n")
        await asyncio.to_thread(run.end)
        return await asyncio.wait_for(asyncio.gather(*watching), 20)

    (said,) = set(asyncio.run(all_of_them()))
    assert b"data: a line" in said and b"event: end" in said


def test_a_server_told_to_stop_ends_its_streams_at_once_and_quietly(
    run: FakeRun, settings: Settings, tmp_path: Path
) -> None:
    run.write(step(1))
    run.log_file.write_text("a line\n")
    environment = {**os.environ, **settings.to_environment()}
    with socket.create_server(("127.0.0.1", 0)) as listener, (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "trainmaster.serve", str(listener.fileno())]
        process = subprocess.Popen(command, env=environment, pass_fds=[listener.fileno()], stdout=log, stderr=log)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx2.Client(base_url=url, timeout=30, trust_env=False) as http:
            paths = [f"/jobs/{run.id}/{what}" for what in ("events", "metrics", "logs")]
            with ExitStack() as left:
                watching = [left.enter_context(stream(http, path)) for path in paths]
                assert [next(one).event for one in watching] == ["step", "step", "log"]
                process.send_signal(signal.SIGTERM)
                began = time.monotonic()
                assert [list(one) for one in watching] == [[], [], []]  # without an end: they are to be opened again
            process.wait(10)
    assert time.monotonic() - began < 4
    said = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert {line["level"] for line in said} <= {"info"}, said  # no traceback, no word of tasks cancelled
