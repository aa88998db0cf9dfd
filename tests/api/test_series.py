"""Curves: read from the run directory, each step once, thinned without losing what matters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.series import Curve, RunCache
from tests.api.server import FakeRun, evaluated, step
from worker.job import BestCheckpoint


def curves(http: httpx2.Client, run: FakeRun, **query: Any) -> dict[str, Any]:
    answer = http.get(f"/jobs/{run.id}/metrics", params=query)
    assert answer.status_code == 200, answer.text
    series: dict[str, Any] = answer.json()["series"]
    return series


def test_metrics_are_what_the_run_directory_says(http: httpx2.Client, run: FakeRun) -> None:
    run.write(step(1, 3.0), step(2, 2.5, mfu=0.4), evaluated(2, 2.75), ship=False)
    series = curves(http, run)
    assert series["train_loss"] == {"step": [1, 2], "value": [3.0, 2.5]}
    assert series["val_loss"] == {"step": [2], "value": [2.75]}
    assert series["mfu"] == {"step": [2], "value": [0.4]}
    assert series["peak_memory_bytes"]["value"] == [0.0, 0.0]


def test_a_resumed_run_has_each_step_once_with_its_newest_value(http: httpx2.Client, run: FakeRun) -> None:
    run.write(*(step(i, 10 + i) for i in range(1, 6)))
    assert curves(http, run)["train_loss"]["step"] == [1, 2, 3, 4, 5]
    run.begin_attempt()
    run.write(step(3, 23), step(4, 24))
    assert curves(http, run)["train_loss"] == {"step": [1, 2, 3, 4, 5], "value": [11, 12, 23, 24, 15]}
    run.write(step(5, 25), step(6, 26))
    assert curves(http, run)["train_loss"] == {"step": [1, 2, 3, 4, 5, 6], "value": [11, 12, 23, 24, 25, 26]}


def test_the_answer_says_where_a_stream_goes_on(http: httpx2.Client, run: FakeRun) -> None:
    assert http.get(f"/jobs/{run.id}/metrics").json()["last_event_id"] == "0-0"
    run.write(step(1), evaluated(1, 2.0))
    assert http.get(f"/jobs/{run.id}/metrics").json()["last_event_id"] == "1-2"
    run.begin_attempt()
    run.write(step(2))
    assert http.get(f"/jobs/{run.id}/metrics").json()["last_event_id"] == "2-1"


def test_a_poll_reads_only_what_was_appended(http: httpx2.Client, run: FakeRun) -> None:
    run.write(step(1, 1.5), step(2, 2.5))
    before = curves(http, run)["train_loss"]
    size = run.events_file.stat().st_size
    with run.events_file.open("r+b") as file:
        file.write(b"\n" * size)  # had it been read again, this would show
    run.write(step(3, 3.5), ship=False)
    assert curves(http, run)["train_loss"] == {"step": [*before["step"], 3], "value": [*before["value"], 3.5]}


def test_the_runs_of_two_pages_of_the_list_are_read_once(tmp_path: Path) -> None:
    run_of = RunCache(tmp_path)
    first, again = ([run_of(f"job-{number}") for number in range(100)] for _ in range(2))
    assert all(one is other for one, other in zip(first, again, strict=True))


def test_a_torn_line_is_no_event_until_it_is_whole(http: httpx2.Client, run: FakeRun) -> None:
    run.write(step(1))
    line = step(2).model_copy(update={"attempt": 1, "seq": 2}).model_dump_json()
    with run.events_file.open("a") as file:
        file.write(line[:50])
        file.flush()
        assert curves(http, run)["train_loss"]["step"] == [1]
        file.write(line[50:] + "\n")
    assert curves(http, run)["train_loss"]["step"] == [1, 2]


@pytest.mark.parametrize(
    "damaged", ["\0" * 20, '{"type": "step", "st', "{}", "1", '{"type": "sampled", "attempt": 1, "seq": 2}']
)
def test_a_damaged_line_is_passed_over(http: httpx2.Client, run: FakeRun, damaged: str) -> None:
    run.write(step(1))
    with run.events_file.open("a") as file:
        file.write(f"{damaged}\n")
    run.write(step(2), ship=False)
    assert curves(http, run)["train_loss"]["step"] == [1, 2]


def test_values_that_are_no_numbers_are_strings(http: httpx2.Client, run: FakeRun) -> None:
    run.write(step(1, math.nan), step(2, math.inf), step(3, -math.inf), step(4, 1.0))
    assert curves(http, run)["train_loss"]["value"] == ["NaN", "Infinity", "-Infinity", 1.0]
    table = http.get(f"/jobs/{run.id}/metrics", params={"keys": "train_loss"}, headers={"Accept": "text/csv"}).text
    assert table == "step,train_loss\n1,NaN\n2,Infinity\n3,-Infinity\n4,1.0\n"


def test_a_jobs_results_that_are_no_numbers_are_the_same_strings(http: httpx2.Client, run: FakeRun) -> None:
    run.report(
        results={"val_loss": math.nan, "acc": math.inf}, best_checkpoint=BestCheckpoint(step=1, val_loss=math.inf)
    )
    for job in (http.get(f"/jobs/{run.id}").json(), http.get("/jobs").json()["data"][0]):
        assert job["results"] == {"val_loss": "NaN", "acc": "Infinity"}
        assert job["best_checkpoint"]["val_loss"] == "Infinity"


def test_keys_and_steps_can_be_chosen(http: httpx2.Client, run: FakeRun) -> None:
    run.write(*(step(i, i) for i in range(1, 10)))
    series = curves(http, run, keys=["train_loss", "lr"], from_step=3, to_step=5)
    assert series.keys() == {"train_loss", "lr"}
    assert series["train_loss"]["step"] == series["lr"]["step"] == [3, 4, 5]


def test_a_curve_is_bounded_unless_it_is_a_table(http: httpx2.Client, run: FakeRun) -> None:
    run.write(*(step(number, 1 / number) for number in range(1, 2301)), ship=False)
    series = curves(http, run, keys="train_loss")["train_loss"]
    assert 500 < len(series["step"]) <= 2000 and series["step"][-1] == 2300
    assert len(curves(http, run, keys="train_loss", max_points=2300)["train_loss"]["step"]) == 2300
    answer = http.get(f"/jobs/{run.id}/metrics", params={"keys": "train_loss"}, headers={"Accept": "text/csv"})
    assert answer.text.count("\n") == 2301
    assert http.get(f"/jobs/{run.id}/metrics", params={"max_points": 100_001}).status_code == 422


def test_a_list_gets_its_curves_and_jobs_in_short(http: httpx2.Client, run: FakeRun) -> None:
    run.write(*(step(number, 1 / number) for number in range(1, 300)), evaluated(200, 2.0), ship=False)
    query = {"job": [run.id, "job-000000000000"]}
    answer = http.get("/sparklines", params=query)
    assert answer.headers["content-encoding"] == "gzip"
    found, none = (answer.json()[job_id] for job_id in query["job"])
    assert len(found["train_loss"]["step"]) <= 80 and found["train_loss"]["step"][-1] == 299
    assert found["val_loss"] == {"step": [200], "value": [2.0]} and none["train_loss"]["step"] == []
    assert http.get("/sparklines", params={"job": "../secret"}).status_code == 422
    (short,), (full,) = (http.get("/jobs", params={"view": view}).json()["data"] for view in ("summary", "full"))
    assert short.items() < full.items() and full.keys() - short.keys() == {"spec", "plan"}


def test_a_job_that_has_not_begun_has_empty_curves(http: httpx2.Client, run: FakeRun) -> None:
    assert curves(http, run)["train_loss"] == {"step": [], "value": []}


def curve(values: list[float], first_step: int = 1) -> Curve:
    made = Curve()
    for number, value in enumerate(values, first_step):
        made.put(number, value)
    return made


VALUES = st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=400)


@given(VALUES, st.integers(10, 100), st.integers(0, 10_000))
def test_thinning_keeps_extremes_and_the_last_point(values: list[float], max_points: int, first_step: int) -> None:
    points = curve(values, first_step).points(None, None, max_points)
    all_points = dict(enumerate(values, first_step))
    assert len(points.step) <= max_points
    assert points.step == sorted(set(points.step))
    assert all(_same(value, all_points[at]) for at, value in zip(points.step, points.value, strict=True))
    assert points.step[-1] == first_step + len(values) - 1
    numbers, kept = ([v for v in some if not math.isnan(v)] for some in (values, points.value))
    if numbers:
        assert (min(kept), max(kept)) == (min(numbers), max(numbers))
    assert any(map(math.isnan, values)) == any(map(math.isnan, points.value))


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


@given(st.lists(st.floats(-1e3, 1e3), min_size=200, max_size=300), st.floats(-1e3, 1e3))
def test_thinned_points_stay_while_the_run_goes_on(values: list[float], value: float) -> None:
    made = curve(values)
    before = made.points(None, None, 100).step
    made.put(len(values) + 1, value)
    after = made.points(None, None, 100).step
    assert set(after) - {len(values) + 1} <= set(before)  # none comes back that was not shown


STEPS = st.lists(st.tuples(st.integers(0, 500), st.floats(allow_nan=True, width=32)), min_size=1, max_size=300)


@given(STEPS, st.sampled_from([10, 40, 200]), st.integers(1, 60))
def test_a_curve_asked_again_and_again_is_thinned_as_if_for_the_first_time(
    points: list[tuple[int, float]], max_points: int, every: int
) -> None:
    """What was thinned before is kept; steps that come again must not show what they were."""
    asked, fresh = Curve(), Curve()
    for number, (step_, value) in enumerate(points):
        asked.put(step_, value)
        if number % every == 0:
            asked.points(None, None, max_points)
            asked.points(None, step_, 10)
    for step_, value in points:
        fresh.put(step_, value)
    for window in ((None, None), (None, 250), (100, None)):
        assert repr(asked.points(*window, max_points)) == repr(fresh.points(*window, max_points))


def test_curves_come_as_a_table_too(http: httpx2.Client, run: FakeRun) -> None:
    run.write(step(1, 3.0), step(2, math.nan), evaluated(2, 2.75))
    query = {"keys": ["train_loss", "val_loss"]}
    answer = http.get(f"/jobs/{run.id}/metrics", params=query, headers={"Accept": "text/csv"})
    assert answer.headers["content-type"].startswith("text/csv")
    assert answer.text == "step,train_loss,val_loss\n1,3.0,\n2,NaN,2.75\n"
