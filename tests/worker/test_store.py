"""The store against a real Redis: what must happen once, in order, or not at all."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, cast

import pytest
import redis

from gptcore.spec import parse_spec
from tests.conftest import status_changes, wait_until
from tests.worker.conftest import change, node, start, train_spec
from worker.connection import AWAY, TakesNoWrites, connect
from worker.follow import follow_events
from worker.job import TRANSITIONS, JobError, Status, new_job_id
from worker.keys import KEYS
from worker.record import place
from worker.store import (
    LEASE_SECONDS,
    NOT_DUE,
    TOO_SOON,
    BadCursor,
    IdempotencyConflict,
    JobNotFound,
    NodeNotFound,
    NotPossible,
    Store,
    Superseded,
)


def submit(store: Store, **changes: Any) -> str:
    return store.create_job(parse_spec(train_spec(**changes)), None)[0].id


def let_leases_run_out(store: Store) -> None:
    store._redis.set(KEYS["tick"], store._now())  # somebody looked just now
    for job_id in store._redis.zrange(KEYS["leases"], 0, -1):
        store._redis.zadd(KEYS["leases"], {job_id: 1.0})


def test_ids_sort_by_the_time_they_were_made() -> None:
    early = new_job_id()
    time.sleep(0.002)
    late = new_job_id()
    assert early < late and len(early) == len("job-") + 12


def test_a_created_job_reads_back_whole(store: Store) -> None:
    job, created = store.create_job(parse_spec(train_spec(labels={"who": "me"})), None)
    assert created and job == store.get_job(job.id)
    assert (job.status, job.queue_position, job.labels) == ("queued", 1, {"who": "me"})
    assert parse_spec(job.spec) == parse_spec(train_spec(labels={"who": "me"}))
    assert [(c.from_status, c.to_status) for c in status_changes(store, job.id)] == [("", "queued")]


def test_many_posts_with_one_key_make_one_job(store: Store) -> None:
    spec = parse_spec(train_spec())
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: store.create_job(spec, None, idempotency_key="k", body_sha256="a"), range(32)))
    assert len({job.id for job, _ in made}) == 1 and sum(created for _, created in made) == 1
    with pytest.raises(IdempotencyConflict, match="another body"):
        store.create_job(spec, None, idempotency_key="k", body_sha256="b")
    assert 86_000 < store._redis.ttl(KEYS["idempotency"] + "k") <= 86_400


def test_lists_are_newest_first_and_pages_join_without_gap(store: Store) -> None:
    made = [submit(store, name=f"n{index}", labels={"even": str(index % 2 == 0)}) for index in range(7)]
    seen, after = [], None
    while True:
        page = store.list_jobs(limit=3, after=after)
        seen += [job.id for job in page.data]
        submit(store, name="newer")  # what arrives meanwhile moves no page
        if not page.has_more:
            break
        after = page.next
    assert seen == made[::-1]
    assert [job.name for job in store.list_jobs(label="even=True", limit=2).data] == ["n6", "n4"]
    about_one = store.create_job(parse_spec(train_spec()), None, parent_job_id=made[0])[0]
    assert [job.id for job in store.list_jobs(parent_job_id=made[0]).data] == [about_one.id]
    assert store.list_jobs(status="running").data == []
    with pytest.raises(BadCursor):
        store.list_jobs(after="job-x")


def test_a_job_takes_all_its_slots_or_none(store: Store) -> None:
    store.register_node(node("a", 2))
    job_id = submit(store, resources={"nodes": 2, "ranks_per_node": 2})
    assert store.reserve("default") == 0
    assert store.list_nodes()[0].slots[0].job_id is None
    store.register_node(node("b", 1, 2))
    assert store.reserve("default") == 1
    assert [(n.node, n.slot, n.node_rank) for n in store.get_job(job_id).nodes] == [("a", "a-0", 0), ("b", "b-1", 1)]
    assert [t.id for t in store.outbox()] == [f"{job_id}-a1-r0", f"{job_id}-a1-r1"]


def test_priority_goes_before_age_and_a_small_job_passes_one_that_waits(store: Store) -> None:
    store.register_node(node("a", 1))
    too_large = submit(store, resources={"ranks_per_node": 4, "priority": 9})
    old, urgent = submit(store), submit(store, resources={"priority": 5})
    assert store.get_job(urgent).queue_position == 2
    assert store.reserve("default") == 1
    assert [store.get_job(j).status for j in (too_large, old, urgent)] == ["queued", "queued", "starting"]


def test_a_job_that_waited_ten_minutes_lets_none_pass(store: Store) -> None:
    for name in "ab":
        store.register_node(node(name, 1))
    start(store, submit(store))
    wide = submit(store, resources={"nodes": 2})
    submit(store)
    store._redis.hset(KEYS["job"] + wide, "queued_at", store._now() - 601)
    assert store.reserve("default") == 0


def test_a_job_that_no_live_node_could_run_holds_up_nobody(store: Store) -> None:
    store.register_node(node("a", 1))
    too_large = submit(store, resources={"ranks_per_node": 4})
    small = submit(store)
    store._redis.hset(KEYS["job"] + too_large, "queued_at", store._now() - 601)
    assert store.reserve("default") == 1 and store.get_job(small).status == "starting"
    assert "with 4 ranks of pool default, 0 live" in store.get_job(too_large).status_reason


def test_nodes_that_share_no_runs_are_no_two_nodes_for_a_job(store: Store) -> None:
    for name in "ab":
        store.register_node(node(name, 1).model_copy(update={"runs_root": name}))
    wide, small = submit(store, resources={"nodes": 2}), submit(store)
    store._redis.hset(KEYS["job"] + wide, "queued_at", store._now() - 601)
    assert store.reserve("default") == 1 and store.get_job(small).status == "starting"
    assert "of 2 nodes of pool default, 1 live" in store.get_job(wide).status_reason


def test_a_job_gets_the_smallest_slots_of_the_whole_pool_that_suffice(store: Store) -> None:
    for name, ranks in (("a", (8,)), ("b", (1, 4)), ("c", (2,)), ("d", (4, 8)), ("e", (1,))):
        store.register_node(node(name, *ranks))

    def slots_of(**resources: int) -> list[str]:
        tokens = 256 * resources.get("ranks_per_node", 1) * resources.get("nodes", 1)
        job_id = submit(store, resources=resources, tokens_per_step=tokens)
        store.reserve("default")
        return [part.slot for part in store.get_job(job_id).nodes]

    assert slots_of() == ["e-0"]  # of two that are as small: where least is left over
    assert slots_of(ranks_per_node=3) == ["b-1"]
    assert slots_of(nodes=3) == ["b-0", "c-0", "d-0"]
    assert slots_of(nodes=3, ranks_per_node=2) == []  # all nodes of a job or none
    assert slots_of(ranks_per_node=5, nodes=2) == ["a-0", "d-1"]


def test_a_pass_costs_the_same_however_many_jobs_wait(store: Store) -> None:
    """Counted in commands: a busy machine would tell nothing by the clock."""
    for name in "abc":
        store.register_node(node(name, 1, 1))
    counts = []
    for number in range(3):
        for _ in range(5 if number else 1):
            submit(store, resources={"nodes": 1, "ranks_per_node": 2})
            submit(store, resources={"nodes": 2, "ranks_per_node": 3}, tokens_per_step=1536)
        store.reserve("default")
        store._redis.config_resetstat()
        assert store.reserve("default") == 0
        counts.append(sum(command["calls"] for command in store._redis.info("commandstats").values()))
    assert counts[1] == counts[2] < counts[0] + 20  # and none for those behind
    jobs = store.list_jobs(limit=100).data
    assert all("of pool default, 0 live since" in job.status_reason for job in jobs)
    assert sorted(job.queue_position or 0 for job in jobs) == list(range(1, len(jobs) + 1))


def test_a_queue_of_an_older_version_is_served_in_its_order(store: Store) -> None:
    """It knew no lines; and a job may have left its queue, or come into it, while both versions ran."""
    jobs = [submit(store, resources={"priority": priority}) for priority in (0, 0, 5, 0)]
    for key in store._redis.scan_iter("trainmaster:line*"):
        store._redis.delete(key)
    for job_id in jobs:
        store._redis.hdel(KEYS["job"] + job_id, "line")
    store.register_node(node("a", 1, 1))
    assert store.reserve("default") == 2
    assert [store.get_job(job_id).queue_position for job_id in jobs] == [None, 1, None, 2]
    store._redis.zrem(KEYS["queue"] + "default", jobs[1])
    store.register_node(node("b", 1, 1))
    assert store.reserve("default") == 1 and store.get_job(jobs[3]).status == "starting"


def test_agents_of_a_pool_share_one_pass_and_a_change_makes_another(store: Store) -> None:
    def look(pool: str = "default") -> int:
        return store.reserve(pool, only_if_due=True)

    store.register_node(node("a", 1))
    assert [look(), look(), look("other"), look("other")] == [0, NOT_DUE, 0, NOT_DUE]
    job_id = submit(store)
    assert wait_until(lambda: (placed := look()) != TOO_SOON and placed) == 1
    submit(store)
    assert wait_until(lambda: (placed := look()) != TOO_SOON and placed + 1) == 1 and look() == NOT_DUE
    store.request_cancel(job_id)
    assert look("other") == NOT_DUE
    assert wait_until(lambda: (placed := look()) != TOO_SOON and placed) == 1
    submit(store)
    store.register_node(node("b", 1))  # news
    assert wait_until(lambda: (placed := look()) != TOO_SOON and placed) == 1
    store.register_node(node("b", 1))  # a heartbeat
    assert look() == NOT_DUE and 0 < store._redis.pttl(KEYS["passed"] + "default") <= 2000


def test_a_change_in_one_pool_wakes_no_agent_of_another(store: Store) -> None:
    mine, other = store.doorbell("default"), store.doorbell("other")
    assert not mine.wait(0.2) and not other.wait(0.2)
    submit(store)
    assert mine.wait(5) and not other.wait(0.05)
    for doorbell in (mine, other):
        doorbell.close()


def test_concurrent_schedulers_never_give_a_slot_twice(store: Store, redis_url: str) -> None:
    for name in "abcd":
        store.register_node(node(name, 1, 1, 2))
    jobs = [submit(store, resources={"nodes": 1 + n % 3}) for n in range(40)]
    ended: list[str] = []

    def work(worker: int) -> None:
        mine = Store(redis_url)
        while len(ended) < len(jobs):
            mine.reserve("default")
            for ticket in mine.outbox():
                if ticket.node_rank == 0 and mine.claim(ticket, f"w{worker}"):
                    held = [s.id for n in mine.list_nodes() for s in n.slots if s.job_id == ticket.job_id]
                    assert sorted(held) == sorted(a.slot for a in mine.get_job(ticket.job_id).nodes)
                    mine.report(ticket.job_id, 1, {}, status="running")
                    mine.finish(ticket.job_id, 1, "succeeded", "", who="t", fields={})
                    ended.append(ticket.job_id)
                mine.clear_outbox(ticket)
        mine.close()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert sorted(ended) == sorted(jobs)
    assert all(slot.job_id is None for n in store.list_nodes() for slot in n.slots)


def test_a_ticket_is_claimed_once(store: Store) -> None:
    store.register_node(node("a", 1))
    submit(store)
    store.reserve("default")
    (ticket,) = store.outbox()
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda n: store.claim(ticket, f"boot{n}"), range(16))) == 1


def test_a_cancelled_job_is_never_claimed(store: Store) -> None:
    store.register_node(node("a", 1))
    job_id = submit(store)
    store.reserve("default")
    (ticket,) = store.outbox()
    assert store.request_cancel(job_id).status == "cancelled"
    assert not store.claim(ticket, "boot")
    assert store.list_nodes()[0].slots[0].job_id is None


def test_cancel_of_a_running_job_is_a_wish_and_idempotent(store: Store) -> None:
    store.register_node(node("a", 1))
    job_id = submit(store)
    ticket = start(store, job_id)
    assert [store.request_cancel(job_id).status for _ in range(3)] == ["cancelling"] * 3
    assert store.renew(job_id, ticket.attempt) == "cancel"
    changes = [c.to_status for c in status_changes(store, job_id)]
    assert changes == ["queued", "starting", "running", "cancelling"]
    assert store.finish(job_id, 1, "failed", "it died", who="t", fields={}) == "cancelled"
    assert store.request_cancel(job_id).status == "cancelled"
    with pytest.raises(JobNotFound):
        store.request_cancel("job-none")


def test_finished_before_the_stop_means_succeeded(store: Store) -> None:
    store.register_node(node("a", 1))
    job_id = submit(store)
    start(store, job_id)
    store.request_cancel(job_id)
    assert store.finish(job_id, 1, "succeeded", "", who="t", fields={"step": 3}) == "succeeded"
    job = store.get_job(job_id)
    assert job.finished_at is not None and job.step == 3


def test_an_older_attempt_writes_nothing(store: Store) -> None:
    store.register_node(node("a", 1))
    job_id = submit(store)
    start(store, job_id)
    let_leases_run_out(store)
    assert store.lose_expired(max_attempts=3) == [job_id]
    assert store.get_job(job_id).status == "recovering"
    for call in (
        lambda: store.renew(job_id, 1),
        lambda: store.report(job_id, 1, {"step": 99}),
        lambda: store.finish(job_id, 1, "succeeded", "", who="t", fields={}),
    ):
        with pytest.raises(Superseded):
            call()
    second = start(store, job_id)
    assert second.attempt == 2 and store.renew(job_id, 2) == ""
    with pytest.raises(Superseded):
        store.renew(job_id, 1)
    assert store.get_job(job_id).step == 0


def test_a_lost_attempt_that_none_follows_is_given_up_once_its_events_are_shipped(store: Store) -> None:
    store.register_node(node("a", 1))
    cases = ((store.request_cancel, "cancelled", 3), (store.request_pause, "paused", 3), (None, "failed", 1))
    for wish, end, most in cases:
        job_id = submit(store)
        start(store, job_id)
        if wish is not None:
            wish(job_id)
        let_leases_run_out(store)
        for _ in range(2):
            assert store.lose_expired(most) == []
            assert store.unshipped("") == [(job_id, 1)]
        assert store.ship(job_id, 1, "0-0", [("1-1", "last")], {}) is None
        assert store.lose_shipped(job_id, 1, most)
        assert (store.get_job(job_id).status, store.unshipped("")) == (end, [])
        with pytest.raises(Superseded):
            store.ship(job_id, 1, "1-1", [("1-2", "late")], {})


def test_what_a_lost_attempt_left_may_be_shipped_until_the_next_one_is_placed(store: Store) -> None:
    store.register_node(node("a", 1))
    job_id = submit(store)
    start(store, job_id)
    let_leases_run_out(store)
    assert store.lose_expired(max_attempts=3) == [job_id]
    assert store.unshipped("") == [(job_id, 1)]
    store.register_node(node("b", 1, pool="other").model_copy(update={"runs_root": "b"}))
    store._redis.hset(KEYS["job"] + job_id, "root", "b")
    assert store.unshipped("a") == [] and store.unshipped("b") == [(job_id, 1)]
    store._redis.hdel(KEYS["job"] + job_id, "root")
    assert store.ship(job_id, 1, "0-0", [("1-1", "left")], {"step": 5}) is None
    start(store, job_id)
    assert store.unshipped("") == []  # its launcher ships what is left
    with pytest.raises(Superseded):
        store.ship(job_id, 1, "1-1", [("1-2", "late")], {})
    assert not store.lose_shipped(job_id, 1, max_attempts=1)
    let_leases_run_out(store)
    assert store.unshipped("") == [(job_id, 2)]


def test_attempts_lost_in_a_row_end_the_job_and_unclaimed_ones_do_not_count(store: Store) -> None:
    store.register_node(node("a", 1))
    job_id = submit(store)
    for _ in range(5):
        assert store.reserve("default") == 1  # nobody claims
        let_leases_run_out(store)
        store.lose_expired(max_attempts=2)
        assert store.reserve("default") == 0  # another slot may hear better, for some seconds
        store._redis.delete(KEYS["deaf"])
    assert store.get_job(job_id).status == "recovering"
    for most, expected in ((0, "recovering"), (2, "recovering"), (0, "recovering"), (2, "failed")):
        store._redis.delete(KEYS["outbox"])
        ticket = start(store, job_id)
        store.lose(job_id, ticket.attempt, most, JobError(reason="exited", message="it died"), who="t")
        assert store.get_job(job_id).status == expected
    error = store.get_job(job_id).error
    assert error is not None and error.message == "it died, 2 times in a row without a new checkpoint"


def test_after_a_gap_in_looking_every_launcher_gets_a_full_period(store: Store) -> None:
    store.register_node(node("a", 1))
    job_id = submit(store)
    start(store, job_id)
    let_leases_run_out(store)
    store._redis.set(KEYS["tick"], store._now() - 60)
    assert store.lose_expired(max_attempts=3) == []
    assert store.renew(job_id, 1) == ""


def test_a_status_moves_only_where_the_table_allows(store: Store) -> None:
    store.register_node(node("a", 1))
    job_id = submit(store)
    start(store, job_id)
    with pytest.raises(redis.ResponseError, match="REFUSED running to starting"):
        store.finish(job_id, 1, "starting", "", who="t", fields={})
    assert set(TRANSITIONS) == {end for ends in TRANSITIONS.values() for end in ends}


def test_a_repeated_event_is_one_event_and_a_gap_is_refused(store: Store) -> None:
    store.register_node(node("a", 1))
    job_id = submit(store)
    start(store, job_id)
    first = [("1-1", "a"), ("1-2", "b")]
    assert store.ship(job_id, 1, "0-0", first, {}) is None
    assert store.ship(job_id, 1, "0-0", [*first, ("1-3", "c")], {"step": 3}) is None
    assert store.ship(job_id, 1, "1-7", [("1-8", "h")], {"step": 8}) == "1-3"  # 1-4 to 1-7 are not there
    assert store.ship(job_id, 1, "1-3", [("2-1", "d")], {}) is None
    assert store.ship(job_id, 1, "1-3", [("1-4", "late")], {}) is None
    assert store.read_events(job_id) == [*first, ("1-3", "c"), ("2-1", "d")]
    assert store.read_events(job_id, after="1-3") == [("2-1", "d")]
    assert store.get_job(job_id).step == 3


def test_a_follower_gets_every_event_and_ends_with_the_job(store: Store) -> None:
    store.register_node(node("a", 1))
    job_id = submit(store)
    start(store, job_id)
    store.ship(job_id, 1, "0-0", [("1-1", "one"), ("1-2", "two")], {})

    def write() -> None:
        for seq in range(3, 50):
            store.ship(job_id, 1, f"1-{seq - 1}", [(f"1-{seq}", str(seq))], {})
        time.sleep(0.3)  # longer than the follower's quiet time
        store.ship(job_id, 1, "1-49", [("1-50", "last")], {})
        store.finish(job_id, 1, "succeeded", "", who="t", fields={})

    async def follow(after: str) -> list[tuple[str, str] | None]:
        return [item async for item in follow_events(store.url, job_id, after, quiet_seconds=0.1)]

    writer = threading.Thread(target=write)
    writer.start()
    began = time.monotonic()
    items = asyncio.run(follow("1-1"))
    writer.join()
    assert [item[0] for item in items if item] == [*(f"1-{seq}" for seq in range(2, 51)), "1-50.4"]
    assert None in items and time.monotonic() - began < 5
    assert asyncio.run(asyncio.wait_for(follow("1-50.4"), 5)) == []  # the end was given before


def test_following_an_unknown_job_is_refused(store: Store) -> None:
    async def follow() -> None:
        async for _ in follow_events(store.url, "job-none"):
            pass

    with pytest.raises(JobNotFound):
        asyncio.run(follow())


def test_a_mixed_pool_offers_the_device_that_is_asked_for(store: Store) -> None:
    store.register_node(node("a", 2, 6))
    cpu = store.pool_hardware("default")
    assert cpu is not None
    gpu = cpu.model_copy(update={"device": "cuda", "ranks": 1})
    slot = node("b", 1).slots[0]
    store.register_node(node("b", 1).model_copy(update={"slots": [slot.model_copy(update={"hardware": gpu})]}))
    assert store.pool_hardware("default") == gpu
    assert store.pool_hardware("default", "cpu") == cpu


def test_a_dead_node_gets_no_job_and_offers_no_hardware(store: Store) -> None:
    store.register_node(node("a", 2, 6))
    offered = [store.pool_hardware("default", ranks=ranks) for ranks in (1, 3, 9)]
    assert [hardware and hardware.ranks for hardware in offered] == [2, 6, 6]
    store.retire_node("a")
    submit(store)
    assert store.reserve("default") == 0
    assert store.pool_hardware("default") is None
    assert [n.live for n in store.list_nodes()] == [False]


def test_a_node_not_seen_for_an_hour_is_forgotten_by_an_agent_and_not_by_who_reads(store: Store) -> None:
    store.register_node(node("gone", 1))
    store._redis.zadd(KEYS["node_leases"], {"gone": store._now() - 3601})
    assert store.list_nodes() == [] and store._redis.hexists(KEYS["nodes"], "gone")
    store.register_node(node("here", 1))
    assert store._redis.hkeys(KEYS["nodes"]) == store._redis.zrange(KEYS["node_leases"], 0, -1) == ["here"]


def test_a_waiting_job_says_what_it_needs_and_since_when(store: Store) -> None:
    store.register_node(node("a", 1, 2))
    wide, first, second = submit(store, resources={"nodes": 2}), submit(store), submit(store)
    store.reserve("default")
    reasons = [store.get_job(job_id).status_reason for job_id in (wide, first, second)]
    assert re.fullmatch(r"needs a slot on each of 2 nodes of pool default, 1 live since \d\d:\d\d UTC", reasons[0])
    third = submit(store, resources={"ranks_per_node": 2})
    store.reserve("default")
    reason = store.get_job(third).status_reason
    assert re.fullmatch(r"needs a slot with 2 ranks of pool default, 0 free since \d\d:\d\d UTC", reason)
    waits = KEYS["waits"] + "default"
    (line,) = [line for line, why in store._redis.hgetall(waits).items() if why == reason]
    store._redis.hset(waits, line, reason[:-9] + "01:02 UTC")
    store.reserve("default")
    assert store.get_job(third).status_reason.endswith("since 01:02 UTC")  # nothing changed since then


def test_nothing_is_placed_or_given_up_until_every_lease_had_its_period(store: Store) -> None:
    store.register_node(node("a", 1, 1))
    running, waiting = submit(store), submit(store)
    change(store, waiting, "not_before", store._now() + 1000)
    start(store, running)
    change(store, waiting, "not_before", None)
    for jump in (-3600, 3600):  # Redis was away or frozen; or its clock went back
        store._redis.set(KEYS["tick"], store._now() + jump)
        store._redis.zadd(KEYS["leases"], {running: store._now() + jump})
        assert store.reserve("default") == 0 and store.lose_expired(max_attempts=3) == []
        assert 0 < store._redis.zscore(KEYS["leases"], running) - store._now() <= LEASE_SECONDS
    store._redis.delete(KEYS["hold"])
    assert store.reserve("default") == 1


def test_the_last_node_to_leave_leaves_nothing_to_wait_for(store: Store) -> None:
    store.register_node(node("a", 1))
    store.reserve("default")
    assert store._redis.exists(KEYS["tick"])
    store.retire_node("a")
    assert not store._redis.exists(KEYS["tick"])


def test_what_failed_twice_waits_before_it_is_tried_again(store: Store) -> None:
    store.register_node(node("a", 1))
    job_id = submit(store)
    for expected in (1, 0):  # at once the first time
        ticket = start(store, job_id)
        store.lose(job_id, ticket.attempt, 9, JobError(reason="exited", message="it died"), who="t")
        if not expected:
            assert store.get_job(job_id).status_reason == "attempt 2: it died, tried again in 4 s"
            assert store.reserve("default") == 0
    change(store, job_id, "not_before", store._now() - 1)
    assert store.reserve("default") == 1


def test_a_lost_node_and_a_lost_launcher_are_told_apart(store: Store) -> None:
    for name, reason in (("dead", "node dead was lost"), ("alive", "its launcher on node alive was lost")):
        store.register_node(node(name, 1))
        job_id = submit(store)
        start(store, job_id)
        if name == "dead":
            store.retire_node(name)
        let_leases_run_out(store)
        assert store.lose_expired(max_attempts=3) == [job_id]
        assert store.get_job(job_id).status_reason == f"attempt 1: {reason}"
        store.request_cancel(job_id)


def test_nothing_is_placed_on_a_lost_node_whose_own_lease_is_not_over_yet(store: Store) -> None:
    for name in "ab":
        store.register_node(node(name, 1))
    job_id = submit(store, resources={"nodes": 2})
    assert store.reserve("default") == 1 and all(store.claim(ticket, "boot") for ticket in store.outbox())
    store._redis.zadd(KEYS["node_leases"], {"b": store._now() + 1})  # it spoke last 1 s after its launcher
    store._redis.zadd(KEYS["leases"], {f"{job_id}/1": 1.0})
    assert store.lose_expired(max_attempts=3) == [job_id]
    assert store.get_job(job_id).status_reason == "attempt 1: node b was lost"
    assert store.reserve("default") == 0
    store.register_node(node("b", 1))
    assert store.reserve("default") == 1


def test_a_member_that_is_silent_ends_the_attempt_and_is_named(store: Store) -> None:
    for name in "ab":
        store.register_node(node(name, 1))
    job_id = submit(store, resources={"nodes": 2})
    assert store.reserve("default") == 1
    first, second = store.outbox()
    assert store.claim(first, "boot")
    store._redis.zadd(KEYS["leases"], {f"{job_id}/1": 1.0})
    assert store.lose_expired(max_attempts=1) == [job_id]  # it never began: no failure of the job's
    store._redis.delete(KEYS["deaf"])
    assert store.get_job(job_id).status_reason == "no worker of node b took attempt 1"
    assert store.reserve("default") == 1
    first, second = store.outbox()[-2:]
    assert store.claim(first, "boot") and store.claim(second, "boot") and store.claim(second, "boot")
    assert not store.claim(second, "another")
    assert store.members_left(job_id) == [f"{job_id}/1"]
    store.leave(job_id, 2, 1, "slot b-0: torchrun ended with 1")
    assert store.members_left(job_id) == []
    assert store.renew(job_id, 2) == "broken: slot b-0: torchrun ended with 1"
    store.lose(job_id, 2, 1, JobError(reason="exited", message="it broke"), who="t")
    assert store.get_job(job_id).status == "failed"
    assert [slot.job_id for n in store.list_nodes() for slot in n.slots] == [None, None]


def test_an_attempt_is_given_up_once_though_all_its_leases_ran_out(store: Store) -> None:
    for name in "ab":
        store.register_node(node(name, 1))
    job_id = submit(store, resources={"nodes": 2})
    assert store.reserve("default") == 1
    assert all(store.claim(ticket, "boot") for ticket in store.outbox())
    store._redis.zadd(KEYS["leases"], {job_id: 1.0, f"{job_id}/1": 1.0})
    assert store.lose_expired(max_attempts=2) == [job_id]
    assert store.get_job(job_id).status == "recovering"


def test_a_record_that_redis_lost_alone_harms_no_other_job(store: Store) -> None:
    """As where it evicts keys, or somebody deleted one by hand."""
    store.register_node(node("a", 1))
    waits, ran, other = submit(store), submit(store, resources={"priority": 2}), submit(store)
    start(store, ran)
    store._redis.delete(KEYS["job"] + waits, KEYS["job"] + ran)
    let_leases_run_out(store)
    assert store.unshipped("") == [] and store.lose_expired(max_attempts=3) == []
    assert store.reserve("default") == 1 and store.get_job(other).status == "starting"
    assert store.census().statuses == {"starting": 1}
    assert [job.id for job in store.list_jobs().data] == [other]
    store.request_cancel(other)
    store.delete_job(other)


def test_a_node_that_redis_lost_alone_gets_no_job_and_harms_no_other(store: Store) -> None:
    for name in "ab":
        store.register_node(node(name, 1))
    store._redis.hdel(KEYS["nodes"], "a")
    job_id = submit(store)
    assert [n.id for n in store.list_nodes()] == ["b"]
    assert store.reserve("default") == 1 and store.get_job(job_id).nodes[0].node == "b"


def test_a_member_refused_for_a_stop_does_not_end_the_attempt_for_the_first_node(store: Store) -> None:
    """`cancelled` would say that nothing of the attempt lives, while its first node's trainer still does."""
    for name in "ab":
        store.register_node(node(name, 1))
    job_id = submit(store, resources={"nodes": 2})
    assert store.reserve("default") == 1
    first, second = store.outbox()
    assert store.claim(first, "boot") and store.request_cancel(job_id).status == "cancelling"
    assert not store.claim(second, "boot")
    store._redis.set(KEYS["tick"], store._now())
    if f"{job_id}/1" in dict(store._redis.zscan_iter(KEYS["leases"])):  # the time to claim is over
        store._redis.zadd(KEYS["leases"], {f"{job_id}/1": 1.0})
    assert store.lose_expired(max_attempts=3) == []
    assert store.renew(job_id, 1) == "cancel"
    assert store.finish(job_id, 1, "cancelled", "", who="t", fields={}) == "cancelled"
    assert [slot.job_id for n in store.list_nodes() for slot in n.slots] == [None, None]


def test_a_pause_is_no_part_of_a_recovery(store: Store) -> None:
    store.register_node(node("a", 1))
    job_id = submit(store)
    start(store, job_id)
    store.lose(job_id, 1, 3, JobError(reason="exited", message="it died"), who="t")
    assert store.request_pause(job_id).status == "paused" and store.resume(job_id).status == "queued"
    start(store, job_id)
    assert store._redis.hget(KEYS["job"] + job_id, "recovery_seconds") is None


@pytest.mark.parametrize("source", ["{}", "{}/export"])
def test_a_run_that_a_queued_job_reads_is_not_deleted(store: Store, source: str) -> None:
    store.register_node(node("a", 1))
    job_id = submit(store)
    start(store, job_id)
    store.finish(job_id, 1, "succeeded", "", who="t", fields={})
    spec = {"kind": "eval", "name": "e", "source": source.format(job_id), "tasks": ["hellaswag"]}
    reader = store.create_job(parse_spec(spec), None)[0].id
    with pytest.raises(NotPossible, match=reader):
        store.delete_job(job_id)
    store.request_cancel(reader)
    store.delete_job(job_id)


def test_a_paused_job_waits_and_a_resumed_one_is_queued_again(store: Store) -> None:
    store.register_node(node("a", 1))
    waiting, running = submit(store), submit(store, resources={"priority": 1})
    start(store, running)
    assert store.request_pause(waiting).status == "paused" and store.request_pause(waiting).status == "paused"
    assert store.request_pause(running).status == "pausing" and store.renew(running, 1) == "pause"
    with pytest.raises(NotPossible, match="resume it once it is paused"):
        store.resume(running)
    assert store.finish(running, 1, "queued", "drained", who="t", fields={}) == "paused"
    assert store.reserve("default") == 0
    for _ in range(2):
        assert store.resume(waiting).status == "queued"
    assert store.reserve("default") == 1
    assert store.request_cancel(running).status == "cancelled"
    for ask in (store.request_pause, store.resume):
        with pytest.raises(NotPossible, match="is cancelled"):
            ask(running)
    assert store.finish(waiting, 1, "succeeded", "", who="t", fields={}) == "succeeded"
    with pytest.raises(NotPossible, match="is succeeded; submit it as a new job"):
        store.resume(waiting)


def test_a_redis_that_may_forget_jobs_is_told_apart(store: Store) -> None:
    (off,) = store.weaknesses()
    assert off == "appendonly is off, so a crash may cost jobs; set it to yes"
    try:
        store._redis.config_set("maxmemory", 2**40, "maxmemory-policy", "allkeys-lru")
        assert store.weaknesses()[0] == off
        assert store.weaknesses()[1].endswith("set maxmemory-policy to noeviction")
        store._redis.config_set("maxmemory-policy", "noeviction", "appendonly", "yes")
        assert store.weaknesses() == []
    finally:
        store._redis.config_set("maxmemory", 0, "appendonly", "no")


def test_a_redis_that_shows_no_settings_is_served_all_the_same(store: Store, redis_url: str) -> None:
    store._redis.execute_command("ACL SETUSER shy on nopass ~* &* +@all -info")
    shy = Store(redis_url.replace("redis://", "redis://shy:none@"))
    assert [what.partition(",")[0] for what in shy.weaknesses()] == ["INFO is not permitted"]
    shy.close()
    store._redis.execute_command("ACL DELUSER shy")


def test_a_redis_that_is_busy_with_a_script_is_away_for_all(store: Store, redis_url: str) -> None:
    def run_long() -> None:
        with pytest.raises(AWAY, match="Script killed"):
            connect(redis_url).eval("while true do end", 0)

    async def follow() -> None:
        async for _ in follow_events(redis_url, "job-1"):
            pass

    with redis.Redis.from_url(redis_url) as admin:
        admin.config_set("busy-reply-threshold", 10)
        thread = threading.Thread(target=run_long)
        thread.start()
        try:
            wait_until(lambda: _is_busy(admin))
            for ask in (
                lambda: store.get_job("job-1"),
                lambda: store.read_stream("job-1", "0-0", 1),  # a transaction
                lambda: store.renew("job-1", 1),
                lambda: Store(redis_url[:-1] + "1").list_nodes(),  # busy before it may choose its database
                lambda: store.doorbell("default").wait(1.0),
                lambda: asyncio.run(follow()),
            ):
                with pytest.raises(AWAY, match="BUSY"):
                    ask()
        finally:
            admin.script_kill()
            thread.join()
            admin.config_set("busy-reply-threshold", 5000)
    with pytest.raises(Superseded):
        store.renew("job-1", 1)


def _is_busy(client: redis.Redis) -> bool:
    try:
        client.get("x")
    except redis.ResponseError:
        return True
    return False


def test_a_redis_without_memory_does_nothing_by_halves(store: Store) -> None:
    store.register_node(node("a", 1, 1))
    running = submit(store)
    start(store, running)
    paused, waiting = submit(store), submit(store)
    store.request_pause(paused)
    error = JobError(reason="exited", message="it died")

    def everything() -> dict[str, Any]:
        return {key: store._redis.execute_command("DUMP", key, NEVER_DECODE=True) for key in store._redis.keys("*")}

    before = everything()
    store._redis.config_set("maxmemory", 1)
    try:
        changes: dict[str, Callable[[], object]] = {
            "submit": lambda: submit(store),
            "cancel": lambda: store.request_cancel(running),
            "resume": lambda: store.resume(paused),
            "reserve": lambda: store.reserve("default"),
            "ship": lambda: store.ship(running, 1, "0-0", [("1-1", "{}")], {"step": 1}),
            "finish": lambda: store.finish(running, 1, "succeeded", "", who="t", fields={}),
            "lose": lambda: store.lose(running, 1, 3, error, who="t"),
        }
        for what, change in changes.items():
            with pytest.raises(TakesNoWrites):
                change()
            assert everything() == before, what
    finally:
        store._redis.config_set("maxmemory", 0)
    assert store.request_cancel(waiting).status == "cancelled"


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
def test_a_child_waits_for_its_parent_and_shares_a_bad_end(store: Store, end: Status) -> None:
    store.register_node(node("a", 1))
    spec = parse_spec(train_spec())
    parent = store.create_job(spec, None, children=[spec])[0].id
    (child,) = [job.id for job in store.list_jobs().data if job.parent_job_id == parent]
    grandchild = store.create_job(spec, None, parent_job_id=child)[0].id
    paused = store.create_job(spec, None, parent_job_id=parent)[0].id
    store.request_pause(paused)
    assert (store.get_job(child).status_reason, store.get_job(child).queue_position) == (f"waits for {parent}", None)
    ticket = start(store, parent)
    assert store.reserve("default") == 0
    if end == "cancelled":
        store.request_cancel(parent)
    store.finish(parent, ticket.attempt, end, "", who="t", fields={})
    late = store.create_job(spec, None, parent_job_id=parent)[0]
    if end == "succeeded":
        assert [store.get_job(j).status for j in (child, grandchild, paused)] == ["queued", "queued", "paused"]
        assert (store.get_job(child).queue_position, late.queue_position) == (1, 2)
        assert store.get_job(grandchild).queue_position is None
        store.resume(paused)
        assert store.get_job(paused).queue_position is not None
    else:
        assert {store.get_job(j).status for j in (child, grandchild, paused, late.id)} == {"cancelled"}
        assert store.get_job(child).status_reason.startswith(f"its parent {parent} ")


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled before"])
def test_children_run_one_after_the_other_whichever_way_the_first_ends(store: Store, end: str) -> None:
    store.register_node(node("a", 1, 1))
    spec = parse_spec(train_spec())
    parent = store.create_job(spec, None, children=[spec, spec])[0].id
    second, first = [job.id for job in store.list_jobs().data if job.parent_job_id == parent]
    ticket = start(store, parent)
    if end == "cancelled before":
        store.request_cancel(first)
    store.finish(parent, ticket.attempt, "succeeded", "", who="t", fields={})
    if end != "cancelled before":
        assert store.get_job(second).status_reason == f"waits for {first}"
        ticket = start(store, first)
        assert store.reserve("default") == 0
        store.finish(first, ticket.attempt, cast(Status, end), "", who="t", fields={})
    assert (store.get_job(second).status, store.get_job(second).queue_position) == ("queued", 1)
    start(store, second)


def test_a_cancelled_child_waits_for_nobody(store: Store) -> None:
    store.register_node(node("a", 1))
    spec = parse_spec(train_spec())
    parent = store.create_job(spec, None, children=[spec, spec])[0].id
    second, _ = [job.id for job in store.list_jobs().data if job.parent_job_id == parent]
    store.request_cancel(second)
    store.finish(parent, start(store, parent).attempt, "succeeded", "", who="t", fields={})
    assert store.get_job(second).status_reason == "cancelled before it started"


def test_a_drained_node_takes_no_new_job(store: Store) -> None:
    store.register_node(node("a", 1))
    submit(store)
    assert store.set_schedulable("a", False).schedulable is False
    store.register_node(node("a", 1))  # its agent's next heartbeat
    assert store.reserve("default") == 0
    assert store.set_schedulable("a", True).schedulable is True
    assert store.reserve("default") == 1
    with pytest.raises(NodeNotFound):
        store.set_schedulable("b", False)


def test_a_run_goes_on_where_its_files_are(store: Store) -> None:
    store.register_node(node("a", 1).model_copy(update={"runs_root": "one"}))
    job_id = submit(store)
    store.reserve("default")
    (ticket,) = store.outbox()
    assert store.claim(ticket, "boot", "one")
    store.lose(job_id, 1, 3, JobError(reason="exited", message="it died"), who="t")
    store.retire_node("a")
    store.register_node(node("b", 1).model_copy(update={"runs_root": "two"}))
    assert store.reserve("default") == 0
    assert "with its run directory" in store.get_job(job_id).status_reason
    wide = submit(store, resources={"nodes": 2})
    store.register_node(node("c", 1).model_copy(update={"runs_root": "one"}))
    assert store.reserve("default") == 1
    assert store.get_job(job_id).nodes[0].node == "c" and store.get_job(wide).status == "queued"


def test_a_node_without_the_runs_files_cannot_claim_it(store: Store) -> None:
    store.register_node(node("a", 1))
    job_id = submit(store)
    assert store.reserve("default") == 1
    assert store.claim(store.outbox()[0], "boot", "one")
    store.lose(job_id, 1, 3, JobError(reason="exited", message="it died"), who="t")
    assert store.reserve("default") == 0  # but two machines of one name may take turns in saying what they have
    change(store, job_id, "root", None)
    assert store.reserve("default") == 1
    store._redis.hset(KEYS["job"] + job_id, "root", "one")
    ticket = store.outbox()[-1]
    assert not store.claim(ticket, "boot", "two") and store.claim(ticket, "boot", "one")


def test_a_job_that_found_no_room_goes_where_there_may_be_some(store: Store) -> None:
    store.register_node(node("a", 1).model_copy(update={"runs_root": "one"}))
    job_id = submit(store)
    assert store.reserve("default") == 1 and store.claim(store.outbox()[0], "boot", "one")
    store.lose(job_id, 1, 0, JobError(reason="disk_full", message="no room"), who="t")
    store.register_node(node("b", 1).model_copy(update={"runs_root": "two"}))
    change(store, job_id, "not_before", store._now() - 1)
    assert store.reserve("default") == 1
    assert store.get_job(job_id).nodes[0].node == "b"
    assert store.claim(store.outbox()[-1], "boot", "two")


def test_a_job_of_a_pool_that_nobody_serves_says_so(store: Store) -> None:
    job_id = submit(store, resources={"pool": "tpyo"})
    assert store.get_job(job_id).status_reason == "waits for a worker of pool tpyo"


def test_after_redis_was_away_nothing_is_placed_before_who_runs_could_say_so(store: Store) -> None:
    store.register_node(node("a", 1))
    submit(store)
    store.hold_off()
    assert store.reserve("default") == 0
    store._redis.set(KEYS["hold"], store._now() - 0.1)
    assert store.reserve("default") == 1


def test_a_deleted_job_does_not_come_back_with_a_launcher_that_was_cut_off(store: Store) -> None:
    store.register_node(node("a", 1))
    job_id = submit(store)
    start(store, job_id)
    record = store.record(job_id)
    let_leases_run_out(store)
    assert store.lose_expired(3) == [job_id]
    store.request_cancel(job_id)
    store.delete_job(job_id)
    assert not store.reassert(1, record, who="a-0")
    with pytest.raises(JobNotFound):
        store.get_job(job_id)


def test_a_wish_that_only_the_launcher_remembers_ends_the_job(store: Store) -> None:
    store.register_node(node("a", 1))
    job_id = submit(store)
    start(store, job_id)
    record = store.record(job_id)
    store.request_cancel(job_id)
    store._redis.flushall()
    assert store.reassert(1, record, who="a-0") and store.get_job(job_id).status == "running"
    assert store.finish(job_id, 1, "cancelled", "cancelled on request", who="a-0", fields={}) == "cancelled"


def test_what_an_ended_run_reported_leaves_redis_after_a_month(store: Store) -> None:
    store.register_node(node("a", 1))
    job_id = submit(store)
    ticket = start(store, job_id)
    store.ship(job_id, 1, "0-0", [("1-1", "{}")], {})
    assert store._redis.ttl(KEYS["events"] + job_id) == -1
    store.finish(job_id, ticket.attempt, "succeeded", "", who="t", fields={})
    assert 29 * 86400 < store._redis.ttl(KEYS["events"] + job_id) <= 30 * 86400


@pytest.mark.parametrize("forgotten", ["the attempt", "the job"])
def test_an_attempt_that_redis_forgot_is_asserted_again(store: Store, forgotten: str) -> None:
    store.register_node(node("a", 1))
    job_id = submit(store)
    before = store._redis.dump(KEYS["job"] + job_id) if forgotten == "the attempt" else None
    start(store, job_id)
    record = store.record(job_id)
    for key in (KEYS["job"] + job_id, KEYS["leases"], KEYS["owners"], KEYS["events"] + job_id):
        store._redis.delete(key)
    if before is not None:
        store._redis.restore(KEYS["job"] + job_id, 0, before)
    with pytest.raises(Superseded):
        store.renew(job_id, 1)
    assert store.reassert(1, record, who="a-0")
    assert store.renew(job_id, 1) == ""
    job = store.get_job(job_id)
    assert (job.status, job.attempt, store.list_nodes()[0].slots[0].job_id) == ("running", 1, job_id)
    assert store.list_jobs().data[0].id == job_id
    store.lose(job_id, 1, 3, JobError(reason="exited", message="it died"), who="t")
    assert not store.reassert(1, record, who="a-0")  # superseded, not forgotten


def test_an_attempt_asserted_again_frees_what_an_older_one_had(store: Store) -> None:
    for name in "ab":
        store.register_node(node(name, 1))
    job_id = submit(store)
    start(store, job_id)
    older = {key: store._redis.dump(key) for key in (KEYS["job"] + job_id, KEYS["leases"], KEYS["owners"])}
    store.lose(job_id, 1, 3, JobError(reason="launcher_lost", message="it was lost"), who="t")
    store.set_schedulable(store.get_job(job_id).nodes[0].node, False)
    start(store, job_id)
    record = store.record(job_id)
    for key, value in older.items():
        store._redis.restore(key, 0, value, replace=True)
    assert store.reassert(2, record, who="b-0") and store.renew(job_id, 2) == ""
    assert [slot.job_id for n in store.list_nodes() for slot in n.slots] == [None, job_id]
    store.finish(job_id, 2, "succeeded", "", who="b-0", fields={})
    assert store._redis.hgetall(KEYS["owners"]) == {} and store._redis.zcard(KEYS["leases"]) == 0


DAMAGE = {
    "a lost kind": ("kind", None),
    "a lost pool": ("pool", None),
    "a lost status": ("status", None),
    "an unknown status": ("status", "resting"),
    "labels that are not JSON": ("labels", "{"),
    "nodes that are not JSON": ("nodes", "[{"),
    "a spec of another type": ("spec", "[]"),
    "a time that is not one": ("created_at", "yesterday"),
}


@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize("field, text", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_record_is_shown_cancelled_and_deleted(
    store: Store, field: str, text: str | None, runs: bool
) -> None:
    store.register_node(node("a", 1))
    whole, damaged = submit(store), submit(store, resources={"priority": 1})
    if runs:
        start(store, damaged)
    record = KEYS["job"] + damaged
    store._redis.hdel(record, field) if text is None else store._redis.hset(record, field, text)
    shown = {job.id: job.damaged for job in store.list_jobs().data}
    assert shown[whole] == [] and shown[damaged] == ([] if field == "pool" else [field])
    assert store.get_job(damaged).damaged == shown[damaged]
    assert store.census().statuses
    store.request_cancel(damaged)
    if runs:
        with pytest.raises(NotPossible):
            store.delete_job(damaged)
        assert store.renew(damaged, 1) == "cancel"
        assert store.finish(damaged, 1, "cancelled", "", who="t", fields={}) == "cancelled"
        assert store._redis.hgetall(KEYS["owners"]) == {}
    store.delete_job(damaged)
    assert [job.id for job in store.list_jobs().data] == [whole]
    assert store.reserve("default") == 1 and store.get_job(whole).status == "starting"


def test_a_record_of_unknown_status_is_deleted_without_being_cancelled(store: Store) -> None:
    parent = submit(store)
    child = store.create_job(parse_spec(train_spec()), None, parent_job_id=parent)[0].id
    store._redis.hset(KEYS["job"] + parent, "status", "resting")
    store.delete_job(parent)
    assert [(job.id, job.status) for job in store.list_jobs().data] == [(child, "cancelled")]


def test_what_fails_again_and_again_is_noted_once_and_is_read_from_where_a_client_was(store: Store) -> None:
    store.register_node(node("a", 1))
    job_id, seen, after = submit(store), list[str](), "0-0"
    for attempt in range(1, 30):
        change(store, job_id, "not_before", store._now() - 1)
        store._redis.delete(KEYS["deaf"])
        assert store.reserve("default") == 1
        (ticket,) = store.outbox()
        store.clear_outbox(ticket)
        assert store.claim(ticket, "boot")
        if attempt == 20:
            store.ship(job_id, attempt, "0-0", [(f"{attempt}-1", "{}")], {})
        store.lose(job_id, attempt, 0, JobError(reason="disk_full", message="no room"), who="t")
        fresh = store.read_stream(job_id, after, 1000)[1]
        seen += [change_id for change_id, _ in fresh]
        after = seen[-1]
    kept = status_changes(store, job_id)
    assert len(seen) == 1 + 2 * 29 and seen == sorted(set(seen), key=place)
    assert len(kept) < 15 and [change.id for change in kept] == [one for one in seen if one in {c.id for c in kept}]
    assert all(before.to_status == next_one.from_status for before, next_one in pairwise(kept))
    assert store.newest(job_id) == kept[-1].id == seen[-1]
    later = store.read_stream(job_id, "20-1", 1000)[1]
    assert [one for one, _ in later] == [change.id for change in kept if place(change.id) > (20, 1)]
