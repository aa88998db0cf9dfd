"""What the trainer reaches on one GPU: each part takes less than nine minutes, and skips what it has no time left for.

    python benchmarks/gpu.py --part correctness
    python benchmarks/gpu.py --part ours [--size 124m|350m]
    python benchmarks/gpu.py --part peers [--family llama]
    python benchmarks/gpu.py --part recipes --recipe NAME --text FILE --home DIR --tokens 150000000

correctness  compiled against eager and float64: losses, and each tensor's gradient
ours         ceilings (matmul and attention at the model's shapes, copying), then tokens/s, MFU and memory of whole
             steps over micro-batch sizes; is the fastest the one that "auto" takes
peers        the same batch through transformers and litgpt, compiled, a process each, in turn
recipes      validation loss of a recipe after so many tokens, on the text given: see benchmarks/recipes.py

Results are appended to benchmarks/results/gpu-PART.json; a second call with --resume takes what the first left.
`--device cpu --tiny` runs the same code at toy sizes: for the tests, its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.recipes import add_arguments, recipes
from benchmarks.table import RESULTS, ROOT, Table
from benchmarks.training import FAMILIES, PEERS, Case, Stepper, need_device, peer_missing, timed

PACKAGES = ("torch", "triton", "transformers", "litgpt")
MFU_TARGETS = {"A100": (0.60, 0.65), "H100": (0.50, 0.58), "H200": (0.50, 0.58)}  # full attention; wanted, stretch
MICRO_BATCHES = (64, 32, 16, 8)
STEP_TOKENS = 131_072  # an update's; recipes take four times as many, so ours pays the optimiser dearer
WARMUP_STEPS, TIMED_STEPS = 3, 5
PEER_ROUNDS = 5
# gradients: |g - g64| / |g64| of a tensor, where |g64| counts as at least a tenth of what its size would have on
# average: the gradient of a key's bias is nothing but rounding where no rotation follows
SMALLEST = 0.1
FP32_TOLERANCE = 1e-4
BF16_LOSS_TOLERANCE, BF16_TOLERANCE = 2e-2, 0.1
COMPILED_FACTOR, COMPILED_MARGIN = 1.5, 0.01  # compiled may be off by so much more than eager is


class Budget:
    """What is left of the part's time; `fits` says what is left out."""

    def __init__(self, seconds: float, table: Table):
        self._until, self._table, self._longest = time.monotonic() + seconds, table, 0.0

    def left(self) -> float:
        return self._until - time.monotonic()

    def cases(self, cases: list[Case], done: set[str]) -> Iterator[Case]:
        for case in cases:
            if name(case) in done:
                continue
            began = time.monotonic()
            if self._longest > self.left():
                self._table.row(f"{name(case)}: no time left, call again with --resume", None, "", left=True)
                continue
            yield case
            self._longest = max(self._longest, time.monotonic() - began)
            _free(case.device)


def name(case: Case) -> str:
    return f"{case.family}-{case.size} micro-batch {case.micro_batch_size}"


def _free(device: str) -> None:
    import torch

    gc.collect()
    torch._dynamo.reset()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# --- correctness


def correctness(table: Table, asked: argparse.Namespace, budget: Budget) -> None:
    sizes = ["tiny", "124m"] if not asked.tiny else ["tiny"]
    wanted = [Case(family, size, 4, device=asked.device, tiny=asked.tiny)
              for size in sizes for family in asked.families]  # fmt: skip
    for case in budget.cases(wanted, asked.done):
        truth = _gradients(case, "float64", compiled=False)
        seen = {
            (dtype, compiled): _errors(_gradients(case, dtype, compiled), truth)
            for dtype in ("float32", "bfloat16")
            for compiled in (False, True)
        }
        for (dtype, compiled), (loss_error, worst, tensor) in seen.items():
            eager_worst = seen[dtype, False][1]
            most = FP32_TOLERANCE if dtype == "float32" else BF16_TOLERANCE
            most_loss = FP32_TOLERANCE if dtype == "float32" else BF16_LOSS_TOLERANCE
            if compiled:
                most = min(most, COMPILED_FACTOR * eager_worst + (COMPILED_MARGIN if dtype == "bfloat16" else most))
            table.row(f"{name(case)}, {dtype} {'compiled' if compiled else 'eager'}: worst gradient ({tensor})", worst,
                      "relative", target=f"≤ {most:.2g}", met=worst <= most, loss_error=loss_error, case=name(case),
                      met_loss=loss_error <= most_loss)  # fmt: skip
            table.row(f"{name(case)}, {dtype} {'compiled' if compiled else 'eager'}: loss", loss_error, "nats",
                      target=f"≤ {most_loss:.2g}", met=loss_error <= most_loss)  # fmt: skip


def _gradients(case: Case, dtype: str, compiled: bool) -> tuple[float, dict[str, Any]]:
    """Loss and float64 gradients on the CPU. float64 is exact but for the loss itself, which is float32 in it."""
    import torch

    stepper = Stepper(replace(case, compiled=compiled))
    model, (tokens, targets) = stepper.model, stepper.batches[0]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # zero-initialised matrices would hide what lies before them
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.02 * noise.to(parameter.device))
    model.to(torch.float64 if dtype == "float64" else torch.float32)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.autocast(case.device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = stepper.loss(tokens, targets)
    loss.backward()
    torch.set_float32_matmul_precision(precision)
    return float(loss.detach()), {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}


def _errors(seen: tuple[float, dict[str, Any]], truth: tuple[float, dict[str, Any]]) -> tuple[float, float, str]:
    """Of the loss; of the worst tensor's gradient, and which that is."""
    usual = (sum(float(g.square().sum()) for g in truth[1].values()) / sum(g.numel() for g in truth[1].values())) ** 0.5
    worst = max(
        (float((seen[1][n] - g).norm()) / max(float(g.norm()), SMALLEST * usual * g.numel() ** 0.5), n)
        for n, g in truth[1].items()
    )
    return abs(seen[0] - truth[0]), *worst


# --- ours


def ours(table: Table, asked: argparse.Namespace, budget: Budget) -> None:
    import torch

    from gptcore.plan import Hardware, peak_flops, plan

    gpu = asked.device == "cuda"
    device_name = torch.cuda.get_device_name() if gpu else "cpu"
    peak = peak_flops(device_name)
    memory = torch.cuda.get_device_properties(0).total_memory if gpu else None
    hardware = Hardware(device=asked.device, device_name=device_name, memory_bytes=memory)
    target = next((both for part, both in MFU_TARGETS.items() if part in device_name), None)
    if not asked.done:
        _ceilings(table, asked, peak)
    sizes, rates = asked.sizes, {}
    micro_batches = MICRO_BATCHES if gpu else (2, 1)
    wanted = [
        Case(family, size, n, max(1, (STEP_TOKENS if gpu else 64) // (1024 if gpu else 32) // n), "ours", asked.device,
             asked.tiny, compiled=gpu)
        for n in micro_batches for size in sizes for family in asked.families
    ]  # fmt: skip
    for case in budget.cases(wanted, asked.done):
        try:
            stepper = Stepper(case)
            stepper.seconds(WARMUP_STEPS)
            taken = stepper.seconds(TIMED_STEPS)
        except torch.OutOfMemoryError:
            table.row(f"{name(case)}: does not fit the GPU's memory", None, "", case=name(case))
            continue
        planned = plan(stepper.spec, hardware)
        seconds = statistics.median(taken)
        rate = stepper.spec.tokens_per_step / seconds
        rates[case.family, case.size, case.micro_batch_size] = rate
        held = torch.cuda.max_memory_allocated() if gpu else None
        mfu = rate * planned.flops_per_token / peak if peak else None
        table.row(f"{name(case)}: tokens a second", rate, "tokens/s", case=name(case), device=device_name,
                  seconds=taken, peak_memory_bytes=held, planned_memory_bytes=planned.peak_memory_bytes,
                  synchronisations=stepper.synchronisations(), parameters=planned.parameters,
                  matmul_parameters=planned.matmul_parameters)  # fmt: skip
        if mfu is not None:
            judged = target if case.micro_batch_size == max(MICRO_BATCHES) else None
            table.row(f"{name(case)}: MFU, full attention", 100 * mfu, "%", mfu=mfu,
                      target=f"≥ {100 * judged[0]:g} ({100 * judged[1]:g})" if judged else "",
                      met=mfu >= judged[0] if judged else None)  # fmt: skip
            causal = rate * planned.flops_per_token_causal / peak
            table.row(f"{name(case)}: MFU, causal attention", 100 * causal, "%")
        if held is not None:
            table.row(f"{name(case)}: peak memory, measured : planned", held / planned.peak_memory_bytes, "ratio")
        del stepper
    for family, size in {key[:2] for key in rates}:
        tried = {n: rate for (f, s, n), rate in rates.items() if (f, s) == (family, size)}
        best = max(tried, key=lambda n: tried[n])
        spec = Case(family, size, 64, 8, "ours", asked.device, asked.tiny).spec()
        auto = plan(spec.model_copy(update={"micro_batch_size": "auto"}), hardware).micro_batch_size
        table.row(f"{family}-{size}: fastest micro-batch of {sorted(tried)}; auto takes {auto}", best, "sequences",
                  auto=auto, off=tried[auto] / tried[best] if auto in tried else None)  # fmt: skip


def _ceilings(table: Table, asked: argparse.Namespace, peak: float | None) -> None:
    """Each product of a forward pass alone, attention by each of torch's kernels, and copying."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    gpu, dtype = asked.device == "cuda", torch.bfloat16

    def figure(what: str, call: Any, work: float, unit: str) -> None:
        timed(call, 3, asked.device)
        each = statistics.median(timed(call, 20 if gpu else 2, asked.device))
        share = work / each / peak if peak and unit == "TFLOP/s" else None
        table.row(f"ceiling: {what}", work / each / 1e12, unit, share_of_peak=share)

    for size in asked.sizes:
        model = Case("gpt2", size, 1, device=asked.device, tiny=asked.tiny).spec().model
        rows, heads = 64 * model.block_size if gpu else 64, 64 if gpu else 2
        shapes = {"q": (model.n_embd, model.n_embd), "up": (model.n_embd, model.n_hidden),
                  "down": (model.n_hidden, model.n_embd), "head": (model.n_embd, model.padded_vocab_size)}  # fmt: skip
        for what, (inner, columns) in shapes.items():
            many = min(rows, 8192) if what == "head" else rows
            left = torch.randn(many, inner, device=asked.device, dtype=dtype)
            right = torch.randn(columns, inner, device=asked.device, dtype=dtype)
            figure(f"matmul {size} {what} ({many} × {inner} × {columns})", lambda a=left, b=right: F.linear(a, b),
                   2.0 * many * inner * columns, "TFLOP/s")  # fmt: skip
        q = torch.randn(heads, model.n_head, model.block_size, model.head_dim, device=asked.device, dtype=dtype)
        q.requires_grad_()
        for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) if gpu else (SDPBackend.MATH,):

            def attend(q: Any = q, kernel: Any = kernel) -> None:
                with sdpa_kernel(kernel):
                    F.scaled_dot_product_attention(q, q, q, is_causal=True).backward(q)

            work = 12.0 * heads * model.n_head * model.block_size**2 * model.head_dim / 2  # causal, both passes
            try:
                figure(f"attention {size} {kernel.name}, causal, forward and backward", attend, work, "TFLOP/s")
            except RuntimeError as error:
                table.row(f"ceiling: attention {size} {kernel.name}: {str(error).splitlines()[0]}", None, "")
    source = torch.empty(2**30 if gpu else 2**20, dtype=torch.uint8, device=asked.device)
    target = torch.empty_like(source)
    figure(f"copy of {source.numel() / 2**20:g} MiB, read and written", lambda: target.copy_(source),
           2.0 * source.numel(), "TB/s")  # fmt: skip


# --- peers


def peers(table: Table, asked: argparse.Namespace, budget: Budget) -> None:
    """In turn, each in a process of its own that keeps its compiled step: what the machine does hits all alike."""
    gpu = asked.device == "cuda"
    wanted = [Case(family, size, 16 if gpu else 2, device=asked.device, tiny=asked.tiny, compiled=gpu)
              for size in asked.sizes for family in asked.families]  # fmt: skip
    for case in budget.cases(wanted, asked.done):
        present = ["ours"]
        for who in PEERS:
            if why := peer_missing(who, case.family):
                table.row(f"{name(case)}: no figure for {who}: {why}", None, "", missing=who, case=name(case))
            else:
                present.append(who)
        runners = {who: Runner(replace(case, who=who)) for who in present}
        losses = {who: runner.ask("ready")["loss"] for who, runner in runners.items()}
        taken: dict[str, list[float]] = {who: [] for who in present}
        for _ in range(PEER_ROUNDS):
            for who, runner in runners.items():
                taken[who].append(statistics.median(runner.ask("go")["seconds"]))
        for runner in runners.values():
            runner.close()
        tokens = case.spec().tokens_per_step
        for who in present:
            ratios = [own / other for own, other in zip(taken["ours"], taken[who], strict=True)]
            table.row(f"{name(case)}: {who}", tokens / statistics.median(taken[who]), "tokens/s", case=name(case),
                      seconds=taken[who], first_loss=losses[who])  # fmt: skip
            if who != "ours":
                table.row(f"{name(case)}: ours : {who}", 1 / statistics.median(ratios), "× speed", ratios=ratios)


class Runner:
    """A case in a process of its own, which makes steps when asked to."""

    def __init__(self, case: Case):
        command = [sys.executable, __file__, "--serve", json.dumps(asdict(case))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):  # a library may have said something too
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")

    def close(self) -> None:
        self._process.communicate()


def serve(case: Case) -> None:
    stepper = Stepper(case)
    first = float(stepper.step())
    stepper.seconds(WARMUP_STEPS)
    for word in sys.stdin:
        said = {"loss": first} if word.strip() == "ready" else {"seconds": stepper.seconds(TIMED_STEPS)}
        print(json.dumps(said), flush=True)


PARTS = {"correctness": correctness, "ours": ours, "peers": peers, "recipes": recipes}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--part", choices=PARTS)
    arguments.add_argument("--json", type=Path, help="default: benchmarks/results/gpu-PART.json")
    arguments.add_argument("--resume", action="store_true", help="keep the file's rows, take what is missing")
    arguments.add_argument("--family", dest="families", action="append", choices=FAMILIES, help="default: all four")
    arguments.add_argument("--size", dest="sizes", action="append", choices=("124m", "350m"), help="default: both")
    arguments.add_argument("--budget-seconds", type=float, default=500)
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only with --tiny")
    arguments.add_argument("--tiny", action="store_true", help="toy sizes: checks this program, measures nothing")
    arguments.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    add_arguments(arguments)
    asked = arguments.parse_args()
    if asked.serve is not None:
        serve(Case(**asked.serve))
        return 0
    if asked.part is None or (asked.device == "cpu") != asked.tiny:
        arguments.error("give --part; --device cpu and --tiny only together")
    need_device(asked.device)
    asked.families, asked.sizes = asked.families or list(FAMILIES), asked.sizes or ["124m", "350m"]
    file = asked.json or RESULTS / f"gpu-{asked.part}.json"
    table = Table(file, PACKAGES)
    if asked.resume and file.exists():
        table.rows = [row for row in json.loads(file.read_text())["rows"] if not row.get("left")]
    asked.done = {row["case"] for row in table.rows if "case" in row}
    PARTS[asked.part](table, asked, Budget(asked.budget_seconds, table))
    print(f"written to {file}")
    return 0 if table.all_met else 1


if __name__ == "__main__":
    raise SystemExit(main())
