"""Time and cost before a run: from runs like it, else from the hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest

from gptcore.plan import Hardware
from tests.api.server import FakeRun, Server, step, train_spec
from worker.job import Node, Slot
from worker.settings import Settings
from worker.store import Store


def planned(http: httpx2.Client, **changes: Any) -> Any:
    return http.post("/jobs/plan", json=train_spec(**changes)).json()["plan"]["estimate"]


@pytest.fixture
def go(http: httpx2.Client, settings: Settings, store: Store) -> Callable[[float], Any]:
    return lambda step_seconds: _go(http, settings, store, step_seconds)


def _go(http: httpx2.Client, settings: Settings, store: Store, step_seconds: float, steps: int = 12) -> Any:
    """A job through all steps, as if it had begun that much earlier → the plan it had."""
    job = store.get_job(http.post("/jobs", json=train_spec()).json()["id"])
    run = FakeRun(settings, store, job)
    run.begin_attempt()
    ended = datetime.now(UTC)
    for number in range(1, steps + 1):
        run.write(step(number).model_copy(update={"time": ended - timedelta(seconds=(steps - number) * step_seconds)}))
    run.report(started_at=(ended - timedelta(seconds=steps * step_seconds + 5)).timestamp())
    run.end()
    return job.plan


def test_without_a_run_like_it_the_hardware_says_a_wide_range(http: httpx2.Client, store: Store) -> None:
    assert planned(http) is None  # nobody is there
    slot = Slot(id="s", cores=[0, 1], gpus=[], hardware=Hardware(ranks=2))
    store.register_node(Node(id="n", pool="default", slots=[slot]))
    narrow = planned(http)
    assert (narrow["basis"], narrow["past_runs"], narrow["cost"]) == ("hardware", 0, None)
    seconds = narrow["seconds"]
    assert 0 < seconds["low"] < seconds["expected"] < seconds["high"]
    slot = Slot(id="s", cores=[0, 1], gpus=[], hardware=Hardware(ranks=8))
    store.register_node(Node(id="n", pool="default", slots=[slot]))
    assert planned(http)["tokens_per_second"]["expected"] == 4 * narrow["tokens_per_second"]["expected"]


def test_a_run_like_it_tells_the_time(http: httpx2.Client, go: Callable[[float], Any]) -> None:
    go(10)  # seconds for 256 tokens
    found = planned(http)
    assert (found["basis"], found["past_runs"], found["past_plans_off"]) == ("past_runs", 1, None)
    assert found["tokens_per_second"]["expected"] == pytest.approx(25.6)
    assert found["seconds"]["expected"] == pytest.approx(125, rel=0.02)
    assert planned(http, max_steps=120)["seconds"]["expected"] == pytest.approx(1205, rel=0.02)
    assert found["seconds"]["low"] < 110 < 140 < found["seconds"]["high"]
    # what is not like it is not judged by it
    for other in ({"model": {"preset": "llama-tiny", "block_size": 64}}, {"tokens_per_step": 512}):
        assert planned(http, **other)["basis"] == "hardware"


def test_how_far_past_plans_were_off_is_told(http: httpx2.Client, go: Callable[[float], Any]) -> None:
    assert go(10)["estimate"] is None  # no node was there
    assert go(12)["estimate"]["seconds"]["expected"] == pytest.approx(125, rel=0.02)  # it took 149
    found = planned(http)
    assert found["past_runs"] == 2
    assert found["past_plans_off"] == pytest.approx(0.19, abs=0.02)
    assert found["seconds"]["low"] < 125 < 149 < found["seconds"]["high"]


@pytest.fixture
def priced(settings: Settings) -> Iterator[Server]:
    with Server(replace(settings, price_per_gpu_hour=2.5)) as server:
        yield server


def test_a_gpu_hour_has_a_price(priced: Server, store: Store) -> None:
    def on(name: str) -> Any:
        hardware = Hardware(device="cuda", device_name=name, ranks=2, memory_bytes=80 * 2**30)
        store.register_node(
            Node(id="n", pool="default", slots=[Slot(id="s", cores=[0], gpus=[0, 1], hardware=hardware)])
        )
        return planned(priced.http, resources={"ranks_per_node": 2}, tokens_per_step=512, max_steps=100_000)

    found = on("NVIDIA A100-SXM4-80GB")
    for name, seconds in found["seconds"].items():
        assert found["cost"][name] == pytest.approx(2.5 * 2 * seconds / 3600)
    assert on("NVIDIA H100 80GB HBM3")["seconds"]["expected"] < found["seconds"]["expected"]
    assert on("A GPU that nobody knows") is None
