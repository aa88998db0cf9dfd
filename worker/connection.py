"""How this project speaks to Redis."""

from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import ClusterDownError, MasterDownError, OutOfMemoryError, ReadOnlyError, TryAgainError
from redis.retry import Retry

AWAY = (redis.ConnectionError, redis.TimeoutError)
# a command that found Redis so did nothing. "BUSY " is a script that runs too long, and BUSYGROUP something else
_NOT_NOW = ("BUSY ", "UNBLOCKED", "NOMASTERLINK")


class TakesNoWrites(redis.ConnectionError):
    """Redis answers, but its disk or memory is full, or it became a replica: as good as away for who must write."""


class NotNow(redis.ConnectionError):
    """Redis answers that it cannot execute commands for now: as good as away."""


def _as_away(error: redis.ResponseError) -> redis.RedisError | None:
    """Return the error of AWAY that stands for an answer of Redis; None if the same command would fail again."""
    text = str(error).partition(". script:")[0]  # where in which script says nothing here
    full = isinstance(error, (OutOfMemoryError, ReadOnlyError, MasterDownError))
    if full or text.startswith(("MISCONF", "NOREPLICAS")):
        return TakesNoWrites(f"Redis takes no writes: {text}")
    passing = isinstance(error, (TryAgainError, ClusterDownError)) or "Script killed by user" in text
    if passing or text.startswith(_NOT_NOW):
        return NotNow(f"Redis executes no commands now: {text}")
    return None


class _Answers:
    """A connection, as the base class after it makes it, that raises what `_as_away` returns."""

    def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return super().read_response(*args, **options)  # type: ignore[misc]
        except redis.ResponseError as error:
            if (away := _as_away(error)) is not None:
                raise away from error
            raise


class _AsyncAnswers:
    async def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*args, **options)  # type: ignore[misc]
        except redis.ResponseError as error:
            if (away := _as_away(error)) is not None:
                raise away from error
            raise


def _answering(pool: Any, answers: type) -> None:
    """Have all connections of a new pool read answers so, also those to log in and to subscribe."""
    pool.connection_class = type("Connection", (answers, pool.connection_class), {})


def connect(url: str, socket_timeout: float = 5.0, **options: Any) -> redis.Redis:
    """To `url` as redis-py takes it: redis://, rediss://, unix://. What is asked of it may raise AWAY.

    Nothing is retried: a command that timed out may have run, and redis-py's own retries would run it twice.
    """
    client = redis.Redis.from_url(
        url, retry=Retry(NoBackoff(), 0), socket_timeout=socket_timeout, socket_connect_timeout=socket_timeout,
        health_check_interval=0, **options,
    )  # fmt: skip
    _answering(client.connection_pool, _Answers)
    return client


def connect_async(url: str, socket_timeout: float, **options: Any) -> redis.asyncio.Redis:
    """The same for an event loop."""
    client = redis.asyncio.Redis.from_url(
        url, retry=AsyncRetry(NoBackoff(), 0), socket_timeout=socket_timeout, **options
    )
    _answering(client.connection_pool, _AsyncAnswers)
    return client


class Connected:
    """Who has a connection whose answers are text. Every method may raise AWAY."""

    def __init__(self, url: str, socket_timeout: float = 5.0):
        self._redis: Any = connect(url, socket_timeout, decode_responses=True)  # typed as bytes or text or a future

    def close(self) -> None:
        self._redis.close()
