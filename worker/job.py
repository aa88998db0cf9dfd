"""What a job, a node and a slot are, and which status may follow which."""

import re
import secrets
import time
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel

from gptcore.plan import Hardware

Status = Literal[
    "queued", "starting", "running", "recovering", "pausing", "paused", "cancelling",
    "succeeded", "failed", "cancelled",
]  # fmt: skip
TERMINAL_STATUSES: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})

# The one table of allowed changes; every script that moves a job holds itself to it.
TRANSITIONS: dict[Status, tuple[Status, ...]] = {
    "queued": ("starting", "paused", "cancelled"),
    "starting": (
        "running", "queued", "recovering", "pausing", "paused", "cancelling",
        "succeeded", "failed", "cancelled",
    ),
    # cancelled: its wish was forgotten by a Redis restored to an older state, and not by the launcher
    "running": ("queued", "recovering", "pausing", "cancelling", "paused", "succeeded", "failed", "cancelled"),
    "recovering": ("starting", "paused", "cancelled", "failed"),
    "pausing": ("paused", "cancelling", "succeeded", "failed"),
    "paused": ("queued", "cancelled"),
    "cancelling": ("cancelled", "succeeded"),
    "succeeded": (),
    "failed": (),
    "cancelled": (),
}  # fmt: skip

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # 32 letters in ASCII order, none read as another
_JOB_ID = re.compile(f"job-[{_ALPHABET}]{{12}}")
_SLOT_ID = re.compile("[A-Za-z0-9_-]{1,80}-[0-9]{1,4}")  # a node's id and a number


def new_job_id() -> str:
    """ "job-" and 60 bits: milliseconds, then chance. Ids sort by the time they were made."""
    bits = (int(time.time() * 1000) & (1 << 41) - 1) << 19 | secrets.randbits(19)
    return "job-" + "".join(_ALPHABET[bits >> shift & 31] for shift in range(55, -1, -5))


def is_job_id(text: str) -> bool:
    """Return whether a text has the form of a job's id: safe as a name of a file."""
    return _JOB_ID.fullmatch(text) is not None


class Record(BaseModel, frozen=True, extra="ignore", ser_json_inf_nan="strings"):
    """What a later version added to it is passed over."""


class JobError(Record):
    """Why a job failed. `log` holds the last lines its trainer printed."""

    # a failed event's reason, or node_lost, launcher_lost, hung, exited, max_duration, invalid_spec, foreign_run_dir
    reason: str
    message: str
    log: list[str] = []


class BestCheckpoint(Record):
    """The step of the lowest validation loss so far (nats a token)."""

    step: int
    val_loss: float


class Allocation(Record):
    """A slot that a job has on one of its nodes."""

    node: str
    slot: str
    node_rank: int


class JobSummary(Record):
    """A job without its spec and its plan. Times are UTC, durations seconds, `progress` 0 to 1."""

    id: str
    kind: str
    name: str
    labels: dict[str, str]
    owner: str = ""  # name of the API key that submitted it, "local" without keys
    status: Status
    status_reason: str = ""
    phase: str | None = None
    attempt: int = 0
    step: int = 0
    total_steps: int | None = None
    tokens_seen: int = 0
    progress: float = 0.0
    eta_seconds: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    queue_position: int | None = None  # 1 is next; null when not waiting
    created_at: datetime
    queued_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    nodes: list[Allocation] = []  # where it runs, or ran last
    best_checkpoint: BestCheckpoint | None = None
    results: dict[str, float] = {}  # of evaluations, by name
    published: dict[str, Any] | None = None
    parent_job_id: str | None = None
    error: JobError | None = None
    # fields of its record that cannot be read; what stands in their place says nothing
    damaged: list[str] = []
    archived: bool = False  # its record is in its run directory only: lists do not show it

    @property
    def ended(self) -> bool:
        return self.status in TERMINAL_STATUSES


class Job(JobSummary):
    """A job as everyone sees it."""

    # as accepted: a record is shown even where a later version would refuse its spec
    spec: dict[str, Any]
    plan: dict[str, Any] | None = None


class JobPage(Record):
    """Newest first. `next` is the cursor of the page that follows, null on the last one.

    A page may hold fewer jobs than asked for, or none, and still have more: filters that rarely match take several.
    """

    data: list[Job]
    has_more: bool
    next: str | None


class JobSummaryPage(Record):
    """A JobPage with less of each job."""

    data: list[JobSummary]
    has_more: bool
    next: str | None


class Census(Record):
    """All jobs counted."""

    statuses: dict[str, int]
    started: int  # ever, also jobs deleted since
    queue_seconds: float  # from submission to start, summed over all that started
    oldest_waiting_seconds: dict[str, float]  # by pool
    running: dict[str, dict[str, float]]  # by job id: what is known of tokens_per_second, mfu, train_loss and
    # recovery_seconds, from the loss of an attempt until the next one ran, the last time


class StatusChange(Record):
    """One line of the job system's own stream. `who`: anyone, an API key, scheduler, or a node's launcher.

    `id` is {attempt}-{seq}.{number}: the newest event when it happened, behind which it stands, and which change it is.
    """

    type: Literal["status"] = "status"
    id: str
    time: datetime
    from_status: str  # empty for the first
    to_status: str
    who: str
    why: str


class Slot(Record):
    """A fixed share of a node: CPU cores, or GPUs (then also their cores)."""

    id: str
    cores: list[int]
    gpus: list[int]
    gpu_uuids: list[str] = []  # in the same order; of MIG devices too
    hardware: Hardware
    job_id: str | None = None  # whose it is now


class Node(Record):
    """As its agent says; the last three, and whose its slots are, as the store knows when it is asked."""

    id: str
    pool: str
    slots: list[Slot]
    versions: dict[str, str] = {}
    runs_root: str = ""  # nodes that share their runs have the same
    publishes_as: list[str] | None = None  # owners on the Hub; null where its agent does not say
    schedulable: bool = True
    lease_until: datetime | None = None
    live: bool = False  # the lease holds, by Redis's clock


class Ticket(Record):
    """A reservation on its way to the slot that is to run it."""

    job_id: str
    attempt: int
    node_rank: int
    slot: str

    @property
    def is_sound(self) -> bool:
        """Whether its ids are of the form that the job system gives: safe as names of files."""
        return bool(is_job_id(self.job_id) and _SLOT_ID.fullmatch(self.slot)) and self.attempt > 0

    @property
    def id(self) -> str:
        return f"{self.job_id}-a{self.attempt}-r{self.node_rank}"
