"""What a run left in its directory: checkpoints, samples, and every file by its path."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from starlette.types import Message, Receive, Scope, Send

from api.planning import is_inside
from api.problems import Refusal
from api.routes import PROBLEMS, Services, With
from gptcore.events import Sampled
from gptcore.rundir import RunDir

router = APIRouter(responses=PROBLEMS, tags=["runs"])


class CheckpointSummary(BaseModel, ser_json_inf_nan="strings"):
    """A complete checkpoint; `path` is its folder, for `/artifacts`."""

    step: int
    attempt: int
    path: str
    bytes: int
    val_loss: float | None = Field(description="nats a token; null: not evaluated at this step")
    best: bool


class _Download(FileResponse):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def refusing(message: Message) -> None:
            if message.get("status") in (400, 416):  # which Starlette says in plain text
                headers = {"Content-Range": f"bytes */{self.headers['content-length']}"}
                raise Refusal(416, "bad_range", "the Range names no part of the file", headers=headers)
            await send(message)

        await super().__call__(scope, receive, refusing)


class Artifact(BaseModel):
    path: str
    bytes: int


class ArtifactPage(BaseModel):
    """By path. `next` is the `after` of the page that follows, null on the last one."""

    data: list[Artifact]
    has_more: bool
    next: str | None


@router.get("/jobs/{job_id}/checkpoints")
async def checkpoints(job_id: str, services: With) -> list[CheckpointSummary]:
    """Those kept, oldest first."""
    return await services.read(_checkpoints, services, job_id)


def _checkpoints(services: Services, job_id: str) -> list[CheckpointSummary]:
    best = services.store.get_job(job_id).best_checkpoint
    val_losses = dict(zip(*services.run(job_id).part("val_loss"), strict=True))
    return [
        CheckpointSummary(
            step=step, attempt=attempt, path=f"checkpoints/{path.name}",
            bytes=sum(sizes),
            val_loss=val_losses.get(step), best=best is not None and step == best.step,
        )
        for path, step, attempt in RunDir(services.settings.runs / job_id).complete_checkpoints()
        if (sizes := [size for _, size in _files(path, path)])
    ]  # fmt: skip


@router.get("/jobs/{job_id}/samples")
async def samples(job_id: str, services: With) -> list[Sampled]:
    """Texts that the model wrote while it learned, oldest first; of a step made twice the newest."""

    def read() -> list[Sampled]:
        services.store.get_job(job_id)
        return services.run(job_id).samples()

    return await services.read(read)


@router.get("/jobs/{job_id}/artifacts")
async def artifacts(
    job_id: str,
    services: With,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
    after: Annotated[str, Query(description="a page's `next`: only what comes after this path")] = "",
) -> ArtifactPage:
    """The files of the run directory, by path. A name that is not UTF-8 is shown with its bytes as \\xff and has no
    download."""

    def read() -> ArtifactPage:
        services.store.get_job(job_id)
        root = services.settings.runs / job_id
        found = list(islice(_files(root, root, after.split("/")), limit + 1))
        page = [Artifact(path=path, bytes=size) for path, size in found[:limit]]
        has_more = len(found) > limit
        return ArtifactPage(data=page, has_more=has_more, next=page[-1].path if has_more else None)

    return await services.read(read)


def _files(folder: Path, root: Path, after: Sequence[str] = ("",)) -> Iterator[tuple[str, int]]:
    """Path in `folder` and bytes of the files beneath, by path, after the path with the parts `after`.

    Files that vanish meanwhile, as old checkpoints do, are passed over, and so are links that lead out of `root`.
    Only the folders on the way to the files taken are read.
    """
    first, *rest = after
    try:
        with os.scandir(folder) as listing:
            entries = sorted(
                ((name, entry) for entry in listing if (name := _shown(entry.name)) >= first), key=itemgetter(0)
            )
    except OSError:
        return
    for name, entry in entries:
        with suppress(OSError):
            if entry.is_dir(follow_symlinks=False):
                inside = _files(Path(entry.path), root, rest if rest and name == first else ("",))
                yield from ((f"{name}/{path}", size) for path, size in inside)
                continue
            is_passed = name == first and not rest
            leads_out = entry.is_symlink() and not is_inside(Path(entry.path), root)
            if not is_passed and not leads_out and entry.is_file():
                yield name, entry.stat().st_size


def _shown(name: str) -> str:
    """A name for JSON, which has no bytes: one that is not UTF-8 has them as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@router.get(
    "/jobs/{job_id}/artifacts/{path:path}",
    response_class=FileResponse,
    responses={200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}},
)
def artifact(job_id: str, path: str, services: With) -> FileResponse:
    """One file of the run directory, whole or by `Range`."""
    services.store.get_job(job_id)
    root = services.settings.runs / job_id
    file = root / path
    if not is_inside(file, root) or not file.is_file():
        detail = f"{job_id} has no file {path!r}; GET /jobs/{job_id}/artifacts lists them"
        raise Refusal(404, "artifact_not_found", detail)
    # offered for download: what a run wrote is never shown as a page of this server
    return _Download(file, media_type="application/octet-stream", filename=file.name)
