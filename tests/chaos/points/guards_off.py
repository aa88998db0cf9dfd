"""How each guard is switched off: what to change in which module after its import.

A change that finds nothing to change fails, and with it the process: a guard that moved is noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from redis.backoff import ExponentialBackoff
from redis.retry import Retry

Change = Callable[[Any], None]


def _replaced(owner: Any, name: str, by: Any) -> None:
    assert hasattr(owner, name), f"{owner} has no {name} to switch off"
    setattr(owner, name, by)


def _in_lua(part: str, *texts: tuple[str, str]) -> Change:
    """Other texts in the scripts; each old one must stand in `part`."""

    def change(keys: Any) -> None:
        scripts = keys.scripts()
        for old, new in texts:
            assert old in scripts[part], f"{old!r} is not in {part}.lua"
            scripts = {name: text.replace(old, new) for name, text in scripts.items()}
        keys.scripts = lambda: scripts

    return change


def _locks(launch: Any) -> None:
    _replaced(launch.Launcher, "_outlast", lambda self, *args: True)


def _death_signals(procs: Any) -> None:
    _replaced(procs, "die_with_parent", lambda *args, **named: None)


def _unique_tickets(tasks: Any) -> None:
    class Queue(tasks.Queue):  # type: ignore[misc]
        def enqueue_call(self, *args: Any, **named: Any) -> Any:
            assert named.pop("unique")
            return super().enqueue_call(*args, **named)

    _replaced(tasks, "Queue", Queue)


def _no_retries(connection: Any) -> None:
    # what redis-py does where nothing is said
    _replaced(connection, "Retry", lambda backoff, retries: Retry(ExponentialBackoff(cap=1, base=0.1), 10))


def _last_event_first(launch: Any) -> None:
    ship_all = launch.Launcher._ship_all

    def changed(self: Any, *args: Any) -> None:
        ship = self._hold.store.ship
        self._hold.store.ship = lambda job_id, attempt, before, events, fields, **named: ship(
            job_id, attempt, "0-0", [], fields, **named
        )
        ship_all(self, *args)
        self._hold.store.ship = ship

    launch.Launcher._ship_all = changed


def _whole_checkpoints(checkpoint: Any) -> None:
    from gptcore import rundir  # not sooner: this module is there before the product is

    def write(self: Any, step: int, meta: Any, weights: Any, moments: Any, best: Any) -> Any:
        final = self._folder(step)
        final.mkdir(parents=True)
        (final / "state.json").write_text(checkpoint.json.dumps(meta))
        checkpoint.write_tensors(weights, final / "model.safetensors")
        checkpoint.write_tensors(moments, final / "optimizer.safetensors")
        self._retire(best)
        return checkpoint.Checkpointed(step=step, path=str(final.relative_to(self._run.path)), bytes=0, seconds=0.0)

    _replaced(checkpoint.Saver, "_write", write)
    _replaced(rundir, "_has_noted_sizes", lambda path: True)


def _outbox_order(store: Any) -> None:
    outbox = store.Store.outbox

    def changed(self: Any) -> Any:
        tickets = outbox(self)
        for ticket in tickets:
            self.clear_outbox(ticket)
        return tickets

    store.Store.outbox = changed


def _kill_after_grace(processes: Any) -> None:
    _replaced(processes.Tree, "end_within", lambda self, seconds: None)
    _replaced(processes, "kill", lambda *found: None)


def _reship(shipper: Any) -> None:
    begin = shipper.Shipper._begin

    def changed(self: Any) -> None:
        begin(self)
        self._turn_to(self._holder)

    shipper.Shipper._begin = changed
    _replaced(shipper, "ship_rest", lambda *_, **named: None)


def _patience(holder: Any) -> None:
    _replaced(holder, "AWAY", ())


def _worker_patience(worker: Any) -> None:
    work = worker.Worker.work

    def changed(self: Any, *args: Any, **named: Any) -> Any:
        # the class is in __main__, which no import hook reaches
        del type(self).maintain_heartbeats
        self.job_monitoring_interval = 5  # RQ's 30 s only take longer
        return work(self, *args, **named)

    worker.Worker.work = changed


def _idempotency(store: Any) -> None:
    create = store.Store.create_job

    def changed(self: Any, spec: Any, plan: Any, **named: Any) -> Any:
        return create(self, spec, plan)

    store.Store.create_job = changed
    _replaced(store.Store, "replayed_job", lambda self, key, sha: None)


GUARDS: dict[str, dict[str, Change]] = {
    "locks": {"worker.launch": _locks},
    "death-signals": {"gptcore.procs": _death_signals},
    "fencing": {"worker.keys": _in_lua("renew", ("redis.call('HGET', K.job .. id, 'attempt') == attempt and ", ""))},
    "event-ids": {
        "worker.keys": _in_lua(
            "ship",
            ("if place_of(ARGV[index]) > place_of(known) then", "if true then"),
            ("most, ARGV[index], 'event'", "most, '*', 'event'"),
        )
    },
    "unique-tickets": {"worker.tasks": _unique_tickets},
    "no-retries": {"worker.connection": _no_retries},
    "last-event-first": {"worker.launch": _last_event_first},
    "whole-checkpoints": {"gptcore.checkpoint": _whole_checkpoints},
    "outbox-order": {"worker.store": _outbox_order},
    "kill-after-grace": {"worker.processes": _kill_after_grace},
    "lease-gap": {"worker.keys": _in_lua("lose", ("if math.abs(time - last) > lease / 2 then", "if false then"))},
    "reship": {"worker.shipper": _reship},
    "patience": {"worker.hold": _patience, "worker.launch": _patience},
    "worker-patience": {"rq.worker": _worker_patience},
    "idempotency": {"worker.store": _idempotency},
    "append-only": {},  # the world's own: see World
}
