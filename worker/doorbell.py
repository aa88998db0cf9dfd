"""How a pool's agents learn that there may be something to place, without asking all the time."""

from typing import Any

from worker.keys import KEYS


class Doorbell:
    """Rings when something may be placed in a pool. A ring can be lost: look now and then anyway."""

    def __init__(self, pubsub: Any, pool: str):
        self._pubsub = pubsub
        pubsub.subscribe(KEYS["doorbell"] + pool)

    def wait(self, seconds: float) -> bool:
        """Whether it rang within `seconds`."""
        rang = self._pubsub.get_message(timeout=seconds) is not None
        while rang and self._pubsub.get_message(timeout=0) is not None:
            pass  # several rings are one
        return rang

    def close(self) -> None:
        self._pubsub.close()
