import stat
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptcore.export import export_model, merges_of, native_weights
from gptcore.model import GPT
from gptcore.tokenizer import gpt2_ranks, load_tokenizer
from tests.gptcore.conftest import FAMILIES, randomised, tiny_model

TEXTS = [
    "Hello world",
    "def f(x):\n    return x**2\n",
    "naïve café 你好 🙂\u200d",
    "  \t\n",
    "<|endoftext|>'s I'LL",
    "",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_gives_the_trainers_logits(
    tmp_path: Path, family: str, tied: bool, dtype: torch.dtype
) -> None:
    spec = tiny_model(family, tie_embeddings=tied, vocab_size=256, block_size=256)
    model = randomised(spec)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    name = export_model(tmp_path / "export", spec, weights, "bytes", dtype)
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert type(native).__name__ == name
    with torch.no_grad():
        for parameter in model.parameters():  # the exported weights, in float32
            parameter.copy_(parameter.to(dtype).float())
        for T in (64, 256):
            tokens = torch.randint(0, 256, (2, T), generator=torch.Generator().manual_seed(T))
            difference = (native(tokens).logits - model.logits(tokens)).abs().max().item()
            assert difference < 2e-5 * max(1.0, model.logits(tokens).abs().max().item() / 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_is_complete_and_readable_by_others(tmp_path: Path, family: str) -> None:
    model = randomised(tiny_model(family, vocab_size=256))
    export_model(tmp_path / "export", model.spec, dict(model.named_parameters()), "bytes")
    files = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "export").iterdir()}
    assert files == dict.fromkeys(
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"], 0o644
    )


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_the_exported_tokenizer_gives_our_tokens_and_text_back(tmp_path: Path, tokenizer: str) -> None:
    ours = load_tokenizer(tokenizer)
    spec = tiny_model("llama", vocab_size=ours.vocab_size)
    export_model(tmp_path / "export", spec, dict(GPT(spec).named_parameters()), tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert len(theirs) == ours.vocab_size
    for text in TEXTS:
        if "<|endoftext|>" in text:
            continue  # the Hub's tokenizers take it for the special token, which ours never writes from text
        tokens = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == tokens
        assert theirs.decode(tokens) == text
    if tokenizer == "gpt2":
        assert theirs("<|endoftext|>")["input_ids"] == [50256]


def test_the_merges_rebuild_every_token_from_its_parts() -> None:
    ranks = gpt2_ranks()
    merges = merges_of(ranks)
    assert len(merges) == 50_000
    assert merges[:3] == [(b" ", b"t"), (b" ", b"a"), (b"h", b"e")]
    assert [left + right for left, right in merges] == [t for t in sorted(ranks, key=ranks.__getitem__) if len(t) > 1]


def test_export_cuts_the_padding_and_writes_a_tied_matrix_once() -> None:
    model = randomised(tiny_model("gpt2"))
    tensors = native_weights(model.spec, dict(model.named_parameters()))
    assert tensors["wte.weight"].shape == (96, 32)
    assert "lm_head.weight" not in tensors
