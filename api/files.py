"""What a run left in its directory: checkpoints, samples, and every file by its path."""

import os
from contextlib import suppress
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from starlette.types import Message, Receive, Scope, Send

from api.planning import is_inside
from api.problems import Refusal
from api.routes import PROBLEMS, With
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


@router.get("/jobs/{job_id}/checkpoints")
def checkpoints(job_id: str, services: With) -> list[CheckpointSummary]:
    """Those kept, oldest first."""
    best = services.store.get_job(job_id).best_checkpoint
    points = services.run(job_id).metrics(["val_loss"]).series["val_loss"]
    val_losses = dict(zip(points.step, points.value, strict=True))
    return [
        CheckpointSummary(
            step=step, attempt=attempt, path=f"checkpoints/{path.name}",
            bytes=sum(sizes.values()),
            val_loss=val_losses.get(step), best=best is not None and step == best.step,
        )
        for path, step, attempt in RunDir(services.settings.runs / job_id).complete_checkpoints()
        if (sizes := _sizes(path))
    ]  # fmt: skip


@router.get("/jobs/{job_id}/samples")
def samples(job_id: str, services: With) -> list[Sampled]:
    """Texts that the model wrote while it learned, oldest first; of a step made twice the newest."""
    services.store.get_job(job_id)
    return services.run(job_id).samples()


@router.get("/jobs/{job_id}/artifacts")
def artifacts(job_id: str, services: With) -> list[Artifact]:
    """Every file of the run directory, by path."""
    services.store.get_job(job_id)
    root = services.settings.runs / job_id
    return [Artifact(path=str(path.relative_to(root)), bytes=size) for path, size in sorted(_sizes(root).items())]


def _sizes(root: Path) -> dict[Path, int]:
    """Every file beneath, with its bytes; one that goes meanwhile, as old checkpoints do, is passed over."""
    found = {}
    for file in (Path(folder) / name for folder, _, names in os.walk(root) for name in names):
        with suppress(FileNotFoundError):
            if is_inside(file, root) and file.is_file():
                found[file] = file.stat().st_size
    return found


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
