"""What a rank runs on: here by pretence, where the device itself is not at hand."""

from ipaddress import IPv4Address
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as c10d

from gptcore import dist
from gptcore.device import compiler_problem, evaluation_graph_pays, resolve_precision
from gptcore.dist import _wait_for_ranks, interface_towards
from gptcore.failure import describe
from tests.gptcore.conftest import tiny_model


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


def test_gloo_is_given_the_interface_that_leads_to_the_master(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interface_towards("127.0.0.1") == interface_towards("localhost") == "lo"
    assert interface_towards("no-such-host.invalid") is None
    addresses = {"gpu-box": "127.0.1.1", "192.0.2.1": "10.0.0.7"}  # a master by its own name, as Ubuntu resolves it
    monkeypatch.setattr("gptcore.dist._own_address_towards", lambda host: IPv4Address(addresses[host]))
    monkeypatch.setattr("gptcore.dist._address_of", lambda name: None if name == "lo" else IPv4Address("10.0.0.7"))
    monkeypatch.setattr("socket.if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    assert interface_towards("gpu-box") == "eth0"


def test_ranks_that_do_not_start_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptcore.dist.ANSWER_SECONDS", 0.2)
    store = c10d.HashStore()
    store.set("started/2", "")
    with pytest.raises(RuntimeError, match="no answer from rank 1, 3 of 4 within"):
        _wait_for_ranks(store, 0, 4)


def test_a_compiler_without_a_cache_to_write_to_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))  # also root cannot write there
    compiler_problem.cache_clear()
    assert "the compiler's cache cannot be written ([Errno 20] Not a directory" in compiler_problem("cpu")
    compiler_problem.cache_clear()


def test_evaluations_get_a_graph_of_their_own_only_if_they_are_long() -> None:
    model = tiny_model("gpt2", vocab_size=50_257, n_embd=768)
    assert not evaluation_graph_pays(model, 10_000, "cpu")
    assert evaluation_graph_pays(model, 10_000_000, "cpu")
    assert evaluation_graph_pays(model, 200_000_000, "cuda") and not evaluation_graph_pays(model, 10_000_000, "cuda")
