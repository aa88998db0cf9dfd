"""Answers that many ask for at the same time: made once, never older than the request."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from fastapi import Request, Response

from api.series import Run
from api.shared_answers import SharedAnswers
from tests.api.server import FakeRun, Server, step
from worker.store import Store

REQUEST = Request({"type": "http", "headers": [(b"accept-encoding", b"gzip")]})


class Source:
    """What answers are made of: `version` says what they are now."""

    def __init__(self) -> None:
        self.version = 0
        self.made = 0

    async def ask(self, answers: SharedAnswers, question: str = "list") -> Response:
        return await answers.answer(REQUEST, question, self._version, self._make)

    async def _version(self) -> int:
        return self.version

    async def _make(self) -> bytes:
        self.made += 1
        await asyncio.sleep(0.01)
        return json.dumps([self.version] * 1000).encode()


def test_who_asks_at_the_same_time_gets_one_answer() -> None:
    async def ask() -> None:
        answers, source = SharedAnswers(), Source()
        got = await asyncio.gather(*(source.ask(answers) for _ in range(45)))
        assert len({bytes(one.body) for one in got}) == source.made == 1
        assert json.loads(gzip.decompress(got[0].body)) == [0] * 1000
        source.version = 1
        assert json.loads(gzip.decompress((await source.ask(answers)).body)) == [1] * 1000

    asyncio.run(ask())


def test_kept_answers_take_no_more_than_their_budget() -> None:
    async def ask() -> None:
        answers, source = SharedAnswers(budget=20_000), Source()
        for number in range(20):
            await source.ask(answers, f"list {number}")
        assert answers.size <= 20_000 and source.made == 20
        await source.ask(answers, "list 19")
        assert source.made == 20
        await source.ask(answers, "list 0")
        assert source.made == 21

    asyncio.run(ask())


@pytest.mark.parametrize("path", ["/jobs/{run}/metrics", "/compare?job={run}&job={other}"])
def test_many_who_open_a_run_have_it_read_once(
    http: httpx2.Client, new_run: Callable[..., FakeRun], run: FakeRun, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = new_run()
    run.write(*(step(number) for number in range(1, 100)))
    read: list[Any] = []
    monkeypatch.setattr(Run, "metrics", noting(read, Run.metrics))
    path = path.format(run=run.id, other=other.id)
    with ThreadPoolExecutor(10) as pool:
        answers = [*pool.map(lambda _: http.get(path), range(20))]
    assert {one.status_code for one in answers} == {200} and len({one.text for one in answers}) == 1
    assert len(read) == len({id(one[0]) for one in read})
    plain = http.get(path, headers={"Accept-Encoding": "identity"})
    assert "Content-Encoding" not in plain.headers and plain.text == answers[0].text
    run.write(step(100), ship=False)
    assert http.get(path).text != answers[0].text


@pytest.mark.parametrize("path", ["/jobs?view=summary", "/jobs/{run}"])
def test_many_who_poll_jobs_have_them_read_once_until_one_changes(
    server: Server, run: FakeRun, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[object] = []
    monkeypatch.setattr(Store, "_get_jobs", noting(reads, Store._get_jobs))
    path = path.format(run=run.id)
    with ThreadPoolExecutor(10) as pool:
        answers = [*pool.map(lambda _: server.http.get(path), range(20))]
    assert {one.status_code for one in answers} == {200} and len({one.text for one in answers}) == 1
    assert len(reads) == 1
    run.report(step=7)
    assert '"step":7' in server.http.get(path).text
    run.end()
    server.http.delete(f"/jobs/{run.id}")
    assert run.id not in server.http.get("/jobs?view=summary").text
    assert server.http.get(f"/jobs/{run.id}").status_code == 404


def noting(calls: list[object], function: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return function(*args, **options)

    return noted
