"""What a trainer reports, one small class an event, and the file they are kept in.

An attempt's `events.jsonl` is the truth about a run; Redis streams and browsers get copies. `seq`
starts at 1 in each attempt and `{attempt}-{seq}` is an event's id everywhere.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class EventBase(BaseModel):
    # non-finite numbers travel as the strings "NaN" and "Infinity": JSON has none
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")

    attempt: int = 0
    seq: int = 0
    time: datetime = Field(default_factory=lambda: datetime.now(UTC))


Phase = Literal["preparing", "compiling", "training", "evaluating", "checkpointing", "exporting", "publishing"]


class Started(EventBase):
    """First event of an attempt: what really runs, resolved."""

    type: Literal["started"] = "started"
    kind: str
    device: str
    device_name: str
    world_size: int
    versions: dict[str, str]
    threads: int = 1
    precision: str = "fp32"
    compiled: bool = False
    micro_batch_size: int = 0  # as what follows, of jobs that train
    grad_accum_steps: int = 0
    parameters: int = 0
    total_steps: int = 0
    tokens_per_step: int = 0
    dataset_sha256: str | None = None  # of what was trained on: tokenizer and tokens


class PhaseChanged(EventBase):
    type: Literal["phase"] = "phase"
    phase: Phase
    message: str = ""
    progress: float | None = None  # 0 to 1, where the phase knows


class Notice(EventBase):
    """Something a person should know that changes no result (eager for want of a compiler)."""

    type: Literal["notice"] = "notice"
    level: Literal["info", "warning"] = "info"
    message: str


class Step(EventBase):
    """One optimiser update. `train_loss` in nats a token, averaged over all ranks and micro-batches."""

    type: Literal["step"] = "step"
    step: int  # updates completed
    tokens: int  # seen since the run's start
    train_loss: float
    lr: float
    grad_norm: float
    step_seconds: float
    tokens_per_second: float
    data_wait_seconds: float
    mfu: float | None = None  # full attention; null where the device's peak is unknown
    mfu_causal: float | None = None
    peak_memory_bytes: int = 0
    replay_difference: float | None = None  # from the first time this step ran


class Evaluated(EventBase):
    type: Literal["evaluated"] = "evaluated"
    step: int
    tokens: int
    val_loss: float  # nats a token
    bits_per_byte: float
    eval_tokens: int
    best: bool
    seconds: float


class BestReverted(EventBase):
    """The weights of `lost_step`, which an evaluation had found best, could not be saved: `step` is the best again."""

    type: Literal["best_reverted"] = "best_reverted"
    lost_step: int
    step: int | None  # null: there is none
    val_loss: float | None


class Scored(EventBase):
    """A task's results by name: hellaswag_acc_norm, lm_eval:arc_easy/acc, with @K behind it where K solved
    examples stood before each question. `stderr` has the standard errors that are known."""

    type: Literal["scored"] = "scored"
    step: int  # of the weights; 0 where they are no job's
    task: str
    results: dict[str, float]
    stderr: dict[str, float] = {}
    items: int | None = None
    seconds: float


class Sampled(EventBase):
    type: Literal["sampled"] = "sampled"
    step: int
    prompt: str
    text: str


class Checkpointed(EventBase):
    type: Literal["checkpointed"] = "checkpointed"
    step: int
    path: str  # relative to the run directory
    bytes: int
    seconds: float


class Skipped(EventBase):
    """An update that was not applied: its batch, step number and learning rate are consumed."""

    type: Literal["skipped"] = "skipped"
    step: int
    reason: Literal["non_finite", "spike"]
    train_loss: float
    grad_norm: float
    loss_limit: float | None = None
    grad_norm_limit: float | None = None


class RolledBack(EventBase):
    type: Literal["rolled_back"] = "rolled_back"
    from_step: int
    to_step: int
    batches_passed_over: int
    reason: str


class Resumed(EventBase):
    """`probe_loss` is the first window's loss stored in the checkpoint, `recomputed_loss` that of now."""

    type: Literal["resumed"] = "resumed"
    step: int
    path: str
    probe_loss: float
    recomputed_loss: float
    difference: float


class Exported(EventBase):
    type: Literal["exported"] = "exported"
    step: int
    path: str
    native_class: str


class Verified(EventBase):
    """How far the exported folder, loaded by stock `transformers` in a process of its own, is from our model."""

    type: Literal["verified"] = "verified"
    step: int
    numbers: dict[str, float]  # differences by name
    problems: list[str]  # empty: it may be published


class Published(EventBase):
    type: Literal["published"] = "published"
    step: int
    repo: str
    commit: str
    tag: str
    url: str
    private: bool


class Finished(EventBase):
    """The run ended well. For jobs that train nothing only `seconds` and `tokens` say anything."""

    type: Literal["finished"] = "finished"
    step: int = 0
    tokens: int = 0
    best_step: int | None = None
    best_val_loss: float | None = None
    seconds: float


class Stopped(EventBase):
    """The run left at someone's word, after a checkpoint."""

    type: Literal["stopped"] = "stopped"
    step: int
    reason: Literal["pause", "cancel", "max_duration"]


class Failed(EventBase):
    """`user_error`: what to change stands in the message, a new attempt would end the same way."""

    type: Literal["failed"] = "failed"
    # unavailable: something elsewhere that may be back; mismatch: the export is not the model
    reason: Literal["user_error", "out_of_memory", "disk_full", "diverged", "mismatch", "unavailable", "crash"]
    message: str
    rank: int = 0
    traceback: str = ""


Event = Annotated[
    Started | PhaseChanged | Notice | Step | Evaluated | BestReverted | Scored | Sampled | Checkpointed | Skipped
    | RolledBack | Resumed | Exported | Verified | Published | Finished | Stopped | Failed,
    Field(discriminator="type"),
]  # fmt: skip
EVENT: TypeAdapter[Any] = TypeAdapter(Event)
TERMINAL = (Finished, Stopped, Failed)
BLOCK_BYTES = 1 << 16

Report = Callable[[EventBase], None]


class JsonlReport:
    """Appends an attempt's events, numbered; each line is flushed, a terminal one is synced.

    A process killed here may leave a torn last line; a reader takes it for no event.
    """

    def __init__(self, path: Path, attempt: int):
        self._attempt = attempt
        self._file = path.open("a", encoding="utf-8")
        # a torn line would swallow the next
        self._file.truncate(next((end for end, _ in read_lines_backwards(path)), 0))
        newest = last_event(path)
        self._seq = newest.seq if newest else _count_lines(path)

    def __call__(self, event: EventBase) -> None:
        self._seq += 1
        numbered = event.model_copy(update={"attempt": self._attempt, "seq": self._seq})
        self._file.write(numbered.model_dump_json() + "\n")
        self._file.flush()
        if isinstance(event, TERMINAL):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[int, str]]:
    """Yield complete lines from byte `offset` on, each with the offset of the byte after it."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield offset, line.decode("utf-8", "replace").rstrip("\n")


def read_lines_backwards(path: Path) -> Iterator[tuple[int, str]]:
    """Yield complete lines, the last one first, each with the offset of the byte after it."""
    with path.open("rb") as file:
        begin = file.seek(0, os.SEEK_END)
        tail = b""  # from `begin` on, as far as it was not given yet
        torn = True  # what follows the file's last line break
        while begin > 0:
            block = min(begin, BLOCK_BYTES)
            begin = file.seek(begin - block)
            tail = file.read(block) + tail
            while (cut := tail.rfind(b"\n", 0, len(tail) if torn else len(tail) - 1)) >= 0:
                if not torn:
                    yield begin + len(tail), tail[cut + 1 :].decode("utf-8", "replace").rstrip("\n")
                torn, tail = False, tail[: cut + 1]
        if tail and not torn:
            yield len(tail), tail.decode("utf-8", "replace").rstrip("\n")


def last_event(path: Path) -> Any:
    """Return the newest event in a file; None for no file, or if its last line is damaged or of a later version."""
    with suppress(FileNotFoundError, ValueError):
        for _, line in read_lines_backwards(path):
            return parse_event(line)
    return None


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(BLOCK_BYTES), b""))


def read_block(path: Path, offset: int, size: int) -> list[bytes]:
    """Complete lines from byte `offset` on, without their newlines: those that begin in the next `size` bytes."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(size)
        if not block.endswith(b"\n"):
            block += file.readline()
    complete = block[: block.rfind(b"\n") + 1]
    return complete.split(b"\n")[:-1]


def parse_event(line: str) -> Any:
    return EVENT.validate_json(line)
