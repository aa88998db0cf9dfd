"""What a rank runs on: here by pretence, where the device itself is not at hand."""

from types import SimpleNamespace

import pytest
import torch

from gptcore.device import resolve_precision


def test_a_gpu_that_imitates_bf16_is_not_given_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that a T4 supports bfloat16, and means that it imitates it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda._check_bf16_tensor_supported", lambda _: True)
    gpu = torch.device("cuda")
    for major, precision in ((7, "fp32"), (8, "bf16")):
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda _, of=major: SimpleNamespace(major=of))
        assert resolve_precision("auto", gpu) == (precision, "")
