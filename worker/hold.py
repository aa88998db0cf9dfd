"""An attempt's hold on its job: the lease, what is wished of it, and patience while Redis is away."""

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from worker.connection import AWAY
from worker.job import Ticket
from worker.store import Store, Superseded

TICK_SECONDS = 0.2
ASK_SECONDS = 0.5  # between two renewals: each costs both sides a third of a millisecond

draining = threading.Event()  # set by SIGTERM: leave with a checkpoint, another worker goes on
log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


class Hold:
    """Of the launcher that has `ticket`. Made once the ticket is claimed."""

    def __init__(self, store: Store, ticket: Ticket, grace_seconds: float):
        self.store = store
        self.ticket = ticket
        self._grace_seconds = grace_seconds
        self._asked_at, self._wish = float("-inf"), ""
        # what Redis is told should it come back without this attempt
        self.record = patiently(lambda: store.record(ticket.job_id), grace_seconds)

    def renew(self) -> str:
        """Hold the lease and ask what is wished: see `Store.renew`; "" while Redis is away. Raises Superseded.

        Asked again at once it gives the same answer.
        """
        ticket = self.ticket
        if time.monotonic() - self._asked_at < ASK_SECONDS:
            return self._wish
        try:
            self._wish = self.store.renew(ticket.job_id, ticket.attempt, ticket.node_rank)
        except AWAY:
            return ""
        except Superseded:
            if ticket.node_rank == 0 and self._reassert():
                return ""
            raise
        self._asked_at = time.monotonic()
        return self._wish

    def insist(self, call: Callable[[], Answer]) -> Answer:
        """The answer of a call to the store, however long Redis is away. Raises Superseded.

        A worker that is to end waits no longer than the grace period; then AWAY is raised.
        """
        while True:
            try:
                return patiently(call, self._grace_seconds)
            except Superseded:
                if not (self.ticket.node_rank == 0 and patiently(self._reassert, self._grace_seconds)):
                    raise

    def _reassert(self) -> bool:
        try:
            taken = self.store.reassert(self.ticket.attempt, self.record, who=self.ticket.slot)
        except AWAY:
            return True  # not the time to give up: the next call asks again
        if taken:
            log.warning("%s: Redis had forgotten attempt %d", self.ticket.job_id, self.ticket.attempt)
        return taken


def patiently(call: Callable[[], Answer], grace_seconds: float, give_up_at: float = float("inf")) -> Answer:
    """The answer of `call`, tried again while Redis is away; raises AWAY at `give_up_at` (monotonic)."""
    while True:
        try:
            return call()
        except AWAY:
            if draining.is_set():
                give_up_at = min(give_up_at, time.monotonic() + grace_seconds)
            if time.monotonic() > give_up_at:
                raise
        time.sleep(TICK_SECONDS)
