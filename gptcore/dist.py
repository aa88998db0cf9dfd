"""The ranks of a run: who am I, on which device, and what all of us must agree on."""

import ctypes
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor
from torch.utils import deterministic

from gptcore.failure import Unavailable
from gptcore.spec import refusal

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Dist:
    """One rank's place in the run."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on all ranks; in place."""
        if self.world_size > 1:
            c10d.all_reduce(tensor)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable value, on all ranks."""
        if self.world_size == 1:
            return value
        box = [value]
        c10d.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


def start(device: str, threads: int | None = None) -> Dist:
    """Join the run that torchrun's environment names; without one, a run of one rank.

    device: "auto", "cpu" or "cuda". On CPU the results are made repeatable: deterministic kernels
    and a fixed number of threads, OMP_NUM_THREADS by default (torchrun sets it to 1 unless it is set).
    Raises SpecError; Unavailable if a worker gave this process a GPU that torch cannot use.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if device != "cpu" and not torch.cuda.is_available() and (given := _gpus_of_slot()):
        way_out = "check nvidia-smi, and that torch is built for CUDA"
        raise Unavailable(f"the worker's GPU {given} cannot be used: torch sees none; {way_out}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise refusal("/resources/device", "device cuda is not here: torch sees no GPU; use auto or cpu")
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
        torch.set_float32_matmul_precision("high")  # TF32 where a product is not bf16 already
    else:
        place = torch.device("cpu")
        _keep_freed_memory()
        torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms would load the compiler
        # every kernel here writes what it then reads
        deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        if threads := threads or int(os.environ.get("OMP_NUM_THREADS") or 0):
            torch.set_num_threads(threads)
    if world_size > 1:
        c10d.init_process_group("nccl" if device == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    return Dist(rank, local_rank, world_size, place)


def _gpus_of_slot() -> str:
    """Return the UUIDs of the GPUs that a worker gave this process; "" if none, or if it was started by hand."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible if visible.startswith(("GPU-", "MIG-")) else ""


def _keep_freed_memory() -> None:
    """glibc would give gradients and logits back to the kernel each step and pay for their pages anew: a tenth of
    it. Huge pages instead are no slower only until memory is in pieces."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks from the heap as well
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: which is never cut


def close() -> None:
    if c10d.is_initialized():
        c10d.destroy_process_group()
