"""Runs beside each other: one axis, what differs, and the step where they part."""

from __future__ import annotations

import math
from collections.abc import Callable

import httpx2

from gptcore.events import Started
from tests.api.server import FakeRun, evaluated, step
from trainmaster import Client


def started(torch: str, dataset_sha256: str) -> Started:
    return Started(
        kind="train", device="cpu", device_name="a cpu", world_size=1, threads=1, precision="fp32", compiled=False,
        micro_batch_size=1, grad_accum_steps=1, parameters=1, total_steps=12, tokens_per_step=256,
        versions={"torch": torch, "python": "3.11"}, dataset_sha256=dataset_sha256,
    )  # fmt: skip


def test_runs_are_aligned_and_their_differences_named(client: Client, new_run: Callable[..., FakeRun]) -> None:
    first = new_run(labels={"a/b": "1"})
    first.write(started("2.13", "d0"), *(step(i, 5 - i, step_seconds=0.5) for i in range(1, 7)), evaluated(6, 2.5))
    first.end()
    second = new_run(tokens_per_step=512, optim={"lr": 0.01})
    second.write(started("2.14", "d1"), *(step(i, 5 - i + (i > 3) / 1e9) for i in range(2, 6)), evaluated(6, 2.5))
    found = client.compare(first.id, second.id)
    assert found["jobs"] == [first.id, second.id]
    assert found["series"]["train_loss"][1] == {"x": [2, 3, 4, 5], "value": [3, 2, 1 + 1e-9, 1e-9]}
    assert found["parted_at"] == {"train_loss": 4, "val_loss": None}
    differences = {one["pointer"]: one["values"] for one in found["differences"]}
    assert differences == {
        "/spec/labels/a~1b": ["1", None],
        "/spec/tokens_per_step": [256, 512],
        "/spec/optim/lr": [0.003, 0.01],
        "/versions/torch": ["2.13", "2.14"],
        "/dataset_sha256": ["d0", "d1"],
    }
    by_tokens = client.compare(first.id, second.id, by="tokens", keys=["train_loss"])["series"]
    assert [by_tokens["train_loss"][run]["x"][:2] for run in (0, 1)] == [[256, 512], [1024, 1536]]
    by_seconds = client.compare(first.id, second.id, by="seconds")["series"]["train_loss"]
    assert by_seconds[0]["x"] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


def test_an_evaluation_of_a_step_that_was_skipped_stands_where_its_run_was(
    client: Client, new_run: Callable[..., FakeRun]
) -> None:
    one, other = new_run(), None
    one.write(evaluated(0, 5.0), *(step(i, step_seconds=0.5) for i in (1, 2, 4)), evaluated(3, 2.5), evaluated(4, 2.0))
    one.end()
    other = new_run()
    found = client.compare(one.id, other.id, by="seconds")["series"]["val_loss"][0]
    assert found == {"x": [0.0, 1.0, 1.5], "value": [5.0, 2.5, 2.0]}


def test_runs_alike_part_nowhere_even_where_their_loss_is_no_number(
    client: Client, new_run: Callable[..., FakeRun]
) -> None:
    one, other = new_run(), None
    one.write(step(1, 2.0), step(2, math.nan))
    one.end()
    other = new_run()
    other.write(step(1, 2.0), step(2, math.nan), step(3, 1.0))
    found = client.compare(one.id, other.id)
    assert (found["differences"], found["parted_at"]["train_loss"]) == ([], None)
    assert found["series"]["train_loss"][0]["value"] == [2.0, "NaN"]


def test_a_comparison_wants_two_jobs_that_are_there(http: httpx2.Client, run: FakeRun) -> None:
    for query in ({}, {"job": [run.id]}, {"job": [run.id, run.id]}):
        answer = http.get("/compare", params=query)
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/query/job")
    assert http.get("/compare", params={"job": [run.id, "job-0"]}).json()["code"] == "job_not_found"
