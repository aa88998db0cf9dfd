"""GPUs: which of a machine's a worker offers, in agreement with CUDA, and what it says of one that cannot be used."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from worker import gpus
from worker.gpus import GpuMemory, find_gpus
from worker.hardware import find_slots
from worker.settings import Settings

AUTO = Settings(home=Path("/nowhere"), device="auto")
UUIDS = ["GPU-aa11", "GPU-aa22", "GPU-bb33"]
THREE = "\n".join(f"{index}, {uuid}, NVIDIA H200, 143771" for index, uuid in enumerate(UUIDS))
TWO = "0, GPU-aa, NVIDIA H200, 143771\n1, GPU-bb, NVIDIA GB10, [N/A]"
MIG = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aa)
  MIG 3g.20gb     Device  0: (UUID: MIG-11aa)
  MIG 1g.5gb      Device  1: (UUID: MIG-22bb)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bb)"""
A100S = "0, GPU-aa, NVIDIA A100-SXM4-40GB, 40960\n1, GPU-bb, NVIDIA A100-SXM4-40GB, 40960"

NvidiaSmi = Callable[..., None]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NvidiaSmi:
    """Make the nvidia-smi on the PATH answer queries and -L so, on a machine with a GPU."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    monkeypatch.setattr(gpus, "DEV", tmp_path / "dev")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def answer(query: str = "", list_: str = "", code: int = 0, script: str = "") -> None:
        (tmp_path / "query").write_text(f"{query}\n")
        (tmp_path / "list").write_text(f"{list_}\n")
        program = tmp_path / "bin/nvidia-smi"
        program.write_text(
            f"#!/bin/sh\n{script}\ncase $1 in -L) cat {tmp_path}/list;; *) cat {tmp_path}/query;; esac\nexit {code}\n"
        )
        program.chmod(0o755)

    return answer


def test_gpus_become_slots(nvidia_smi: NvidiaSmi, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(TWO)
    (both,) = find_slots(AUTO, "n")
    assert both.gpus == [0, 1] and both.gpu_uuids == ["GPU-aa", "GPU-bb"]
    assert both.hardware.device == "cuda" and both.hardware.ranks == 2
    assert both.hardware.memory_bytes == 143771 * 2**20
    first, second = find_slots(replace(AUTO, slots="0,1"), "n")
    assert (first.gpus, second.gpus) == ([0], [1]) and second.hardware.memory_bytes is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert find_slots(AUTO, "n")[0].gpu_uuids == ["GPU-bb", "GPU-aa"]
    assert find_slots(replace(AUTO, device="cpu"), "n")[0].hardware.device == "cpu"


@pytest.mark.parametrize(
    "visible",
    ["0", "2,0", "0,1,2,7", "0,-1,1", "0,,1", "1gpu2,2ampere", " 1 , 0", "+1", "0,0", "0,9,0", "1,GPU-aa11", "7", "x",
     "GPU-aa11", "GPU-bb", "GPU-bb33,GPU-aa2", "GPU-aa", "GPU-bb,GPU-aa", "GPU-aa1,GPU-aa11", "GPU-bb, GPU-aa11",
     "GPU-aa1,0", "GPU-zz,GPU-bb", "GPU-bb,GPU-bb", "GPU-bb,GPU-zz,GPU-bb"],
)  # fmt: skip
def test_cuda_visible_devices_selects_what_torch_finds(
    visible: str, nvidia_smi: NvidiaSmi, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.cuda

    nvidia_smi(THREE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    parsed = torch.cuda._parse_visible_devices()
    if parsed and isinstance(parsed[0], str):
        expected = torch.cuda._transform_uuid_to_ordinals(parsed, UUIDS)
    else:
        missing = next((place for place, index in enumerate(parsed) if index >= len(UUIDS)), len(parsed))
        expected = parsed[:missing]
    if expected:
        assert [gpu.index for gpu in find_gpus()] == expected
    else:
        with pytest.raises(ValueError, match=r"selects no GPU of this machine: 0 \(GPU-aa11\), .*TRAINMASTER_DEVICE"):
            find_gpus()


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_leave_a_worker_of_cores(
    visible: str, nvidia_smi: NvidiaSmi, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(THREE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_slots(AUTO, "n")[0].hardware.device == "cpu"
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES hides it"):
        find_slots(replace(AUTO, device="cuda"), "n")


def test_entries_that_cuda_ignores_are_warned_of(
    nvidia_smi: NvidiaSmi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nvidia_smi(THREE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,5,0")
    assert [gpu.index for gpu in find_gpus()] == [1]
    assert "CUDA ignores '5' and all after it" in caplog.text


def test_each_mig_device_is_a_slot_of_its_own(nvidia_smi: NvidiaSmi, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(A100S, MIG)
    slots = find_slots(AUTO, "n")
    assert [slot.gpu_uuids for slot in slots] == [["GPU-bb"], ["MIG-11aa"], ["MIG-22bb"]]
    assert slots[1].hardware.memory_bytes == 20 * 10**9 and "MIG 3g.20gb" in (slots[1].hardware.device_name or "")
    with pytest.raises(ValueError, match="only one MIG device"):
        find_slots(replace(AUTO, slots="0-1"), "n")
    for visible, found in {"MIG-22bb": ["MIG-22bb"], "MIG-1": ["MIG-11aa"], "0": ["MIG-11aa", "MIG-22bb"]}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [gpu.uuid for gpu in find_gpus()] == found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-33")
    with pytest.raises(ValueError, match="selects no GPU"):
        find_gpus()


@pytest.mark.parametrize(
    ("lost", "code"),
    [("Unable to determine the device handle for GPU 0000:01:00.0: GPU is lost.  Reboot the system", 15),
     ("0, GPU-aa11, [GPU is lost], [GPU is lost]", 0), ("0, GPU-aa11, NVIDIA H200, [Unknown Error]", 0)],
)  # fmt: skip
def test_a_lost_gpu_is_reported_and_the_others_are_offered(
    lost: str, code: int, nvidia_smi: NvidiaSmi, caplog: pytest.LogCaptureFixture
) -> None:
    nvidia_smi("\n".join([lost, *THREE.splitlines()[1:]]), code=code)
    assert [gpu.index for gpu in find_gpus()] == [1, 2]
    assert ("lost" in caplog.text or "Unknown Error" in caplog.text) and "all other GPUs are offered" in caplog.text


@pytest.mark.parametrize(
    ("query", "code", "script", "reason"),
    [
        (
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
            9,
            "",
            "couldn't communicate",
        ),
        ("No devices were found", 0, "", "No devices were found"),
        ("", 0, "sleep 60", "did not answer within 0.2 s"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_never_silently_a_worker_of_cores(
    query: str, code: int, script: str, reason: str, nvidia_smi: NvidiaSmi, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(gpus, "START_SECONDS", 0.2 if script else 30.0)
    nvidia_smi(query, code=code, script=script)
    for device in ("auto", "cuda"):
        with pytest.raises(ValueError, match=f"{reason}.*TRAINMASTER_DEVICE=cpu"):
            find_slots(replace(AUTO, device=device), "n")
    assert find_slots(replace(AUTO, device="cpu"), "n")[0].hardware.device == "cpu"
    (tmp_path / "dev/nvidia0").unlink()  # the same program on a machine whose PCI bus has no GPU
    for what, text in {"vendor": "0x8086\n", "class": "0x030000\n"}.items():
        (tmp_path / "pci/0000:00:02.0").mkdir(parents=True, exist_ok=True)
        (tmp_path / "pci/0000:00:02.0" / what).write_text(text)
    monkeypatch.setattr(gpus, "PCI", tmp_path / "pci")
    assert find_slots(AUTO, "n")[0].hardware.device == "cpu"
    (tmp_path / "pci/0000:00:02.0/vendor").write_text("0x10de\n")
    with pytest.raises(ValueError, match=reason):
        find_slots(AUTO, "n")


def test_a_gpu_without_nvidia_smi_is_refused_and_a_machine_without_either_has_cores(
    nvidia_smi: NvidiaSmi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvidia_smi()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"dev/nvidia0 is a GPU, but nvidia-smi is not .* TRAINMASTER_DEVICE=cpu"):
        find_slots(AUTO, "n")
    (tmp_path / "dev/nvidia0").unlink()
    assert find_slots(AUTO, "n")[0].hardware.device == "cpu"
    with pytest.raises(ValueError, match="has no GPU"):
        find_slots(replace(AUTO, device="cuda"), "n")


def test_an_attempt_ends_when_the_gpus_memory_is_free_again(
    tmp_path: Path, nvidia_smi: NvidiaSmi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvidia-smi reports 900 MiB, then much more as if a process had just died, and 900 again after a while."""
    asked = tmp_path / "asked"
    nvidia_smi(script=f"echo x >> {asked}\ncase $(wc -l < {asked}) in [23]) echo GPU-aa, 70000;; *) echo GPU-aa, 900;; "
               "esac\necho GPU-bb, 70000")  # fmt: skip
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa")
    renewals: list[float] = []
    GpuMemory().await_return(meanwhile=lambda: renewals.append(time.monotonic()))
    assert asked.read_text() == "x\n" * 4 and len(renewals) == 3


def test_an_nvidia_smi_that_hangs_never_outlasts_a_lease(
    nvidia_smi: NvidiaSmi, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi("GPU-aa, 900")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa")
    memory, began = GpuMemory(), time.monotonic()
    nvidia_smi(script="trap '' TERM; sleep 60 & sleep 60")
    memory.await_return(meanwhile=lambda: None)
    assert gpus.LEASED_SECONDS <= time.monotonic() - began < gpus.LEASED_SECONDS + gpus.KILL_SECONDS + 2 < 12
