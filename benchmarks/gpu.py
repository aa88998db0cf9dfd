"""What the trainer reaches on one GPU: each part takes less than nine minutes, and skips what it has no time left for.

    python benchmarks/gpu.py --part correctness
    python benchmarks/gpu.py --part ours [--size 124m|350m] [--case gpt2-124m:64]
    python benchmarks/gpu.py --part peers [--family llama]
    python benchmarks/gpu.py --part recipes --recipe NAME --text FILE --home DIR --tokens 150000000

correctness  compiled against eager and float64: losses, and each tensor's gradient
ours         ceilings (matmul and attention at the model's shapes, copying), then tokens/s, MFU and memory of whole
             steps over micro-batch sizes; is the fastest the one that "auto" takes
peers        the same batch through transformers and litgpt, compiled, in turns
recipes      validation loss of a recipe after so many tokens, on the text given: see benchmarks/recipes.py

Cases compile side by side, a process each, as many as the memory holds; each is measured while the others wait.
Results are appended to benchmarks/results/gpu-PART.json; a second call with --resume takes what the first left.
`--device cpu --tiny` runs the same code at toy sizes: for the tests, its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.contender import Apart, Here, contender
from benchmarks.recipes import add_arguments, recipes
from benchmarks.table import RESULTS, Row, Table
from benchmarks.training import FAMILIES, PEERS, Case, need_device, peer_missing, timed

PACKAGES = ("torch", "triton", "transformers", "litgpt")
MFU_TARGETS = {"A100": (0.60, 0.65), "H100": (0.50, 0.58), "H200": (0.50, 0.58)}  # full attention; wanted, stretch
MICRO_BATCHES = (64, 32, 16, 8)
STEP_TOKENS = 524_288  # an update's, as in the examples
PEER_ROUNDS = 5
MOST_AT_ONCE = 8  # processes that compile side by side
MEMORY_FACTOR = 1.3  # of the plan's: a context, and what the allocator keeps beside what is used
FLOAT64_FACTOR = 4  # of bfloat16's
PEER_BYTES = 12  # a logit's, where they are not taken in chunks
Group = list[Case]  # those that are measured in turns
Answers = list[tuple[Here | Apart, dict[str, Any]]]


class Budget:
    """What is left of the part's time; `told` says what is left out."""

    def __init__(self, seconds: float, table: Table):
        self._until, self._table, self._longest = time.monotonic() + seconds, table, 0.0

    def left(self) -> float:
        return self._until - time.monotonic()

    def told(self, word: str, groups: list[Group], done: set[str]) -> Iterator[Answers]:
        """Each group's contenders and what they answered to `word`, said to all that fit the memory at once."""
        groups = [group for group in groups if name(group[0]) not in done]
        while groups:
            began = time.monotonic()
            if self._longest > self.left():
                for group in groups:
                    what = f"{name(group[0])}: no time left, call again with --resume"
                    self._table.row(what, None, "", left=True)
                return
            fitting = _fitting(groups, FLOAT64_FACTOR if word == "errors" else 1)
            wave = [[contender(case) for case in group] for group in groups[:fitting]]
            for one in (one for group in wave for one in group):
                one.tell(word)
            answers = [[(one, one.listen()) for one in group] for group in wave]
            for group in answers:
                if any("out_of_memory" in said for _, said in group):
                    case = name(group[0][0].case)
                    self._table.row(f"{case}: does not fit the GPU's memory", None, "", case=case)
                else:
                    yield group
            for one in (one for group in wave for one in group):
                one.close()
            groups = groups[fitting:]
            self._longest = max(self._longest, time.monotonic() - began)


def name(case: Case) -> str:
    return f"{case.family}-{case.size} micro-batch {case.micro_batch_size}"


def _fitting(groups: list[Group], factor: float) -> int:
    """How many of the groups fit the GPU's free memory together; one where none does."""
    import torch

    if groups[0][0].device == "cpu":
        return 1
    free, cases = float(torch.cuda.mem_get_info()[0]), 0
    for number, group in enumerate(groups):
        free -= factor * sum(_bytes(case) for case in group)
        cases += len(group)
        if number and (free < 0 or cases > MOST_AT_ONCE):
            return number
    return len(groups)


def _bytes(case: Case) -> float:
    from gptcore.plan import peak_memory_bytes

    spec = case.spec()
    tokens = case.micro_batch_size * spec.model.block_size
    logits = tokens * spec.model.padded_vocab_size * PEER_BYTES if case.who != "ours" else 0
    return MEMORY_FACTOR * peak_memory_bytes(spec, case.micro_batch_size) + logits


# --- correctness


def correctness(table: Table, asked: argparse.Namespace, budget: Budget) -> None:
    sizes = ["tiny", "124m"] if not asked.tiny else ["tiny"]
    wanted = [[Case(family, size, 4, device=asked.device, tiny=asked.tiny)]
              for size in sizes for family in asked.families]  # fmt: skip
    for [(one, said)] in budget.told("errors", wanted, asked.done):
        for row in said["rows"]:
            table.row(f"{name(one.case)}, {row.pop('what')}", **row, case=name(one.case))


# --- ours


def ours(table: Table, asked: argparse.Namespace, budget: Budget) -> None:
    import torch

    from gptcore.plan import Hardware, peak_flops, plan

    gpu = asked.device == "cuda"
    device_name = torch.cuda.get_device_name() if gpu else "cpu"
    peak = peak_flops(device_name)
    memory = torch.cuda.get_device_properties(0).total_memory if gpu else None
    hardware = Hardware(device=asked.device, device_name=device_name, memory_bytes=memory)
    if not asked.done:
        _ceilings(table, asked, peak)
    step_sequences = STEP_TOKENS // 1024 if gpu else 2
    cases = asked.cases or [
        f"{family}-{size}:{n}"
        for n in (MICRO_BATCHES if gpu else (2, 1)) for size in asked.sizes for family in asked.families
    ]  # fmt: skip
    split = [case.replace("-", ":").split(":") for case in cases]
    wanted = [
        [Case(family, size, int(n), max(1, step_sequences // int(n)), "ours", asked.device, asked.tiny, compiled=gpu)]
        for family, size, n in split
    ]
    for [(one, _)] in budget.told("warm", wanted, asked.done):
        case = one.case
        one.tell("time")
        said, spec = one.listen(), case.spec()
        planned = plan(spec, hardware)
        rate = spec.tokens_per_step / statistics.median(said["seconds"])
        held = said["peak_memory_bytes"]
        mfu = rate * planned.flops_per_token / peak if peak else None
        table.row(f"{name(case)}: tokens a second", rate, "tokens/s", case=name(case), device=device_name, mfu=mfu,
                  model=(case.family, case.size), micro_batch_size=case.micro_batch_size,
                  planned_memory_bytes=planned.peak_memory_bytes, parameters=planned.parameters,
                  matmul_parameters=planned.matmul_parameters, **said)  # fmt: skip
        if mfu is not None and peak is not None:
            table.row(f"{name(case)}: MFU, full attention", 100 * mfu, "%")
            causal = rate * planned.flops_per_token_causal / peak
            table.row(f"{name(case)}: MFU, causal attention", 100 * causal, "%")
        if held is not None:
            table.row(f"{name(case)}: peak memory, measured : planned", held / planned.peak_memory_bytes, "ratio")
    _best(table, asked, hardware)


def _best(table: Table, asked: argparse.Namespace, hardware: Any) -> None:
    """Of each model the fastest micro-batch, its MFU, and whether it is the one that "auto" takes."""
    from gptcore.plan import plan

    target = next((both for part, both in MFU_TARGETS.items() if part in hardware.device_name), None)
    table.rows = [row for row in table.rows if not row.get("best")]
    models: dict[tuple[str, str], list[Row]] = {}
    for row in table.rows:
        if "model" in row:
            models.setdefault(tuple(row["model"]), []).append(row)
    for (family, size), rows in models.items():
        best = max(rows, key=lambda row: float(row["value"]))
        spec = Case(family, size, 64, 8, "ours", asked.device, asked.tiny).spec()
        auto = plan(spec.model_copy(update={"micro_batch_size": "auto"}), hardware).micro_batch_size
        auto_rate = next((row["value"] for row in rows if row["micro_batch_size"] == auto), None)
        tried = sorted(row["micro_batch_size"] for row in rows)
        table.row(f"{family}-{size}: fastest micro-batch of {tried}; auto takes {auto}", best["micro_batch_size"],
                  "sequences", best=True, off=auto_rate and auto_rate / best["value"])  # fmt: skip
        if best["mfu"] is not None and target is not None:
            table.row(f"{family}-{size}: its MFU, full attention", 100 * best["mfu"], "%", best=True,
                      target=f"≥ {100 * target[0]:g} ({100 * target[1]:g})", met=best["mfu"] >= target[0])  # fmt: skip


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
    """In turns: what the machine does hits all alike."""
    gpu, wanted = asked.device == "cuda", []
    for size in asked.sizes:
        for family in asked.families:
            case = Case(family, size, 16 if gpu else 2, device=asked.device, tiny=asked.tiny, compiled=gpu)
            missing = {who: why for who in PEERS if (why := peer_missing(who, family))}
            if name(case) not in asked.done:
                for who, why in missing.items():
                    table.row(f"{name(case)}: no figure for {who}: {why}", None, "", missing=who)
            wanted.append([replace(case, who=who) for who in ("ours", *PEERS) if who not in missing])
    for group in budget.told("warm", wanted, asked.done):
        taken: dict[str, list[float]] = {one.case.who: [] for one, _ in group}
        for _ in range(PEER_ROUNDS):
            for one, _ in group:
                one.tell("time")
                taken[one.case.who].append(statistics.median(one.listen()["seconds"]))
        for one, warmed in group:
            case, seconds = one.case, taken[one.case.who]
            ratios = [own / other for own, other in zip(taken["ours"], seconds, strict=True)]
            table.row(f"{name(case)}: {case.who}", case.spec().tokens_per_step / statistics.median(seconds),
                      "tokens/s", case=name(case), seconds=seconds, first_loss=warmed["loss"])  # fmt: skip
            if case.who != "ours":
                table.row(f"{name(case)}: ours : {case.who}", 1 / statistics.median(ratios), "× speed", ratios=ratios)


PARTS = {"correctness": correctness, "ours": ours, "peers": peers, "recipes": recipes}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--part", choices=PARTS)
    arguments.add_argument("--json", type=Path, help="default: benchmarks/results/gpu-PART.json")
    arguments.add_argument("--resume", action="store_true", help="keep the file's rows, take what is missing")
    arguments.add_argument("--family", dest="families", action="append", choices=FAMILIES, help="default: all four")
    arguments.add_argument("--size", dest="sizes", action="append", choices=("124m", "350m"), help="default: both")
    arguments.add_argument("--case", dest="cases", action="append", help="ours: FAMILY-SIZE:MICRO_BATCH; default: all")
    arguments.add_argument("--budget-seconds", type=float, default=500)
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only with --tiny")
    arguments.add_argument("--tiny", action="store_true", help="toy sizes: checks this program, measures nothing")
    add_arguments(arguments)
    asked = arguments.parse_args()
    if asked.part is None or (asked.device == "cpu") != asked.tiny:
        arguments.error("give --part; --device cpu and --tiny only together")
    for case in asked.cases or []:
        if not re.fullmatch(rf"({'|'.join(FAMILIES)})-(124m|350m):[1-9]\d*", case):
            arguments.error(f"--case {case}: give FAMILY-SIZE:MICRO_BATCH, as in gpt2-124m:64")
    need_device(asked.device)
    asked.families, asked.sizes = asked.families or list(FAMILIES), asked.sizes or ["124m", "350m"]
    file = asked.json or RESULTS / f"gpu-{asked.part}.json"
    table = Table(file, PACKAGES)
    import torch

    table.machine["gpu"] = torch.cuda.get_device_name() if asked.device == "cuda" else "none"
    if asked.resume and file.exists():
        before = json.loads(file.read_text())
        there = {key: before["machine"].get(key, table.machine[key]) for key in ("cpu", "gpu", "versions")}
        if not there.items() <= table.machine.items():
            arguments.error(f"--resume: {file} is of another machine, {there}; give another --json")
        commit = {"commit": before["machine"]["commit"]}
        table.rows = [commit | row for row in before["rows"] if not row.get("left")]
    asked.done = {row["case"] for row in table.rows if "case" in row}
    PARTS[asked.part](table, asked, Budget(asked.budget_seconds, table))
    print(f"written to {file}")
    return 0 if table.all_met else 1


if __name__ == "__main__":
    raise SystemExit(main())
