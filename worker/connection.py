"""How this project speaks to Redis."""

from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.client import Pipeline
from redis.exceptions import MasterDownError, OutOfMemoryError, ReadOnlyError
from redis.retry import Retry

AWAY = (redis.ConnectionError, redis.TimeoutError)


class TakesNoWrites(redis.ConnectionError):
    """Redis answers, but its disk or memory is full, or it became a replica: as good as away for who must write."""


class _Answers:
    """What a client and its pipelines make of an error."""

    def parse_response(self, *args: Any, **options: Any) -> Any:
        try:
            return super().parse_response(*args, **options)  # type: ignore[misc]
        except redis.ResponseError as error:
            refuses = (OutOfMemoryError, ReadOnlyError, MasterDownError)
            if isinstance(error, refuses) or str(error).startswith(("MISCONF", "NOREPLICAS")):
                why = str(error).partition(". script:")[0]  # where in which script says nothing here
                raise TakesNoWrites(f"Redis takes no writes: {why}") from error
            raise


class _Pipeline(_Answers, Pipeline):
    pass


class _Redis(_Answers, redis.Redis):
    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Pipeline:
        return _Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


def connect(url: str, socket_timeout: float = 5.0, **options: Any) -> redis.Redis:
    """To `url` as redis-py takes it: redis://, rediss://, unix://. What is asked of it may raise AWAY.

    Nothing is retried: a command that timed out may have run, and redis-py's own retries would run it twice.
    """
    return _Redis.from_url(
        url, retry=Retry(NoBackoff(), 0), socket_timeout=socket_timeout, socket_connect_timeout=socket_timeout,
        health_check_interval=0, **options,
    )  # fmt: skip


class Connected:
    """Who has a connection whose answers are text. Every method may raise AWAY."""

    def __init__(self, url: str, socket_timeout: float = 5.0):
        self._redis: Any = connect(url, socket_timeout, decode_responses=True)  # typed as bytes or text or a future

    def close(self) -> None:
        self._redis.close()
