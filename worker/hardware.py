"""What this machine has, without torch, and how it is shared out into slots."""

import re

from gptcore.cgroup import memory_bytes
from gptcore.plan import Hardware
from worker.gpus import Gpu, find_gpus
from worker.job import Slot
from worker.settings import Settings
from worker.trainer import slot_cores


def find_slots(settings: Settings, node: str) -> list[Slot]:
    """Return the node's slots as TRAINMASTER_SLOTS shares them out.

    Raises ValueError if it cannot, or if the machine has a GPU that cannot be used and the device is not cpu.
    """
    cores, found = slot_cores(), find_gpus() if settings.device != "cpu" else []
    if settings.device == "cuda" and not found:
        why = "this machine has no GPU, or CUDA_VISIBLE_DEVICES hides it"
        raise ValueError(f"TRAINMASTER_DEVICE is cuda, but {why}; use auto or cpu")
    if not found:
        shares = _shares(settings.slots, cores, "CPU core")
        return [_cpu_slot(f"{node}-{index}", share) for index, share in enumerate(shares)]
    by_index = {gpu.index: gpu for gpu in found}
    shares = _shares(settings.slots, sorted(by_index), "GPU") if settings.slots else _default_shares(found)
    if any(len(share) > 1 and any(by_index[index].is_mig for index in share) for share in shares):
        why = "a process can use only one MIG device; give each a slot of its own"
        raise ValueError(f"TRAINMASTER_SLOTS {settings.slots!r}: {why}")
    per_gpu = max(1, len(cores) // len(found))
    slots, free = [], cores
    for index, share in enumerate(shares):
        mine, free = free[: per_gpu * len(share)], free[per_gpu * len(share) :]
        slots.append(_gpu_slot(f"{node}-{index}", [by_index[i] for i in share], mine or cores))
    return slots


def _default_shares(found: list[Gpu]) -> list[list[int]]:
    """Return one share of all whole GPUs, and one for each MIG device."""
    whole = [gpu.index for gpu in found if not gpu.is_mig]
    return ([whole] if whole else []) + [[gpu.index] for gpu in found if gpu.is_mig]


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
    indices, uuids = [gpu.index for gpu in share], [gpu.uuid for gpu in share]
    return Slot(id=slot, cores=cores, gpus=indices, gpu_uuids=uuids, hardware=hardware)
