"""What a rank runs on: here by pretence, where the device itself is not at hand."""

from types import SimpleNamespace

import pytest
import torch

from gptcore import dist
from gptcore.device import resolve_precision
from gptcore.failure import describe


def test_a_gpu_that_imitates_bf16_is_not_given_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that a T4 supports bfloat16, and means that it imitates it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda._check_bf16_tensor_supported", lambda _: True)
    gpu = torch.device("cuda")
    for major, precision in ((7, "fp32"), (8, "bf16")):
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda _, of=major: SimpleNamespace(major=of))
        assert resolve_precision("auto", gpu) == (precision, "")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_slot_whose_gpu_torch_cannot_use_never_trains_on_its_cores(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa")
    with pytest.raises(RuntimeError, match="GPU GPU-aa cannot be used: torch sees none") as failed:
        dist.start(device)
    assert describe(failed.value, rank=0).reason == "unavailable"  # another attempt may go to another node
