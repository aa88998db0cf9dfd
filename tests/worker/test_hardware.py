"""Slots: how a machine is shared out, and what is refused."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from worker.hardware import find_slots, gpus
from worker.settings import Settings
from worker.trainer import slot_cores

HOME = Settings(home=Path("/nowhere"), device="cpu")


def test_by_default_one_slot_has_every_core() -> None:
    (slot,) = find_slots(HOME, "n")
    assert slot.id == "n-0" and slot.cores == slot_cores()
    assert slot.hardware.ranks == len(slot_cores()) and slot.hardware.memory_bytes


def test_ranges_of_cores_become_slots() -> None:
    first = slot_cores()[0]
    (slot,) = find_slots(replace(HOME, slots=f"{first}"), "n")
    assert slot.cores == [first]


@pytest.mark.parametrize(
    ("slots", "message"),
    [("0-999999", "is not there"), ("x", "is no range"), ("0,0", "twice"), ("1-0", "empty range")],
)
def test_ranges_that_cannot_be_are_refused(slots: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_slots(replace(HOME, slots=slots), "n")


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvidia-smi on the PATH that answers as one with an H200 and a GPU without memory of its own."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, GPU-aa, NVIDIA H200, 143771'\necho '1, GPU-bb, NVIDIA GB10, [N/A]'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("two_gpus")
def test_gpus_become_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(HOME, device="auto")
    (both,) = find_slots(settings, "n")
    assert both.gpus == [0, 1] and both.hardware.device == "cuda" and both.hardware.ranks == 2
    assert both.hardware.memory_bytes == 143771 * 2**20
    first, second = find_slots(replace(settings, slots="0,1"), "n")
    assert (first.gpus, second.gpus) == ([0], [1]) and second.hardware.memory_bytes is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bb")
    assert [gpu.name for gpu in gpus()] == ["NVIDIA GB10"]
    assert find_slots(HOME, "n")[0].hardware.device == "cpu"


def test_a_wish_for_gpus_where_there_are_none_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no GPU"):
        find_slots(replace(HOME, device="cuda"), "n")


def test_settings_survive_the_way_through_an_environment() -> None:
    settings = replace(HOME, pool="gpus", slots="0", grace_seconds=3.5, max_attempts=7, trainer="a b")
    assert Settings.from_environment(settings.to_environment()) == settings


@pytest.mark.parametrize(
    ("name", "value"),
    [("TRAINMASTER_DEVICE", "tpu"), ("TRAINMASTER_GRACE_SECONDS", "-1"), ("TRAINMASTER_MAX_ATTEMPTS", "x")],
)
def test_a_bad_variable_is_named(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name} '{value}'"):
        Settings.from_environment({name: value})
