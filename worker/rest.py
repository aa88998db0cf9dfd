"""Ships what lost attempts left, gives up those that no other attempt follows, and removes the run directories of jobs
that were deleted from another home: `python -m worker.rest`.

An agent starts it when there is any of that. It is a process of its own because a long run takes longer to read, or to
remove, than a lease lasts, and the agent must not stand still meanwhile.
"""

import logging
import os
import sys

from gptcore.procs import die_with_parent
from worker.connection import AWAY
from worker.deletion import remove_leftovers
from worker.place import runs_root_id
from worker.settings import Settings
from worker.shipper import end_shipped, ship_rest
from worker.store import Store

log = logging.getLogger("trainmaster.worker")


def ship_lost(store: Store, settings: Settings) -> None:
    """Ship the rest of each lost attempt whose files are here. Raises AWAY."""
    for job_id, attempt in store.unshipped(runs_root_id(settings)):
        if ship_rest(store, settings.runs, job_id, attempt):
            end_shipped(store, job_id, attempt, "scheduler")
        if store.lose_shipped(job_id, attempt, settings.max_attempts):
            log.warning("%s: its attempt showed no sign of life and is given up", job_id)


def main() -> int:
    """Look once; the agent starts another process for what is left. Return the exit code."""
    die_with_parent(parent_pid=os.getppid())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    settings = Settings.from_environment()
    store = Store(settings.redis_url)
    try:
        ship_lost(store, settings)
        remove_leftovers(store, settings.runs)
    except AWAY as error:
        log.warning("Redis is away: %s", error)
        return 1
    finally:
        store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
