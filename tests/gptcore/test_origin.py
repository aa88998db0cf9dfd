import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gptcore.checkpoint import list_checkpoints
from gptcore.dataset import VOCAB_SIZES, Tokenizer, tokenizer_of_checkpoint
from gptcore.events import Evaluated, Failed, Finished, Notice, Step
from gptcore.export import export_model, native_weights, write_tokenizer
from gptcore.init_check import refuse_another_vocabulary
from gptcore.model import GPT
from gptcore.native import native_config
from gptcore.origin import load_origin
from gptcore.prepare import prepare
from gptcore.sources import text_files
from gptcore.spec import InitSpec, ModelSpec, SpecError, TrainSpec
from tests.gptcore.conftest import FAMILIES, Trainers, tiny_model, tiny_spec


def of_model(spec: ModelSpec) -> TrainSpec:
    return tiny_spec().model_copy(update={"model": spec})


def saved_by_transformers(spec: ModelSpec, folder: Path) -> Any:
    """A randomly initialised native model, written by its own library."""
    torch.manual_seed(0)
    native = AutoModelForCausalLM.from_config(AutoConfig.for_model(**native_config(spec, "bytes")))
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    native.save_pretrained(folder)
    write_tokenizer(folder, "bytes", spec.block_size)
    return native.eval()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_import_and_export_give_the_same_tensors_and_logits(tmp_path: Path, family: str, tied: bool) -> None:
    spec = tiny_model(family, tie_embeddings=tied, vocab_size=256)
    native = saved_by_transformers(spec, tmp_path / "theirs")
    origin = load_origin(of_model(spec), InitSpec(source="theirs"), tmp_path, "bytes")
    ours = GPT(spec)
    ours.load_state_dict(origin.weights, strict=False)
    tokens = torch.randint(0, 256, (2, 64))
    with torch.no_grad():
        assert (ours.logits(tokens) - native(tokens).logits).abs().max() < 1e-5 * native(tokens).logits.abs().max()
    written = native_weights(spec, origin.weights)
    exported = {name.removeprefix("transformer."): tensor for name, tensor in written.items()}
    theirs = {name.removeprefix("transformer."): p for name, p in native.named_parameters()}
    assert exported.keys() == theirs.keys()
    assert all(torch.equal(exported[name], theirs[name]) for name in theirs)


def refused(init: InitSpec, spec: ModelSpec, runs: Path) -> str:
    with pytest.raises(SpecError) as caught:
        load_origin(of_model(spec), init, runs, "bytes")
    [problem] = caught.value.problems
    assert problem.pointer == "/init_from/source"
    return problem.message


def test_a_model_of_another_shape_is_refused_with_every_difference(tmp_path: Path) -> None:
    saved_by_transformers(tiny_model("llama", vocab_size=256), tmp_path / "theirs")
    other = tiny_model("llama", vocab_size=256, n_layer=3, rope_theta=500.0)
    message = refused(InitSpec(source="theirs"), other, tmp_path)
    assert "n_layer is 2 there, 3 here" in message
    assert "rope_theta is 10000.0 there, 500.0 here" in message


@pytest.mark.parametrize(
    ("family", "says", "said"),
    [
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 32.0}}, "its rope_type is 'llama3'"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, "its rope_type is"),
        ("llama", {"hidden_act": "gelu"}, "its hidden_act is 'gelu', which no model here computes; wanted 'silu'"),
        ("gpt2", {"activation_function": "relu"}, "its activation_function is 'relu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "its scale_attn_by_inverse_layer_idx is True"),
        ("qwen3", {"use_sliding_window": True}, "its use_sliding_window is True"),
        ("qwen3", {"attention_bias": True}, "its attention_bias is True, with which no Qwen3ForCausalLM"),
        ("llama", {"architectures": None}, "its class is 'not given'"),
        ("llama", {"quantization_config": {"bits": 4}}, "its quantization_config is {'bits': 4}"),
        ("llama", {"architectures": {"0": "LlamaForCausalLM"}}, "its class is 'not given'"),
        ("llama", {"rope_parameters": [1]}, "its rotation is [1], not an object"),
        ("llama", {"num_attention_heads": 0}, "its num_attention_heads is 0; wanted a whole number above 0"),
        ("llama", {"hidden_size": "x" * 1000}, "its hidden_size is 'xxx"),
    ],
)
def test_weights_of_another_function_are_refused(tmp_path: Path, family: str, says: dict[str, Any], said: str) -> None:
    spec = tiny_model(family, vocab_size=256)
    saved_by_transformers(spec, tmp_path / "theirs")
    config = tmp_path / "theirs" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | says))
    assert said in refused(InitSpec(source="theirs"), spec, tmp_path)


def test_what_a_config_leaves_out_is_what_its_class_takes_for_it(tmp_path: Path) -> None:
    spec = tiny_model("llama", vocab_size=256, n_kv_head=4, norm_eps=1e-6)
    native = saved_by_transformers(spec, tmp_path / "theirs")
    config = tmp_path / "theirs" / "config.json"
    left = {"num_key_value_heads", "rms_norm_eps"}
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k not in left}))
    ours = GPT(spec)
    ours.load_state_dict(
        load_origin(of_model(spec), InitSpec(source="theirs"), tmp_path, "bytes").weights, strict=False
    )
    tokens = torch.randint(0, 256, (2, 64))
    assert (ours.logits(tokens) - native(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3", "nanochat"])
def test_a_rope_model_may_train_at_a_shorter_context_and_exports_it(tmp_path: Path, family: str) -> None:
    native = saved_by_transformers(tiny_model(family, vocab_size=256, block_size=64), tmp_path / "theirs")
    spec = tiny_model(family, vocab_size=256, block_size=16)
    origin = load_origin(of_model(spec), InitSpec(source="theirs"), tmp_path, "bytes")
    export_model(tmp_path / "export", spec, origin.weights, "bytes")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert exported.config.max_position_embeddings == 16
    tokens = torch.randint(0, 256, (2, 16))
    with torch.no_grad():
        assert torch.equal(exported(tokens).logits, native(tokens).logits)


@pytest.mark.parametrize(
    ("family", "block_size", "said"),
    [("gpt2", 16, "a learned position table has one row per position"), ("llama", 128, "may be shorter than there")],
)
def test_another_context_that_no_weights_allow_is_explained(
    tmp_path: Path, family: str, block_size: int, said: str
) -> None:
    saved_by_transformers(tiny_model(family, vocab_size=256), tmp_path / "theirs")
    message = refused(InitSpec(source="theirs"), tiny_model(family, vocab_size=256, block_size=block_size), tmp_path)
    assert f"block_size is 64 there, {block_size} here" in message and said in message


@pytest.mark.parametrize("tokenizer", ["gpt2", "none", "damaged"])
def test_weights_of_another_tokenizer_are_refused_whatever_their_shape(tmp_path: Path, tokenizer: str) -> None:
    spec = tiny_model("llama", vocab_size=50257)
    saved_by_transformers(spec, tmp_path / "theirs")
    if tokenizer == "gpt2":
        write_tokenizer(tmp_path / "theirs", "gpt2", 64)
        said = (
            "has another tokenizer than dataset small: a probe text is 43 tokens there, 82 with bytes, the first other"
        )
    elif tokenizer == "none":
        (tmp_path / "theirs" / "tokenizer.json").unlink()
        said = "has no tokenizer to compare with the dataset's; save its tokenizer there too"
    else:
        (tmp_path / "theirs" / "tokenizer.json").write_text('{"model": []}')
        said = "transformers cannot load"
    assert said in refused(InitSpec(source="theirs"), spec, tmp_path)


def test_the_tokenizer_of_a_run_is_known_once_its_dataset_has_gone(tmp_path: Path) -> None:
    gone = {"spec": {"data": {"dataset": "gone"}, "model": {"vocab_size": 512}}}
    assert tokenizer_of_checkpoint(tmp_path, gone) == "bytes"
    assert tokenizer_of_checkpoint(tmp_path, gone | {"tokenizer": "gpt2"}) == "gpt2"
    builtin = {"data": {"dataset": "fineweb-10bt"}, "model": {"vocab_size": 50257}}
    assert tokenizer_of_checkpoint(tmp_path, {"spec": builtin}) == "gpt2"


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_a_tokenizer_is_told_from_the_other_by_a_few_words(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_tokenizer(tmp_path, tokenizer, 64)
    for ours in VOCAB_SIZES:
        with nullcontext() if ours == tokenizer else pytest.raises(SpecError, match=r"'a' is .* there, .* in"):
            refuse_another_vocabulary("theirs", (tmp_path / "tokenizer.json").read_bytes(), tiny_spec(), ours)


@pytest.mark.parametrize("source", ["nowhere", "../../etc", "empty"])
def test_a_source_that_is_not_there_is_refused(tmp_path: Path, source: str) -> None:
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    refused(InitSpec(source=source), tiny_model("llama"), tmp_path / "runs")


def test_a_run_is_extended_with_its_optimiser_as_if_it_had_never_ended(train: Trainers) -> None:
    constant = {"lr": 0.003, "warmup_steps": 3, "schedule": "constant"}
    long = train(tiny_spec(max_steps=30, optim=constant), "long")
    train(tiny_spec(max_steps=20, optim=constant), "short")
    more = train(tiny_spec(max_steps=30, optim=constant, init_from={"source": "short", "optimizer": True}), "more")
    assert isinstance(list(more.run.events())[-1], Finished), more.output
    assert more.losses() == {step: loss for step, loss in long.losses().items() if step > 20}


@pytest.mark.slow
def test_a_run_extended_on_other_text_is_not_judged_by_the_losses_of_the_old(train: Trainers, tmp_path: Path) -> None:
    (tmp_path / "digits.txt").write_text("".join(f"{i * 7919 % 1000}\n" for i in range(20_000)))
    prepare(train.home / "datasets", "digits", text_files([tmp_path / "digits.txt"]), "bytes", val_fraction=0.2)
    train(tiny_spec(max_steps=10), "first")
    for dataset, losses in (("small", 15), ("digits", 5)):
        init = {"source": "first", "optimizer": True}
        more = train(tiny_spec(max_steps=15, data={"dataset": dataset}, init_from=init), dataset)
        assert len(list_checkpoints(more.run)[-1].state().losses) == losses


def test_a_branch_starts_from_the_weights_alone(train: Trainers) -> None:
    first = train(tiny_spec(), "first")
    branch = train(tiny_spec(init_from={"source": "first"}, max_steps=10), "branch")
    assert branch.of_type(Step)[0].step == 1
    assert branch.of_type(Step)[0].train_loss < first.losses()[1] - 0.5
    assert branch.of_type(Notice)


def test_extending_to_no_more_steps_is_refused(train: Trainers) -> None:
    train(tiny_spec(max_steps=10), "first")
    again = train(tiny_spec(max_steps=10, init_from={"source": "first", "optimizer": True}), "again")
    failed = list(again.run.events())[-1]
    assert isinstance(failed, Failed)
    assert failed.reason == "user_error"
    assert "max_steps 10" in failed.message
    assert not again.of_type(Evaluated)


def test_state_of_another_optimiser_is_refused(train: Trainers) -> None:
    train(tiny_spec(max_steps=10), "first")
    muon = {"name": "muon", "lr": 0.003}
    again = train(tiny_spec(optim=muon, init_from={"source": "first", "optimizer": True}), "again")
    failed = list(again.run.events())[-1]
    assert isinstance(failed, Failed) and failed.reason == "user_error"
    assert "/optim/name: name 'muon' has no use for the optimiser state of first, which is adamw's" in failed.message
    assert again.returncode == 2


@pytest.mark.parametrize("last", [3, 100], ids=["within", "beyond the end"])
def test_traced_steps_leave_a_file(train: Trainers, last: int) -> None:
    done = train(tiny_spec(max_steps=5, profile_steps=[2, last]))
    assert done.returncode == 0
    [trace] = (done.run.path / "profile").iterdir()
    assert "ProfilerStep" in trace.read_text() or "aten::" in trace.read_text()
