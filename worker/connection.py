"""How this project speaks to Redis."""

from __future__ import annotations

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry


def connect_redis(url: str, socket_timeout: float = 5.0) -> redis.Redis:
    """`url` as redis-py takes it: redis://, rediss://, unix://.

    Nothing is retried: a command that timed out may have run, and redis-py's own retries would run it twice.
    """
    return redis.Redis.from_url(
        url,
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=socket_timeout,
        socket_connect_timeout=socket_timeout,
        health_check_interval=0,
    )
