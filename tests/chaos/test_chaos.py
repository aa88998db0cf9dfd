"""The short forms of what `python -m tests.chaos` does at length."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.gang import gang
from tests.chaos.guards import run_guard
from tests.chaos.invariants import Outcome
from tests.chaos.kills import Blow, plans
from tests.chaos.outage import outage
from tests.chaos.rounds import ORPHAN_SECONDS, run_round, run_undisturbed
from tests.chaos.submits import submit_many
from tests.chaos.watch import Watch
from tests.chaos.world import World

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(disk=True) as world:
        yield world


@pytest.fixture(scope="module")
def watch() -> Iterator[Watch]:
    with Watch(ORPHAN_SECONDS) as watch:
        yield watch


@pytest.fixture(scope="module")
def undisturbed(world: World, watch: Watch) -> Outcome:
    return run_undisturbed(world, watch)


@pytest.mark.parametrize("target", ["worker", "horse"])
def test_a_killed_process_costs_less_than_thirty_seconds_and_no_bit(
    world: World, watch: Watch, undisturbed: Outcome, target: str
) -> None:
    result = run_round(world, watch, [Blow("kill", target, at_step=150)], undisturbed)
    assert result.violations == []
    assert result.recovered and result.recovery_seconds is not None and result.recovery_seconds < 30
    print(f"{target} killed: next step after {result.recovery_seconds:.1f} s")


@pytest.mark.parametrize("point", ["after-enqueue", "after-rename"])
def test_a_process_that_dies_at_the_worst_moment_changes_nothing(
    world: World, watch: Watch, undisturbed: Outcome, point: str
) -> None:
    assert run_round(world, watch, [Blow("arm", point)], undisturbed).violations == []


def test_training_goes_on_at_its_pace_while_redis_is_away(world: World, watch: Watch) -> None:
    result = outage(world, watch, frozen_seconds=7.0, gone_seconds=8.0)
    print(result)
    assert result.violations == []


def test_every_submit_that_was_acknowledged_makes_one_job_though_services_die() -> None:
    with World() as world:
        submitted = submit_many(world, 300, [Blow("kill", "redis"), Blow("kill", "api")])
    assert submitted.violations == []


def test_jobs_of_two_nodes_and_of_one_share_four_and_none_is_half_placed() -> None:
    result = gang(real=False)
    assert result.violations == [] and result.samples > 50


def test_the_suite_turns_red_without_a_guard() -> None:
    assert any("twice" in violation for violation in run_guard("unique-tickets"))


def test_the_same_seed_deals_the_same_blows_and_every_kind_of_them() -> None:
    first, second = (plans(60, 7, 400, disk=True) for _ in range(2))
    assert first == second != plans(60, 8, 400, disk=True)
    kinds = {(blow.action, blow.target) for blows in first for blow in blows}
    assert {("fill", "disk"), ("kill", "redis"), ("freeze", "rank1"), ("arm", "after-claim")} <= kinds
