"""How the agents learn that there may be something to do, without asking all the time."""

from typing import Any

from worker.keys import KEYS


class Doorbell:
    """Rings when there may be something to schedule. A ring can be lost: look now and then anyway."""

    def __init__(self, pubsub: Any):
        self._pubsub = pubsub
        pubsub.subscribe(KEYS["doorbell"])

    def wait(self, seconds: float) -> bool:
        """Whether it rang within `seconds`."""
        rang = self._pubsub.get_message(timeout=seconds) is not None
        while rang and self._pubsub.get_message(timeout=0) is not None:
            pass  # several rings are one
        return rang

    def close(self) -> None:
        self._pubsub.close()
