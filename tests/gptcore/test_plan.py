import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gptcore.dist import Dist
from gptcore.model import GPT
from gptcore.native import native_class, native_config
from gptcore.optim import build_optimizers, optimizer_tensors
from gptcore.plan import PROCESS_BYTES, Hardware, count_parameters, peak_flops, peak_memory_bytes, plan, resolve
from gptcore.presets import PRESETS
from gptcore.spec import ModelSpec, SpecError, TrainSpec, read_spec
from tests.gptcore.conftest import FAMILIES, tiny_model, tiny_spec

EXAMPLES = Path(__file__).parents[2] / "examples"
ABLATIONS = [
    {}, {"norm": "layernorm"}, {"norm": "rmsnorm"}, {"position": "none"}, {"position": "learned"}, {"mlp": "gelu"},
    {"mlp": "swiglu"}, {"n_kv_head": 1}, {"norm_placement": "post"}, {"mlp_bias": True}, {"attention_bias": True},
    {"qk_norm": True}, {"tie_embeddings": False}, {"tie_embeddings": True}, {"embed_norm": True}, {"head_dim": 16},
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", ABLATIONS, ids=str)
def test_the_planned_parameter_count_is_the_models(family: str, change: dict[str, object]) -> None:
    spec = tiny_model(family, **change)
    counts = count_parameters(spec)
    model = GPT(spec)
    assert counts.trained == sum(p.numel() for p in model.parameters())
    padding = (spec.padded_vocab_size - 96) * spec.n_embd * (1 if spec.tie_embeddings else 2)
    assert counts.exported == counts.trained - padding


@pytest.mark.parametrize("preset", PRESETS)
def test_the_exported_count_is_the_native_classes(preset: str) -> None:
    spec = ModelSpec.model_validate({"preset": preset, "vocab_size": 50257})
    config = native_config(spec, "gpt2")
    with torch.device("meta"):
        native = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert count_parameters(spec).exported == sum(p.numel() for p in native.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_planned_checkpoint_has_the_size_of_what_is_saved(family: str, optimizer: str) -> None:
    spec = tiny_spec(optim={"name": optimizer, "lr": 0.01, "muon_beta2": 0.95})
    spec = spec.model_copy(update={"model": tiny_model(family)})
    dist = Dist(0, 0, 1, torch.device("cpu"))
    model = GPT(spec.model)
    optimizers = build_optimizers(model, spec.optim, dist)
    model(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64)).backward()
    for o in optimizers:
        o.step()
    saved = [*model.parameters(), *optimizer_tensors(model, optimizers, dist).values()]
    size = sum(t.numel() * t.element_size() for t in saved)
    assert plan(spec, Hardware()).checkpoint_bytes == pytest.approx(size, rel=0.02)


def test_each_switch_flipped_alone_is_judged_before_training() -> None:
    judged = {str(change): native_class(tiny_model("llama", **change))[0] for change in ABLATIONS}
    assert judged["{}"] == "LlamaForCausalLM"
    assert judged["{'n_kv_head': 1}"] == "LlamaForCausalLM"
    assert judged["{'qk_norm': True}"] is None  # with attention biases: vLLM would drop one
    name, reason = native_class(tiny_model("gpt2", position="rope"))
    assert name is None
    assert 'position "rope"' in reason


def refused(spec: TrainSpec, hardware: Hardware) -> dict[str, str]:
    with pytest.raises(SpecError) as caught:
        plan(spec, hardware)
    return {p.pointer: p.message for p in caught.value.problems}


def test_tokens_per_step_that_do_not_divide_are_refused_with_the_nearest_that_do() -> None:
    message = refused(tiny_spec(tokens_per_step=500).model_copy(update={"model": tiny_model("llama")}), Hardware())
    assert "448 or 512" in message["/tokens_per_step"]


def test_more_ranks_than_a_slot_holds_are_refused_with_how_many_it_does() -> None:
    spec = tiny_spec(resources={"ranks_per_node": 16}, tokens_per_step=2048)
    assert "2 CPU cores" in refused(spec, Hardware(ranks=2))["/resources/ranks_per_node"]


def test_a_model_that_cannot_fit_is_refused_with_what_it_needs_and_what_there_is() -> None:
    spec = resolve(read_spec(EXAMPLES / "llama-124m.json"), Path("nowhere"))  # type: ignore[arg-type]
    message = refused(spec, Hardware(device="cuda", device_name="small", memory_bytes=2**30))["/model"]
    assert "1.0 GiB" in message


def test_a_vocabulary_too_small_for_the_dataset_is_refused_with_both_sizes(tmp_path: Path) -> None:
    spec = tiny_spec(data={"dataset": "python-stdlib-gpt2"}, model={"preset": "llama-tiny", "vocab_size": 256})
    with pytest.raises(SpecError, match=r"vocab_size 256 is too small.*gpt2 of 50257 tokens"):
        resolve(spec, tmp_path)
    assert resolve(tiny_spec(data={"dataset": "python-stdlib"}), tmp_path).model.vocab_size == 256


def test_an_unknown_dataset_is_refused_with_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"'pyton-stdlib' is unknown; did you mean python-stdlib"):
        resolve(tiny_spec(data={"dataset": "pyton-stdlib"}), tmp_path)
    with pytest.raises(SpecError, match=r"trainmaster prepare mine --text FILE"):
        resolve(tiny_spec(data={"dataset": "mine"}), tmp_path)


def test_huge_numbers_are_planned_or_refused_at_once() -> None:
    began = time.monotonic()
    spec = tiny_spec(tokens_per_step=2**40, model=tiny_model("llama").model_dump())
    assert plan(spec, Hardware()).micro_batch_size == 8192 // 64  # as many tokens as a CPU's micro-batch may have
    for changes in ({"tokens_per_step": 32 * 10**400}, {"model": {"n_embd": 10**12 + 1, "n_head": 7, "n_layer": 1}}):
        with pytest.raises(SpecError):
            tiny_spec(**changes)
    assert time.monotonic() - began < 1


def test_auto_micro_batch_divides_the_ranks_share_and_fits() -> None:
    for ranks in (1, 2, 4):
        spec = tiny_spec(resources={"ranks_per_node": ranks}, tokens_per_step=32 * 4 * 6)
        spec = spec.model_copy(update={"model": tiny_model("llama", block_size=32)})
        planned = plan(spec, Hardware(ranks=ranks))
        assert planned.micro_batch_size * planned.grad_accum_steps * ranks * 32 == spec.tokens_per_step


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda p: p.stem)
def test_every_example_plans(path: Path) -> None:
    spec = read_spec(path)
    if isinstance(spec, TrainSpec):
        planned = plan(resolve(spec, Path("nowhere")), Hardware(device="cuda", ranks=8, memory_bytes=80 * 2**30))
        assert planned.native_class


@pytest.mark.parametrize(
    ("preset", "micro_batch_size", "block_size", "n_layer", "n_embd", "vocab_size", "measured_mib"),
    [
        ("gpt2", 8, 128, 4, 256, 50_257, 1545),
        ("llama", 8, 128, 4, 256, 50_257, 1581),
        ("nanochat", 8, 128, 4, 256, 50_257, 2278),
        ("gpt2", 4, 256, 6, 384, 256, 360),
        ("llama", 8, 256, 6, 384, 256, 651),
    ],
)
def test_the_planned_peak_of_eager_training_is_about_what_a_cpu_was_measured_to_hold(
    preset: str, micro_batch_size: int, block_size: int, n_layer: int, n_embd: int, vocab_size: int, measured_mib: int
) -> None:
    model = {"preset": f"{preset}-tiny", "block_size": block_size, "n_layer": n_layer, "n_embd": n_embd,
             "n_head": n_embd // 64, "vocab_size": vocab_size}  # fmt: skip
    spec = tiny_spec(model=model, optim={"lr": 0.001})
    planned = peak_memory_bytes(spec, micro_batch_size, "cpu") - PROCESS_BYTES
    assert 0.9 <= planned / (measured_mib * 2**20) <= 1.3


def test_the_ranks_of_a_machine_share_its_memory_and_each_gpu_has_its_own() -> None:
    body = {"kind": "train", "name": "x", "model": {"preset": "gpt2-124m", "vocab_size": 50257}, "max_steps": 10,
            "optim": {"lr": 0.001}, "data": {"dataset": "d"}, "tokens_per_step": 8192, "micro_batch_size": 1,
            "resources": {"ranks_per_node": 2}}  # fmt: skip
    spec = TrainSpec.model_validate(body)
    enough = 3 * peak_memory_bytes(spec, 1) // 2
    assert plan(spec, Hardware(device="cuda", ranks=2, memory_bytes=enough)).world_size == 2
    with pytest.raises(SpecError) as refused:
        plan(spec, Hardware(device="cpu", ranks=2, memory_bytes=enough))
    (problem,) = refused.value.problems
    assert problem.pointer == "/model"
    assert problem.message.endswith("use a smaller model or block_size, or activation_checkpointing")
    with pytest.raises(SpecError) as refused:
        plan(spec.model_copy(update={"micro_batch_size": 4}), Hardware(ranks=2, memory_bytes=enough))
    (problem,) = refused.value.problems
    assert problem.pointer == "/micro_batch_size" and 'a smaller micro_batch_size or "auto"' in problem.message


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("NVIDIA GeForce RTX 3080 Ti", None),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("NVIDIA RTX A1000", None),
        ("Tesla T4", None),
    ],
)
def test_a_gpus_peak_is_its_own(name: str, tflops: float | None) -> None:
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)


def test_planning_takes_no_tensor_library_and_less_than_a_second() -> None:
    code = (
        "import sys; from pathlib import Path; from gptcore.spec import read_spec; from gptcore.plan import *;"
        f"p = plan(resolve(read_spec(Path({str(EXAMPLES / 'llama-124m.json')!r})), Path('nowhere')), Hardware());"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; print(p.parameters)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "116500992"
    assert time.monotonic() - began < 5  # generous: the machine may be busy
