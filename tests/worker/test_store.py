"""The store against a real Redis: what must happen once, in order, or not at all."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from gptcore.spec import parse_spec
from tests.worker.conftest import node, start, train_spec
from worker.job import TRANSITIONS, JobError, new_job_id
from worker.keys import KEYS
from worker.store import BadCursor, IdempotencyConflict, JobNotFound, Store, Superseded


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
    assert [(c.from_status, c.to_status) for c in store.status_changes(job.id)] == [("", "queued")]


def test_many_posts_with_one_key_make_one_job(store: Store) -> None:
    spec = parse_spec(train_spec())
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: store.create_job(spec, None, idempotency_key="k", body_sha256="a"), range(32)))
    assert len({job.id for job, _ in made}) == 1 and sum(created for _, created in made) == 1
    with pytest.raises(IdempotencyConflict, match="another body"):
        store.create_job(spec, None, idempotency_key="k", body_sha256="b")


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
    store.register_node(node("a", 1))
    too_large = submit(store, resources={"ranks_per_node": 4})
    submit(store)
    store._redis.hset(KEYS["job"] + too_large, "queued_at", store._now() - 601)
    assert store.reserve("default") == 0


def test_concurrent_schedulers_never_give_a_slot_twice(store: Store, redis_url: str) -> None:
    for name in "abcd":
        store.register_node(node(name, 1, 1, 2))
    jobs = [submit(store, resources={"nodes": 1 + n % 3}) for n in range(40)]
    ended: list[str] = []

    def work(worker: int) -> None:
        mine = Store.connect(redis_url)
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
    changes = [c.to_status for c in store.status_changes(job_id)]
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


def test_attempts_lost_in_a_row_end_the_job_and_unclaimed_ones_do_not_count(store: Store) -> None:
    store.register_node(node("a", 1))
    job_id = submit(store)
    for _ in range(5):
        assert store.reserve("default") == 1  # nobody claims
        let_leases_run_out(store)
        store.lose_expired(max_attempts=2)
    assert store.get_job(job_id).status == "recovering"
    for expected in ("recovering", "failed"):
        store._redis.delete(KEYS["outbox"])
        ticket = start(store, job_id)
        store.lose(job_id, ticket.attempt, 2, JobError(reason="exited", message="it died"), who="t")
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


def test_a_repeated_event_is_one_event_and_a_late_one_is_stale(store: Store) -> None:
    store.append_events("job-x", 1, [(1, "a"), (2, "b")])
    store.append_events("job-x", 1, [(1, "a"), (2, "b"), (3, "c")])
    store.append_events("job-x", 2, [(1, "d")])
    store.append_events("job-x", 1, [(4, "late")])
    assert store.read_events("job-x") == [("1-1", "a"), ("1-2", "b"), ("1-3", "c"), ("2-1", "d")]
    assert store.read_events("job-x", after="1-3") == [("2-1", "d")]


def test_a_follower_gets_every_event_and_ends_with_the_job(store: Store) -> None:
    store.register_node(node("a", 1))
    job_id = submit(store)
    start(store, job_id)
    store.append_events(job_id, 1, [(1, "one"), (2, "two")])

    def write() -> None:
        for seq in range(3, 50):
            store.append_events(job_id, 1, [(seq, str(seq))])
        time.sleep(0.3)  # longer than the follower's quiet time
        store.append_events(job_id, 1, [(50, "last")])
        store.finish(job_id, 1, "succeeded", "", who="t", fields={})

    async def follow() -> list[tuple[str, str] | None]:
        return [item async for item in store.follow_events(job_id, "1-1", quiet_seconds=0.1)]

    writer = threading.Thread(target=write)
    writer.start()
    began = time.monotonic()
    items = asyncio.run(follow())
    writer.join()
    assert [item[0] for item in items if item] == [f"1-{seq}" for seq in range(2, 51)]
    assert None in items and time.monotonic() - began < 5


def test_following_an_unknown_job_is_refused(store: Store) -> None:
    async def follow() -> None:
        async for _ in store.follow_events("job-none"):
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
    hardware = store.pool_hardware("default")
    assert hardware is not None and hardware.ranks == 6
    store.retire_node("a")
    submit(store)
    assert store.reserve("default") == 0
    assert store.pool_hardware("default") is None
    assert [n.live for n in store.list_nodes()] == [False]
