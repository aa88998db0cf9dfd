"""What this machine has, without torch, and how it is shared out into slots."""

import logging
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass

from gptcore.cgroup import memory_bytes
from gptcore.plan import Hardware
from worker.job import Slot
from worker.settings import Settings
from worker.trainer import slot_cores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gpu:
    index: int  # in the order of the PCI bus
    name: str
    memory_bytes: int | None  # some share the machine's and say nothing


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs that this process may use; none where there is no nvidia-smi or it sees none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = []
    for line in _nvidia_smi("--query-gpu=index,uuid,name,memory.total"):
        index, uuid, name, mebibytes = (cell.strip() for cell in line.split(","))
        if visible is None or {index, uuid} & set(visible.split(",")):
            memory = int(mebibytes) * 2**20 if mebibytes.isdecimal() else None
            found.append(Gpu(int(index), name, memory))
    return found


def _nvidia_smi(*query: str) -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", *query, "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return [] if answer.returncode else answer.stdout.splitlines()  # a driver that is not loaded


class GpuMemory:
    """The memory in use on a slot's GPUs (CUDA_VISIBLE_DEVICES) as it was when this was made."""

    def __init__(self) -> None:
        self._before = _used_mebibytes()

    def await_return(self, seconds: float = 10.0) -> None:
        """Wait until it is about that again: a driver frees what a process held only after its end."""
        give_up_at = time.monotonic() + seconds
        while any(now > before + 512 for now, before in zip(_used_mebibytes(), self._before, strict=False)):
            if time.monotonic() > give_up_at:
                log.warning("the GPUs' memory is not free again: %s MiB, before %s", _used_mebibytes(), self._before)
                return
            time.sleep(0.5)


def _used_mebibytes() -> list[int]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    lines = _nvidia_smi(f"--id={visible}", "--query-gpu=memory.used") if visible else []
    return [int(line) for line in lines if line.strip().isdecimal()]


def find_slots(settings: Settings, node: str) -> list[Slot]:
    """The node's slots as TRAINMASTER_SLOTS shares them out. Raises ValueError where it cannot."""
    cores, found = slot_cores(), gpus() if settings.device != "cpu" else []
    if settings.device == "cuda" and not found:
        raise ValueError("TRAINMASTER_DEVICE is cuda, but nvidia-smi shows no GPU; use auto or cpu")
    if not found:
        shares = _shares(settings.slots, cores, "CPU core")
        return [_cpu_slot(f"{node}-{index}", share) for index, share in enumerate(shares)]
    by_index = {gpu.index: gpu for gpu in found}
    shares = _shares(settings.slots, sorted(by_index), "GPU")
    per_gpu = max(1, len(cores) // len(found))
    slots, free = [], cores
    for index, share in enumerate(shares):
        mine, free = free[: per_gpu * len(share)], free[per_gpu * len(share) :]
        slots.append(_gpu_slot(f"{node}-{index}", [by_index[i] for i in share], mine or cores))
    return slots


def _shares(ranges: str, available: list[int], what: str) -> list[list[int]]:
    """ "0-3,4-7" → [[0, 1, 2, 3], [4, 5, 6, 7]]; empty → one share with everything."""
    if not ranges:
        return [available]
    shares = []
    for part in ranges.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise ValueError(f'TRAINMASTER_SLOTS {ranges!r}: {part!r} is no range; use a list such as "0-3,4-7"')
        shares.append(list(range(int(match[1]), int(match[2] or match[1]) + 1)))
    used = [index for share in shares for index in share]
    for index in used:
        if index not in available or used.count(index) > 1:
            why = "stands there twice" if index in available else "is not there"
            raise ValueError(f"TRAINMASTER_SLOTS {ranges!r}: {what} {index} {why}; available: {available}")
    if not all(shares):
        raise ValueError(f"TRAINMASTER_SLOTS {ranges!r} has an empty range; write the smaller number first")
    return shares


def _cpu_slot(slot: str, cores: list[int]) -> Slot:
    hardware = Hardware(device="cpu", device_name="cpu", ranks=len(cores), memory_bytes=memory_bytes())
    return Slot(id=slot, cores=cores, gpus=[], hardware=hardware)


def _gpu_slot(slot: str, share: list[Gpu], cores: list[int]) -> Slot:
    memory = min((gpu.memory_bytes for gpu in share if gpu.memory_bytes is not None), default=None)
    hardware = Hardware(device="cuda", device_name=share[0].name, ranks=len(share), memory_bytes=memory)
    return Slot(id=slot, cores=cores, gpus=[gpu.index for gpu in share], hardware=hardware)
