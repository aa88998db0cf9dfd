"""How this project speaks to Redis."""

from __future__ import annotations

from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

AWAY = (redis.ConnectionError, redis.TimeoutError)


class Connected:
    """A connection to `url` as redis-py takes it: redis://, rediss://, unix://. Every method may raise AWAY.

    Nothing is retried: a command that timed out may have run, and redis-py's own retries would run it twice.
    """

    def __init__(self, url: str, socket_timeout: float = 5.0):
        # typed as bytes or text or a future; here every answer is text
        self._redis: Any = redis.Redis.from_url(
            url, decode_responses=True, retry=Retry(NoBackoff(), 0), socket_timeout=socket_timeout,
            socket_connect_timeout=socket_timeout, health_check_interval=0,
        )  # fmt: skip

    def close(self) -> None:
        self._redis.close()
