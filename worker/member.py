"""A further node's part in an attempt: torchrun beside the first node's, and nothing said of the job.

The first node's launcher speaks for the attempt. A member holds a lease of its own, which names its node
when it is lost, and leaves only once nothing of its part lives.
"""

import time

from gptcore.locks import shared
from gptcore.rundir import RunDir, write_atomically
from gptcore.spec import read_spec
from worker import processes, trainer
from worker.hold import TICK_SECONDS, Hold, draining
from worker.settings import Settings
from worker.store import LEASE_SECONDS, Superseded

# for a part whose other parts are gone: its ranks wait for theirs in vain
BROKEN_SECONDS = 3.0
FILES_SECONDS = 75.0  # for the first node's files to appear: longer than NFS caches that a file is missing


class Member:
    def __init__(self, settings: Settings, hold: Hold):
        self._settings = settings
        self._hold = hold
        self._ticket = hold.ticket
        self._run_dir = RunDir(settings.runs / hold.ticket.job_id)
        self._attempt = self._run_dir.attempt(hold.ticket.attempt)
        self._held_at = time.monotonic()

    def run(self) -> None:
        """Raises Superseded once nothing of this part lives, where the attempt was given up meanwhile."""
        broke = ""
        if self._clear_slot() and (meeting := self._await_meeting()):
            if self._await_files():
                processes.sign(self._attempt.path, self._ticket.node_rank)
                with shared(self._attempt.lock):
                    broke = self._train(meeting)
            else:
                broke = f"{self._name}: {self._run_dir.spec} did not appear within {FILES_SECONDS:g} s; "
                broke += "is the runs root one file system on all nodes?"
        ticket = self._ticket
        self._hold.insist(lambda: self._hold.store.leave(ticket.job_id, ticket.attempt, ticket.node_rank, broke))

    def _clear_slot(self) -> bool:
        """Wait until nothing of another attempt lives in this slot; false when the attempt is over already."""
        kill_at = time.monotonic() + self._settings.grace_seconds
        while left := processes.leftovers(self._ticket, self._settings.home):
            if self._word() == "over":
                return False
            if time.monotonic() > kill_at:
                processes.kill(*left)
            time.sleep(TICK_SECONDS)
        return True

    def _await_meeting(self) -> str:
        """Where the ranks meet, once the first node says so; empty when the attempt is over before that."""
        while not (word := self._word()):
            time.sleep(TICK_SECONDS)
        return "" if word == "over" else word

    def _await_files(self) -> bool:
        """Wait until what the first node wrote is seen here; false after FILES_SECONDS, or once the attempt is over.

        An NFS client remembers for up to a minute that a file was not there.
        """
        give_up_at = time.monotonic() + FILES_SECONDS
        while not (self._run_dir.spec.exists() and self._attempt.path.exists()):
            if self._word() == "over" or time.monotonic() > give_up_at:
                return False
            time.sleep(TICK_SECONDS)
        return True

    def _train(self, meeting: str) -> str:
        """Run this node's ranks to their end; why they broke, where they did."""
        spec = read_spec(self._run_dir.spec)
        log = self._attempt.node_log(self._ticket.node_rank)
        tree = trainer.start(spec, self._settings, self._run_dir.path, self._ticket, meeting, log)
        over = False
        while tree.alive():
            try:
                over |= self._word() == "over"
            except Superseded:
                over = True
            if over:
                tree.end_within(BROKEN_SECONDS)
            if draining.is_set() and not self._attempt.stop.exists():
                write_atomically(self._attempt.stop, "pause")  # for all: the first rank reads it
                tree.end_within(self._settings.grace_seconds)
            time.sleep(TICK_SECONDS)
        if over or tree.returncode == 0 or self._attempt.stop.exists():
            return ""
        return f"{self._name}: torchrun ended with {tree.returncode}"

    @property
    def _name(self) -> str:
        return f"node rank {self._ticket.node_rank} in slot {self._ticket.slot}"

    def _word(self) -> str:
        """What the first node says: see `Store.renew`. Raises Superseded, but not for one moment's word.

        Redis may have come back without the attempt: the first node's launcher asserts it, for all.
        """
        try:
            word = self._hold.renew()
        except Superseded:
            if time.monotonic() > self._held_at + LEASE_SECONDS / 2:
                raise
            return ""
        self._held_at = time.monotonic()
        return word
