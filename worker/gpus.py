"""The NVIDIA GPUs that this process may use, chosen as CUDA chooses them, by nvidia-smi alone."""

import logging
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

START_SECONDS = 30.0  # without persistence mode the driver first initializes every GPU
LEASED_SECONDS = 3.0  # while a launcher holds a lease of 12 s
KILL_SECONDS = 1.0
FREED_MEBIBYTES = 512  # this close to before, a GPU's memory counts as free again
CSV = "--format=csv,noheader,nounits"
DEV, PCI = Path("/dev"), Path("/sys/bus/pci/devices")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gpu:
    """A whole GPU, or a MIG device, which is a part of one."""

    index: int  # nvidia-smi's; if any GPU is divided by MIG: the position among all devices
    uuid: str  # "GPU-…" or "MIG-…"
    name: str
    memory_bytes: int | None  # None: it shares the machine's memory and reports none
    whole_index: int  # nvidia-smi's, of the GPU that it is or belongs to
    whole_uuid: str

    @property
    def is_mig(self) -> bool:
        return self.uuid != self.whole_uuid


def find_gpus() -> list[Gpu]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves to this process, in its order.

    Empty if the machine has none, or if the variable hides all: it is empty, or begins with -1 or NoDevFiles.
    Raises ValueError if there is a GPU that cannot be used, or if the variable selects none of those that are here.
    """
    selection = os.environ.get("CUDA_VISIBLE_DEVICES")
    if selection is not None and _hides_all(selection):
        return []
    present = _present_gpus()
    if selection is None or not present:
        return present
    chosen, used_entries = _select(selection, present)
    ignored = selection.split(",")[used_entries:]
    here = ", ".join(f"{gpu.whole_index} ({gpu.uuid})" for gpu in present)
    if not chosen:
        way_out = "correct or unset it, or set TRAINMASTER_DEVICE=cpu to offer the cores instead"
        raise ValueError(f"CUDA_VISIBLE_DEVICES {selection!r} selects no GPU of this machine: {here}; {way_out}")
    if ignored:
        log.warning(
            "CUDA_VISIBLE_DEVICES %r: CUDA ignores %r and all after it, since it names no GPU of this machine: %s",
            selection, ignored[0], here,
        )  # fmt: skip
    by_index = selection.split(",")[0].strip()[0].isdigit()
    if by_index and len({gpu.name for gpu in present}) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        log.warning("CUDA_VISIBLE_DEVICES %r is read in nvidia-smi's order; UUIDs are unambiguous", selection)
    return chosen


def _hides_all(selection: str) -> bool:
    first = selection.split(",")[0].strip().lower()
    return first in ("", "nodevfiles", "none", "void") or first.startswith("-")


def _select(selection: str, present: list[Gpu]) -> tuple[list[Gpu], int]:
    """Return the GPUs that a CUDA_VISIBLE_DEVICES selects, in its order, and how many entries CUDA heeds.

    The first entry decides whether all are indices, GPU UUIDs or MIG UUIDs; a UUID may be cut short. The first entry
    that matches no GPU, or several, ends the list. A GPU listed twice empties it. A GPU that MIG divides stands for
    all its MIG devices.
    """
    kind = next((prefix for prefix in ("GPU-", "MIG-") if selection.startswith(prefix)), "")
    keys: list[str] = []
    for entry in selection.split(","):
        key = _entry_key(entry, kind)
        if key in keys:
            return [], 0
        if key is None:
            break
        keys.append(key)
    chosen: list[Gpu] = []
    for used_entries, key in enumerate(keys):
        matches = [gpu for gpu in present if _matches(gpu, key, kind)]
        units = {gpu.uuid if kind == "MIG-" else gpu.whole_uuid for gpu in matches}
        if len(units) != 1:
            return chosen, used_entries
        if matches[0] in chosen:
            return [], 0
        chosen += matches
    return chosen, len(keys)


def _entry_key(entry: str, kind: str) -> str | None:
    """Return what an entry names; None if it is not of the list's kind."""
    if kind:
        return entry if entry.startswith(kind) else None
    digits = re.match(r"\+?([0-9]+)", entry.strip())  # like strtoul: what follows the digits is ignored
    return str(int(digits[1])) if digits else None


def _matches(gpu: Gpu, key: str, kind: str) -> bool:
    if not kind:
        return gpu.whole_index == int(key)
    return (gpu.whole_uuid if kind == "GPU-" else gpu.uuid).startswith(key)


def _present_gpus() -> list[Gpu]:
    """Return the machine's GPUs, in the order of the PCI bus. Raises ValueError if one is here but none can be used."""
    way_out = "set TRAINMASTER_DEVICE=cpu to offer the cores instead"
    if shutil.which("nvidia-smi") is None:
        if file := _device_file():
            install = "install it (in a container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility)"
            raise ValueError(f"{file} is a GPU, but nvidia-smi is not on the PATH; {install}, or {way_out}")
        if _on_pci_bus():
            log.warning("an NVIDIA GPU is on the PCI bus, but has no driver here: only the cores are offered")
        return []
    lines, problem = _nvidia_smi(START_SECONDS, "--query-gpu=index,uuid,name,memory.total", CSV)
    gpus = [gpu for line in lines if (gpu := _parse_gpu(line)) is not None]
    if len(gpus) < len(lines):
        problem = problem or f"nvidia-smi reports {' '.join(line for line in lines if not _parse_gpu(line))!r}"
    if not gpus and _may_have_gpu():
        raise ValueError(f"no GPU can be used: {problem or 'nvidia-smi lists none'}; repair the driver, or {way_out}")
    if problem:
        what = "all other GPUs are offered" if gpus else "no GPU is on the PCI bus, and only the cores are offered"
        log.error("%s; %s", problem, what)
    return _with_mig_devices(gpus)


def _parse_gpu(line: str) -> Gpu | None:
    """Return the GPU of a line "index, uuid, name, MiB"; None for another line, or a GPU that is lost."""
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != 4 or not cells[0].isdecimal() or re.search(r"\[[^]]*(lost|error|reset)", line, re.IGNORECASE):
        return None
    index, uuid, name, mebibytes = int(cells[0]), *cells[1:]
    memory = int(mebibytes) * 2**20 if mebibytes.isdecimal() else None
    return Gpu(index, uuid, name, memory, whole_index=index, whole_uuid=uuid)


def _with_mig_devices(gpus: list[Gpu]) -> list[Gpu]:
    """Return the GPUs with each that MIG divides replaced by its devices; then they are numbered through."""
    lines, _ = _nvidia_smi(START_SECONDS, "-L") if gpus else ([], "")
    parts: dict[str, list[tuple[str, str]]] = {}  # by the GPU's UUID: profile and UUID
    whole_uuid = ""
    for line in lines:
        if found := re.match(r"GPU \d+: .*\(UUID: (GPU-[^)]+)\)", line):
            whole_uuid = found[1]
        elif found := re.match(r"\s+MIG (\S+)\s+Device\s+\d+: \(UUID: (MIG-[^)]+)\)", line):
            parts.setdefault(whole_uuid, []).append((found[1], found[2]))
    if not parts:
        return gpus
    devices = []
    for gpu in gpus:
        devices += [_mig_device(gpu, *part) for part in parts.get(gpu.uuid, [])] or [gpu]
    return [replace(device, index=index) for index, device in enumerate(devices)]


def _mig_device(gpu: Gpu, profile: str, uuid: str) -> Gpu:
    """Return a MIG device; its memory is that of its profile, for example "1g.5gb", which rounds it down."""
    gigabytes = re.search(r"([0-9]+)gb", profile)
    memory = int(gigabytes[1]) * 10**9 if gigabytes else None
    return replace(gpu, uuid=uuid, name=f"{gpu.name} MIG {profile}", memory_bytes=memory)


def _device_file() -> Path | None:
    return next(DEV.glob("nvidia[0-9]*"), None)


def _on_pci_bus() -> bool:
    """Return whether the PCI bus has an NVIDIA display or 3D controller."""
    return any(_holds(path / "vendor", "0x10de") and _holds(path / "class", "0x03") for path in _pci_devices())


def _may_have_gpu() -> bool:
    """Return False only if the PCI bus shows that the machine has no NVIDIA GPU. WSL and some boards have no bus."""
    no_bus = not any(_pci_devices()) or (DEV / "dxg").exists()
    return no_bus or _device_file() is not None or _on_pci_bus()


def _pci_devices() -> Iterable[Path]:
    return PCI.iterdir() if PCI.is_dir() else ()


def _holds(file: Path, beginning: str) -> bool:
    with suppress(OSError):
        return file.read_text().startswith(beginning)
    return False


class GpuMemory:
    """The memory in use on a slot's GPUs (CUDA_VISIBLE_DEVICES) as it was when this was made."""

    def __init__(self) -> None:
        self._before = _used_mebibytes()

    def await_return(self, meanwhile: Callable[[], object], seconds: float = 10.0) -> None:
        """Wait until about as much is free again: a driver frees a process's memory only after its end.

        meanwhile: called at least every 4 s. A GPU that does not answer is not waited for.
        """
        give_up_at = time.monotonic() + seconds
        while self._before:
            meanwhile()
            now = _used_mebibytes()
            if not any(now.get(uuid, 0) > before + FREED_MEBIBYTES for uuid, before in self._before.items()):
                return
            if time.monotonic() > give_up_at:
                log.warning("the GPUs' memory is not free again: %s MiB, before %s", now, self._before)
                return
            time.sleep(0.5)


def _used_mebibytes() -> dict[str, int]:
    """Return the memory in use on this process's GPUs by UUID. MIG devices report none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if not any(entry.startswith("GPU-") for entry in visible) or shutil.which("nvidia-smi") is None:
        return {}
    lines, problem = _nvidia_smi(LEASED_SECONDS, "--query-gpu=uuid,memory.used", CSV)
    if problem:
        log.warning("%s", problem)
    used = [[cell.strip() for cell in line.split(",")] for line in lines]
    return {row[0]: int(row[1]) for row in used if len(row) == 2 and row[0] in visible and row[1].isdecimal()}


def _nvidia_smi(seconds: float, *arguments: str) -> tuple[list[str], str]:
    """Return the lines that nvidia-smi prints, and why they may not be all: it failed, or was not done in `seconds`.

    It is left alone then: a process that hangs in the driver cannot be killed, and waiting for it would hang as well.
    """
    try:
        process = subprocess.Popen(
            ["nvidia-smi", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return [], f"nvidia-smi cannot be run: {error}"
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=KILL_SECONDS)
        return [], f"nvidia-smi did not answer within {seconds:g} s"
    lines = [line for line in output.splitlines() if line.strip()]
    code = process.returncode
    return lines, f"nvidia-smi failed with exit code {code}: {output.strip()[-300:]!r}" if code else ""
