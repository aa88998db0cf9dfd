"""Tokens a second of whole training steps on this CPU: ours beside transformers and litgpt, and beside the machine.

    python benchmarks/throughput.py [--full] [--rounds 3] [--json FILE]

Each contender is a process of its own with the same shapes, batch, precision, threads and torch; they take turns,
one step each, so that a busy moment of the machine meets all of them. A step is forward, backward, clipping and
AdamW. The machine's own rate is that of `torch.mm` on the products of the same model, taken in the same turns.
`--full` adds the eager runs. On a processor without instructions for bf16 its rows are left out: a step
takes minutes there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.table import RESULTS, ROOT, Table
from gptcore.plan import count_parameters, flops_per_token
from gptcore.spec import ModelSpec

PEERS = ROOT / ".peers"
B, T, V = 2, 512, 50257
MODELS = ("gpt2-124m", "llama-124m")
TARGETS = {"bf16": (0.80, 1.2), "fp32": (0.92, 1.05)}  # share of the machine's rate, ratio to the best peer


def spec_of(preset: str) -> ModelSpec:
    return ModelSpec.model_validate({"preset": preset, "vocab_size": V, "block_size": T})


# --- the contenders: each returns a function that makes one step


def ours(spec: ModelSpec, precision: str, compiled: bool) -> Callable[[], None]:
    import torch
    from torch.nn.utils import get_total_norm

    from gptcore.dist import start
    from gptcore.model import GPT
    from gptcore.optim import build_optimizers, update
    from gptcore.setup import wrap
    from gptcore.spec import OptimSpec

    dist = start("cpu", torch.get_num_threads())
    model = GPT(spec)
    optimizers = build_optimizers(model, OptimSpec(lr=1e-4), dist)
    forward, _ = wrap(model, compiled, dist)
    parameters = list(model.parameters())
    tokens = torch.randint(V, (B, T))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = forward(tokens, tokens)
        loss.backward()
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        update(optimizers, norm if float(norm) > 1.0 else None)  # to a norm of 1, as Trainer.step does

    return step


def _peer_step(model: Any, precision: str, compiled: bool, loss_of: Callable[[Any, Any], Any]) -> Callable[[], None]:
    import torch

    run = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(V, (B, T))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(run, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def transformers(spec: ModelSpec, precision: str, compiled: bool) -> Callable[[], None]:
    """The stock class of the same shape; its loss is its own."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if spec.position == "learned":
        model: Any = GPT2LMHeadModel(
            GPT2Config(vocab_size=V, n_positions=T, n_embd=spec.n_embd, n_layer=spec.n_layer, n_head=spec.n_head,
                       resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
        )  # fmt: skip
    else:
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=V, hidden_size=spec.n_embd, intermediate_size=spec.n_hidden,
                        num_hidden_layers=spec.n_layer, num_attention_heads=spec.n_head,
                        num_key_value_heads=spec.n_kv_head, max_position_embeddings=T, attention_bias=True,
                        tie_word_embeddings=True, use_cache=False)
        )  # fmt: skip
    model.train()
    return _peer_step(model, precision, compiled, lambda run, tokens: run(input_ids=tokens, labels=tokens).loss)


def litgpt(spec: ModelSpec, precision: str, compiled: bool) -> Callable[[], None]:
    """litgpt's GPT of the same widths; it knows no learned positions, so gpt2's shape turns its queries instead."""
    import torch
    from litgpt import GPT, Config

    llama = spec.position == "rope"
    config = Config(
        block_size=T, padded_vocab_size=spec.padded_vocab_size, n_layer=spec.n_layer, n_head=spec.n_head,
        n_query_groups=spec.n_kv_head, n_embd=spec.n_embd, intermediate_size=spec.n_hidden, rotary_percentage=1.0,
        parallel_residual=False, bias=not llama, attn_bias=True, norm_class_name="RMSNorm" if llama else "LayerNorm",
        mlp_class_name="LLaMAMLP" if llama else "GptNeoxMLP", gelu_approximate="tanh",
    )  # fmt: skip
    model = GPT(config)
    model.lm_head.weight = model.transformer.wte.weight  # tied, as the other two

    def loss_of(run: Any, tokens: Any) -> Any:
        return torch.nn.functional.cross_entropy(run(tokens).flatten(0, 1).float(), tokens.flatten())

    return _peer_step(model, precision, compiled, loss_of)


def products(spec: ModelSpec) -> list[tuple[int, int, int]]:
    """(inputs, outputs, how many) of the model's matrices."""
    q, kv = spec.n_head * spec.head_dim, spec.n_kv_head * spec.head_dim
    d, f, layers = spec.n_embd, spec.n_hidden, spec.n_layer
    into_hidden = 2 if spec.mlp == "swiglu" else 1
    return [(d, q, layers), (d, kv, 2 * layers), (q, d, layers), (d, f, into_hidden * layers), (f, d, layers),
            (d, spec.padded_vocab_size, 1)]  # fmt: skip


def machine_rate(spec: ModelSpec, precision: str, onednn: bool) -> Callable[[], None]:
    """One step's products and nothing else, each layer's own matrices, into memory that is there: forward, and
    both gradients."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    N = B * T
    made = [
        [torch.randn(shape).to(dtype) for shape in ((N, C), (O, C), (N, O), (N, O), (N, C), (O, C))]
        for C, O, count in products(spec)  # noqa: E741
        for _ in range(count)
    ]

    def with_torch() -> None:
        for x, w, g, y, gx, gw in made:
            torch.mm(x, w.t(), out=y)
            torch.mm(g, w, out=gx)
            torch.mm(g.t(), x, out=gw)

    def with_onednn() -> None:
        for x, w, g, *_ in made:
            torch.ops.gptcore.product(x, w, None)
            torch.ops.gptcore.product(g, w.t(), None)
            torch.ops.gptcore.product(g.t(), x.t(), None)

    if onednn:
        import gptcore.kernels  # noqa: F401

        return with_onednn
    return with_torch


CONTENDERS: dict[str, Callable[[ModelSpec, str, bool], Callable[[], None]]] = {
    "ours": ours,
    "transformers": transformers,
    "litgpt": litgpt,
    "machine": lambda spec, precision, _: machine_rate(spec, precision, onednn=False),
    "machine-onednn": lambda spec, precision, _: machine_rate(spec, precision, onednn=True),
}


def serve(name: str, preset: str, precision: str, compiled: bool) -> None:
    """A contender's process: answers each line of its input with the seconds of one step."""
    import torch

    torch.manual_seed(0)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    began = time.perf_counter()
    step = CONTENDERS[name](spec_of(preset), precision, compiled)
    for _ in range(2):
        step()
    print(time.perf_counter() - began, file=answers, flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        print(time.perf_counter() - began, file=answers, flush=True)


class Contender:
    """One process, asked for one step at a time."""

    def __init__(self, name: str, preset: str, precision: str, compiled: bool):
        self.name = name
        command = [sys.executable, __file__, "--serve", name, preset, precision, "compiled" if compiled else "eager"]
        environment = os.environ | {"PYTHONPATH": str(PEERS)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment,
        )  # fmt: skip
        self.start_seconds = 0.0
        self.seconds: list[float] = []

    def await_start(self) -> None:
        """Compiled and warm: all contenders do so at once, before the first turn."""
        self.start_seconds = self._read()

    def _read(self) -> float:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, f"{self.name} ended: run `python benchmarks/throughput.py --serve {self.name} …` to see why"
        return float(line)

    def step(self) -> None:
        assert self._process.stdin
        print("step", file=self._process.stdin, flush=True)
        self.seconds.append(self._read())

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def contest(preset: str, precision: str, compiled: bool, rounds: int) -> Iterator[Contender]:
    names = [name for name in CONTENDERS if name != "machine-onednn" or precision == "fp32"]
    if not (PEERS / "litgpt").exists():
        print("litgpt is not there: pip install --no-deps --target .peers -r benchmarks/peers.txt")
        names.remove("litgpt")
    with ExitStack() as stack:
        contenders = [stack.enter_context(Contender(name, preset, precision, compiled)) for name in names]
        for contender in contenders:
            contender.await_start()
        for _ in range(rounds):
            for contender in contenders:
                contender.step()
    yield from contenders


def has_bf16() -> bool:
    import torch

    from gptcore.device import multiplies_bf16

    return multiplies_bf16(torch.device("cpu"))


def report(table: Table, preset: str, precision: str, compiled: bool, rounds: int) -> None:
    by_name = {c.name: c for c in contest(preset, precision, compiled, rounds)}
    spec = spec_of(preset)
    counts = count_parameters(spec)
    step_flops = flops_per_token(spec, counts.matmul, causal=True) * B * T
    product_flops = 6 * counts.matmul * B * T
    share_target, ratio_target = TARGETS[precision] if compiled else (0.0, 0.0)
    title = f"{preset} {precision}{'' if compiled else ' eager'}"
    median = {name: statistics.median(c.seconds) for name, c in by_name.items()}
    for name, contender in by_name.items():
        flops = product_flops if name.startswith("machine") else step_flops
        table.row(f"{title}: {name}", flops / median[name] / 1e9, "GFLOP/s", seconds=contender.seconds,
                  tokens_per_second=B * T / median[name], start_seconds=contender.start_seconds)  # fmt: skip
    for name, contender in by_name.items():
        if not name.startswith("machine"):
            table.row(f"{title}: {name}", B * T / median[name], "tokens/s",
                      best=B * T / min(contender.seconds))  # fmt: skip
    for machine in (name for name in by_name if name.startswith("machine")):
        pairs = zip(by_name["ours"].seconds, by_name[machine].seconds, strict=True)
        share = statistics.median(step_flops / a / (product_flops / b) for a, b in pairs)
        verdict = {"target": f">= {share_target}", "met": share >= share_target} if share_target else {}
        table.row(f"{title}: ours as a share of {machine}'s products", share, "",
                  **(verdict if machine == "machine" else {}))  # fmt: skip
    peers = [name for name in by_name if name in ("transformers", "litgpt")]
    ratios = [min(by_name[p].seconds[n] for p in peers) / seconds for n, seconds in enumerate(by_name["ours"].seconds)]
    ratio = statistics.median(ratios)
    verdict = {"target": f">= {ratio_target}", "met": ratio >= ratio_target} if ratio_target else {}
    table.row(f"{title}: ours against the better peer", ratio, "times", **verdict, low=min(ratios), high=max(ratios))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS / "throughput.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="the eager runs too")
    parser.add_argument("--model", choices=MODELS, action="append", help="only these")
    parser.add_argument("--precision", choices=TARGETS, action="append", help="only these")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        name, preset, precision, mode = asked.serve
        serve(name, preset, precision, mode == "compiled")
        return 0
    table = Table(asked.json, ("torch", "transformers", "numpy"))
    precisions = asked.precision or list(TARGETS)
    if not (asked.precision or has_bf16()):
        precisions.remove("bf16")
        table.row("bf16: left out, no instructions for it here; --precision bf16 takes it", None, "")
    for compiled in (True, False) if asked.full else (True,):
        for precision in precisions:
            for preset in asked.model or MODELS:
                report(table, preset, precision, compiled, asked.rounds)
    print(f"written to {asked.json}")
    return 0 if table.all_met else 1


if __name__ == "__main__":
    raise SystemExit(main())
