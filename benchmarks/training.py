"""A training step as `gptcore.train` makes it, ours or a peer's, on one device: what the GPU benchmarks time."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

NO_GPU = 3  # the exit code
FAMILIES = ("gpt2", "llama", "qwen3", "nanochat")
PEERS = ("transformers", "litgpt")
TINY = {"n_layer": 1, "n_embd": 64, "n_head": 4, "block_size": 32, "vocab_size": 500}


def missing_gpu() -> str:
    """Why there is no GPU to measure; "" where there is one. Loads nothing heavy."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1)"
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "the NVIDIA driver finds no GPU"
    return ""


def need_device(device: str) -> None:
    """Ends the program where `device` is "cuda" and there is none: one line, exit code 3."""
    if device == "cpu":
        return
    why = missing_gpu()
    if not why:
        import torch

        why = "" if torch.cuda.is_available() else f"torch {torch.__version__} cannot use the GPU"
    if why:
        print(f"{Path(sys.argv[0]).name}: no GPU to measure: {why}; run it on a machine with one", file=sys.stderr)
        raise SystemExit(NO_GPU)


@dataclass(frozen=True)
class Case:
    """A model and a batch. `tiny` shrinks the model to what a CPU trains in milliseconds."""

    family: str
    size: str
    micro_batch_size: int
    grad_accum_steps: int = 1
    who: str = "ours"
    device: str = "cuda"
    tiny: bool = False
    compiled: bool = True

    def spec(self) -> Any:
        from gptcore.spec import parse_spec

        model = {"preset": f"{self.family}-{'tiny' if self.tiny else self.size}"}
        block_size = 32 if self.tiny else 1024
        model |= TINY if self.tiny else {"vocab_size": 50257, "block_size": block_size}
        return parse_spec({
            "kind": "train", "name": "benchmark", "model": model, "data": {"dataset": "none"},
            "optim": {"name": "adamw", "lr": 0.0006}, "max_steps": 1000, "precision": "bf16",
            "tokens_per_step": self.micro_batch_size * self.grad_accum_steps * block_size,
            "micro_batch_size": self.micro_batch_size,
        })  # fmt: skip


class Stepper:
    """A model, its optimiser and one batch on the device; `step` is a whole update, with no host synchronisation."""

    def __init__(self, case: Case, seed: int = 0):
        import torch

        from gptcore.compiler import compile_loss
        from gptcore.dist import Dist
        from gptcore.model import GPT
        from gptcore.setup import wrap

        self.case, self.spec = case, case.spec()
        self.device = torch.device(case.device)
        torch.manual_seed(seed)
        if case.device == "cuda":
            torch.set_float32_matmul_precision("high")
        ours, self._dist = GPT(self.spec.model), Dist(0, 0, 1, self.device)
        self.model: Any = ours if case.who == "ours" else _peer(case.who, ours)
        self.model.to(self.device)
        self.loss: Any = self.model if case.who == "ours" else self._plain_loss
        if case.compiled and case.device == "cpu":
            self.loss = compile_loss(self.loss, backend="aot_eager")  # only shows that all is traced
        elif case.compiled:
            self.loss = wrap(self.loss, True, self._dist)[0]
        shape = (case.grad_accum_steps, case.micro_batch_size, self.spec.model.block_size + 1)
        tokens = torch.randint(self.spec.model.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
        block = tokens.to(self.device)
        self.batches = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in block]
        self.optimizers = self._optimizers()

    def _plain_loss(self, tokens: Any, targets: Any) -> Any:
        import torch.nn.functional as F

        out = self.model(tokens)
        logits = getattr(out, "logits", out)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def _optimizers(self) -> list[Any]:
        import torch

        from gptcore.optim import build_optimizers

        if self.case.who == "ours":
            return list(build_optimizers(self.model, self.spec.optim, self._dist))
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        return [torch.optim.AdamW(groups, lr=0.0006, betas=(0.9, 0.95), fused=True)]

    def step(self) -> Any:
        """Forward and backward of each micro-batch, clip, update → the mean loss (), still on the device."""
        import torch
        from torch.nn.utils import get_total_norm

        from gptcore.optim import update

        total = torch.zeros((), device=self.device)
        for tokens, targets in self.batches:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                loss = self.loss(tokens, targets) / len(self.batches)
            loss.backward()
            total += loss.detach()
        norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        update(self.optimizers, norm.clamp(min=1.0))  # to a norm of 1, without asking the device for it
        return total

    def seconds(self, steps: int) -> list[float]:
        """Of each of `steps` updates, by the device's clock."""
        return timed(self.step, steps, self.device.type)

    def synchronisations(self) -> int | None:
        """How often an update waits for the device; None on a CPU, where nothing is asynchronous."""
        import torch

        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            self.step()
            torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(one.message) for one in said)  # not torch's notice about the mode


def timed(call: Callable[[], Any], times: int, device: str) -> list[float]:
    """Seconds of each call. On a GPU by events in its queue, which is kept full."""
    import torch

    if device == "cpu":
        taken = []
        for _ in range(times):
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
        return taken
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    torch.cuda.synchronize()
    for mark in marks[:-1]:
        mark.record()
        call()
    marks[-1].record()
    torch.cuda.synchronize()
    return [one.elapsed_time(next_one) / 1000 for one, next_one in pairwise(marks)]


def peer_missing(who: str, family: str) -> str:
    """Why this peer cannot be measured here; "" where it can."""
    if importlib.util.find_spec(who) is None:
        return f"{who} is not installed"
    if who == "litgpt" and family not in ("llama", "qwen3"):
        return "litgpt has no such model"
    if family == "nanochat":
        import transformers

        if not hasattr(transformers, "NanoChatForCausalLM"):
            return f"transformers {transformers.__version__} has no NanoChatForCausalLM"
    return ""


def _peer(who: str, ours: Any) -> Any:
    """The same model in another library: transformers with our weights, litgpt with its own."""
    if who == "transformers":
        from transformers import AutoModelForCausalLM

        from gptcore.export import export_model

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "export"
            tokenizer = "gpt2" if ours.spec.vocab_size == 50257 else "bytes"
            export_model(path, ours.spec, ours.state_dict(), tokenizer)
            model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa", dtype="float32")
        model.config.use_cache = False
        return model.train()
    import litgpt
    import torch

    spec = ours.spec
    model = litgpt.GPT(
        litgpt.Config(
            name="benchmark", block_size=spec.block_size, vocab_size=spec.vocab_size,
            padded_vocab_size=spec.padded_vocab_size, n_layer=spec.n_layer, n_head=spec.n_head, n_embd=spec.n_embd,
            n_query_groups=spec.n_kv_head, head_size=spec.head_dim, rotary_percentage=1.0, parallel_residual=False,
            bias=False, attn_bias=spec.attention_bias, norm_qk=spec.qk_norm, norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP", intermediate_size=spec.n_hidden,
        )
    )  # fmt: skip
    if spec.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.02)
    return model
