"""Checkpoints: `checkpoints/step-00001000-a0003/`, complete or not there.

Written beside the final name, synced and renamed, by a thread while training goes on. Weights and
optimiser state are safetensors, the rest JSON: loading one runs no code.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptcore.events import Checkpointed, Notice, Report
from gptcore.rundir import RunDir, sync, write_atomically
from gptcore.spec import TrainSpec
from gptcore.state import TrainState


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    attempt: int

    def meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = json.loads((self.path / "state.json").read_text("utf-8"))
        return meta

    def state(self) -> TrainState:
        return TrainState.model_validate(self.meta()["state"])

    def weights(self) -> dict[str, Tensor]:
        return load_file(self.path / "model.safetensors")

    def optimizer(self) -> dict[str, Tensor]:
        return load_file(self.path / "optimizer.safetensors")


def list_checkpoints(run: RunDir) -> list[Checkpoint]:
    """Complete ones, oldest first: by attempt, then step."""
    return [Checkpoint(*found) for found in run.complete_checkpoints()]


class Saver:
    """Saves in the background on rank 0, one at a time, and reports it; keeps the newest ones and the best.

    lost: called with the step of a checkpoint that could not be written.
    """

    def __init__(
        self, run: RunDir, spec: TrainSpec, attempt: int, report: Report,
        lost: Callable[[int], None] = lambda step: None,
    ):  # fmt: skip
        self._run, self._spec, self._attempt = run, spec, attempt
        self._report, self._lost = report, lost
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._writing: list[tuple[int, Future[Checkpointed | None]]] = []  # by step, in the order of their writing

    def save(
        self, state: TrainState, weights: dict[str, Tensor], optimizer: dict[str, Tensor], extra: dict[str, Any]
    ) -> None:
        """Take a copy of everything now, write it while training goes on."""
        self.wait()
        meta = {"state": state.model_dump(), "spec": self._spec.model_dump(mode="json"), **extra}
        copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in weights.items()}
        moments = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in optimizer.items()}
        writing: Future[Checkpointed | None] = self._pool.submit(
            self._write, state.step, meta, copies, moments, state.best_step
        )
        self._writing.append((state.step, writing))

    def poll(self) -> None:
        """Report what has been written meanwhile."""
        while self._writing and self._writing[0][1].done():
            self._take_first(needed=False)

    def wait(self, needed: bool = False) -> None:
        """Wait until all is written, and report it.

        Raises OSError if it failed and is `needed`, or is that of the last step: no later save makes up for it.
        """
        while self._writing:
            self._take_first(needed)

    def _take_first(self, needed: bool) -> None:
        step, writing = self._writing.pop(0)
        try:
            saved = writing.result()
        except OSError as error:
            written = bool(_of_step(self._run, step))
            what = "result of the evaluation" if written else "checkpoint"
            message = f"{what} at step {step} not saved, the older ones stand: {error}"
            self._report(Notice(level="warning", message=message))
            if not written:
                self._lost(step)
            if needed or step == self._spec.max_steps:
                raise
        else:
            if saved is not None:
                self._report(saved)

    def amend(self, state: TrainState) -> None:
        """Put a newer state beside the weights of the same step, also an earlier attempt's, once their save is done.

        Waits for nothing: the state of now is written after the save under way.
        """
        self._writing.append((state.step, self._pool.submit(self._amend, state.model_copy())))

    def _amend(self, state: TrainState) -> None:
        for checkpoint in _of_step(self._run, state.step)[-1:]:
            meta = checkpoint.meta() | {"state": state.model_dump()}
            write_atomically(checkpoint.path / "state.json", json.dumps(meta))

    def has(self, step: int) -> bool:
        """Whether the weights of `step` are on disk or being written."""
        return any(writing == step for writing, _ in self._writing) or bool(_of_step(self._run, step))

    def close(self) -> None:
        self.wait()
        self._pool.shutdown()

    def _write(
        self, step: int, meta: dict[str, Any], weights: dict[str, Tensor], moments: dict[str, Tensor], best: int | None
    ) -> Checkpointed:
        started = time.perf_counter()
        final = self._run.checkpoints / f"step-{step:08d}-a{self._attempt:04d}"
        beside = final.with_name(f".{final.name}.writing")
        try:
            for left in final.parent.glob(".step-*"):  # of an attempt that was killed while it wrote or deleted
                shutil.rmtree(left, ignore_errors=True)
            if final.exists():  # gone back to, so its tensors are these very ones
                meta["sizes"] = Checkpoint(final, step, self._attempt).meta()["sizes"]
                write_atomically(final / "state.json", json.dumps(meta))
            else:
                beside.mkdir(parents=True)
                write_tensors(weights, beside / "model.safetensors")
                write_tensors(moments, beside / "optimizer.safetensors")
                meta["sizes"] = {p.name: p.stat().st_size for p in sorted(beside.iterdir())}
                (beside / "state.json").write_text(json.dumps(meta), "utf-8")
                for path in (*beside.iterdir(), beside):
                    sync(path)
                beside.rename(final)
            sync(final.parent)
            self._retire(best)
        except OSError:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        size, seconds = sum(p.stat().st_size for p in final.iterdir()), time.perf_counter() - started
        return Checkpointed(step=step, path=str(final.relative_to(self._run.path)), bytes=size, seconds=seconds)

    def _retire(self, best: int | None) -> None:
        """Remove all but the newest `keep` and the best: renamed first, so that one half removed is none."""
        checkpoints = list_checkpoints(self._run)
        for old in checkpoints[: -self._spec.checkpoint.keep]:
            if old.step != best:
                shutil.rmtree(old.path.rename(old.path.with_name(f".{old.path.name}.deleting")), ignore_errors=True)


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """save_file, with a full disk as the OSError that it is; safetensors hides its number in a text."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as problem:
        number = re.search(r"os error (\d+)", str(problem))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from problem


@torch.no_grad()
def set_weights(model: torch.nn.Module, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Give a model a checkpoint's weights, rounded to `dtype`."""
    for name, tensor in weights.items():
        model.get_parameter(name).copy_(tensor.to(dtype))


def best_checkpoint(run: RunDir, state: TrainState) -> Checkpoint | None:
    """The one with the lowest validation loss; the newest of its step where attempts repeat it."""
    return next(reversed(_of_step(run, state.best_step)), None)


def _of_step(run: RunDir, step: int | None) -> list[Checkpoint]:
    return [checkpoint for checkpoint in list_checkpoints(run) if checkpoint.step == step]
