"""Bodies refused before they are parsed: parsing and validating one may not hold up the event loop.

A body of 1 MiB can hold 300,000 values. Python's JSON parser and Pydantic would need half a second for them, during
which the server answers nobody. A job spec has at most a few hundred values.
"""

import re
from collections.abc import Awaitable, Callable
from itertools import islice

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from api.problems import Refusal
from gptcore.spec import Problem

MOST_VALUES = 2000
# a string as a whole, even one without its end, or what stands before each value of a JSON text
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|([,\[{])', re.DOTALL)


def has_too_many_values(body: bytes) -> bool:
    """Return whether a JSON text has more than MOST_VALUES values. Reads no more of it than that takes."""
    separators = (token for token in _TOKEN.finditer(body) if token[1])
    return next(islice(separators, MOST_VALUES, None), None) is not None


class BoundedRoute(APIRoute):
    """A route that parses no body with too many values."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def bounded(request: Request) -> Response:
            try:
                body = await request.body()
            except ClientDisconnect:  # nobody reads this
                raise Refusal(400, "invalid_json", "the connection was closed before the whole body came") from None
            if has_too_many_values(body):
                detail = f"the body has more than {MOST_VALUES:,} values; a job spec has at most a few hundred"
                raise Refusal(422, "invalid_spec", detail, [Problem(pointer="", message=detail)])
            return await handle(request)

        return bounded
