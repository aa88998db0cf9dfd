"""Every error as RFC 9457 has it: application/problem+json, with a `code` for programs."""

import json
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from gptcore.spec import Problem, SpecError, cut, problems_of
from worker.connection import AWAY, TakesNoWrites
from worker.store import BadCursor, IdempotencyConflict, JobNotFound, NodeNotFound, NotPossible

MEDIA_TYPE = "application/problem+json"
MOST_IN_DETAIL = 3  # problems; `errors` holds the others
LONGEST_DETAIL = 4000  # characters: a path or a header that is named can be as long as a request's head


class ProblemDetails(BaseModel):
    """What every error answer holds. `code` and `errors` are ours, the rest is RFC 9457's."""

    type: str = "about:blank"
    title: str = Field(description="the status in words", examples=["Unprocessable Content"])
    status: int = Field(examples=[422])
    detail: str = Field(description="what is wrong and the way out, for people")
    code: str = Field(description="names the situation, for programs", examples=["invalid_spec", "job_not_found"])
    errors: list[Problem] = Field(
        [], description="each thing wrong: JSON pointer into the body, or /query/…, /header/… for a parameter"
    )


class Refusal(Exception):
    """An error answer that a route gives; the handlers below make one of every other exception."""

    def __init__(
        self, status: int, code: str, detail: str, errors: Sequence[Problem] = (), headers: dict[str, str] | None = None
    ):
        title, detail = HTTPStatus(status).phrase, cut(detail, LONGEST_DETAIL)
        self.details = ProblemDetails(title=title, status=status, detail=detail, code=code, errors=list(errors))
        self.headers = headers
        super().__init__(detail)

    def response(self) -> Response:
        body = json.dumps(self.details.model_dump())  # in ASCII: a name that is refused may be no UTF-8
        return Response(body, self.details.status, self.headers, media_type=MEDIA_TYPE)


def _invalid(code: str, problems: list[Problem]) -> Refusal:
    detail = "; ".join(f"{problem.pointer or '/'}: {problem.message}" for problem in problems[:MOST_IN_DETAIL])
    more = len(problems) - MOST_IN_DETAIL
    return Refusal(422, code, f"{detail}; and {more} more in errors" if more > 0 else detail, problems)


def _invalid_request(error: RequestValidationError, request: Request) -> Refusal:
    found = error.errors()
    if found[0]["type"] == "json_invalid":
        detail = f"the body is not JSON: {found[0]['ctx']['error']} at character {found[0]['loc'][-1]}"
        return Refusal(400, "invalid_json", detail)
    in_body = [one for one in found if one["loc"][0] == "body"]
    if in_body:
        loc = tuple(in_body[0]["loc"])
        root = loc[: 2 if loc[1:2] in (("spec",), ("from",)) else 1]  # a discriminator's level is not in the document
        return _invalid("invalid_spec", problems_of(in_body, root=root))
    # a parameter that may be repeated is named, not its place in the list
    return _invalid("invalid_parameter", problems_of([{**one, "loc": one["loc"][:2]} for one in found]))


_CODES = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed", 413: "content_too_large"}


def _http(error: HTTPException, request: Request) -> Refusal:
    """What the framework itself refuses."""
    status, path = error.status_code, request.url.path
    headers = dict(error.headers or {})
    if status == 405:  # the framework names the methods of one route of several
        operations = request.app.openapi()["paths"].get(getattr(request.scope.get("route"), "path", ""), {})
        headers["Allow"] = ", ".join(map(str.upper, operations)) or headers.get("Allow", "")
    detail = {
        400: f"the body cannot be read as JSON: {error.__cause__ or error.detail}",
        404: f"there is nothing at {path}; GET /docs shows what there is",
        405: f"{request.method} is not for {path}; use {headers.get('Allow', 'another method')}",
    }.get(status, error.detail)
    return Refusal(status, _CODES.get(status, f"http_{status}"), detail, headers=headers)


def _nothing(what: str, error: Exception) -> Refusal:
    return Refusal(404, f"{what}_not_found", f"there is no {what} {str(error)!r}; GET /{what}s lists them")


def _away(error: Exception, request: Request) -> Refusal:
    what = str(error) if isinstance(error, TakesNoWrites) else "Redis does not answer"
    detail = f"{what}; running jobs go on, try again in a moment"
    return Refusal(503, "store_unavailable", detail, headers={"Retry-After": "1"})


REFUSALS: dict[type[Exception], Callable[[Any, Request], Refusal]] = {
    Refusal: lambda error, _: error,
    SpecError: lambda error, _: _invalid("invalid_spec", error.problems),
    RequestValidationError: _invalid_request,
    JobNotFound: lambda error, _: _nothing("job", error),
    NodeNotFound: lambda error, _: _nothing("worker", error),
    NotPossible: lambda error, _: Refusal(409, "not_possible", str(error)),
    IdempotencyConflict: lambda error, _: Refusal(422, "idempotency_conflict", str(error)),
    BadCursor: lambda error, _: _invalid("invalid_parameter", [Problem(pointer="/query/after", message=str(error))]),
    **dict.fromkeys(AWAY, _away),
    HTTPException: _http,
    Exception: lambda *_: Refusal(500, "internal_error", "this is a fault of the server; its log has the traceback"),
}


def refusal_of(request: Request, error: Exception) -> Refusal:
    """By the nearest of the error's classes."""
    return next(REFUSALS[kind] for kind in type(error).__mro__ if kind in REFUSALS)(error, request)


async def answer(request: Request, error: Exception) -> Response:
    """The one exception handler of the application."""
    return refusal_of(request, error).response()


# Starlette looks a handler up by the classes of the exception raised
HANDLERS: dict[int | type[Exception], Any] = dict.fromkeys(REFUSALS, answer)
