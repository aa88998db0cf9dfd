"""Every number that follows from a spec, derived once: by the API, the command line, the trainer.

Pure, quick and without tensors. What cannot run is refused here, with the numbers and a way out.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from gptcore.dataset import VOCAB_SIZES, tokenizer_of
from gptcore.native import native_class
from gptcore.presets import shown
from gptcore.spec import InitSpec, ModelSpec, Problem, SpecError, TrainSpec, refusal

# dense bf16 peaks with float32 accumulation in FLOP/s, from NVIDIA's data sheets and architecture papers, where the
# number with sparsity is twice this; by a part of the name that the driver gives, the longest that is found decides
PEAK_FLOPS = {
    "A10": 125e12, "A10G": 70e12, "A30": 165e12, "A40": 149.7e12, "A100": 312e12, "A800": 312e12,
    "H100": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12, "H200 NVL": 835e12, "H800": 989e12,
    "GH200": 989e12, "H20": 148e12, "B200": 2250e12, "GB200": 2500e12,
    "L4": 121e12, "L40": 181e12, "L40S": 362e12,
    "RTX A4000": 76.7e12, "RTX A5000": 111e12, "RTX A6000": 154.8e12, "RTX 6000 Ada": 364e12,
    "RTX 3080": 59.5e12, "RTX 3090": 71e12, "RTX 3090 Ti": 80e12,
    "RTX 4080": 97.5e12, "RTX 4090": 165e12, "RTX 5090": 209.5e12,
}  # fmt: skip
# other chips under the name of one above: smaller, or limited
OTHER_CHIPS = ("Laptop", "Max-Q", "Mobile", "SUPER", "RTX 4090 D", "RTX 5090 D")

# float32 logits that exist at once while the loss is computed: 512 MiB
LOSS_CHUNK_ELEMENTS = 2**27
GPU_LOSS_CHUNK_ELEMENTS = 2**29  # in bfloat16 and with their gradient 2 GiB; smaller matrices multiply slower
# Eager training, measured on a CPU: see docs/decisions/out-of-memory.md
EAGER_ACTIVATIONS = 1.8  # of what the compiler keeps for the backward pass
EAGER_LOGITS = 6.5  # float32 copies of a chunk of logits at once
EAGER_SOFTCAP_LOGITS = 3.0  # and of those of a softcap
PROCESS_BYTES = 400 * 2**20  # of a CPU process before its model: Python, torch, its threads
CPU_MICRO_BATCH_TOKENS = 8192
GPU_MICRO_BATCH_TOKENS = 65_536
NOTABLE_CHECKPOINT_BYTES = 2**30  # smaller ones take a disk no time to speak of


class Hardware(BaseModel, frozen=True):
    """What one slot of a node offers."""

    device: Literal["cpu", "cuda"] = "cpu"
    device_name: str = "cpu"
    ranks: int = 1  # GPUs of the slot, or CPU cores
    memory_bytes: int | None = None  # of one GPU, or of the machine; null: unknown


class Parameters(BaseModel, frozen=True):
    """Parameter counts. `exported` has no vocabulary padding; `matmul` is what FLOPs are spent on."""

    exported: int
    trained: int
    matmul: int
    hidden_matrices: int  # 2-D weights inside the blocks: Muon's share


class Range(BaseModel):
    low: float
    expected: float
    high: float


class Estimate(BaseModel):
    """How long and how much, without the queue. Made where past runs are known: by the API."""

    tokens_per_second: Range  # evaluations and checkpoints included
    seconds: Range
    cost: Range | None  # in the currency of the price a GPU-hour; null: no price set, or no GPU
    basis: Literal["past_runs", "hardware"]
    past_runs: int  # like this one
    past_plans_off: float | None  # the median of their real over their estimated seconds, minus 1


class Plan(BaseModel, frozen=True):
    """What a train spec comes to on given hardware."""

    device: Literal["cpu", "cuda"]
    world_size: int
    micro_batch_size: int
    grad_accum_steps: int
    tokens_per_step: int
    total_steps: int
    total_tokens: int
    parameters: int
    parameters_trained: int
    matmul_parameters: int
    flops_per_token: int  # full attention, forward and backward
    flops_per_token_causal: int
    total_flops: float
    checkpoint_bytes: int
    peak_memory_bytes: int  # a rank's, estimated
    native_class: str | None
    not_exportable_because: str
    warnings: list[str]
    estimate: Estimate | None = None


def resolve(spec: TrainSpec, datasets: Path) -> TrainSpec:
    """The spec with `vocab_size` filled from its dataset. Raises SpecError where they do not fit."""
    tokenizer = tokenizer_of(datasets, spec.data.dataset)
    needed = VOCAB_SIZES[tokenizer]
    vocab_size = spec.model.vocab_size or needed
    if vocab_size < needed:
        message = (
            f"vocab_size {vocab_size} is too small: dataset {spec.data.dataset} uses the tokenizer "
            f"{tokenizer} of {needed} tokens; set {needed} or leave vocab_size out"
        )
        raise refusal("/model/vocab_size", message)
    model = spec.model.model_copy(update={"vocab_size": vocab_size})
    return spec.model_copy(update={"model": model})


def refuse_another_shape(
    source: str, model: ModelSpec, theirs: Mapping[str, Any], pointer: str = "/init_from/source",
    *, may_shorten: bool = False,
) -> None:  # fmt: skip
    """Raise SpecError with every field in which the model in `source` differs from ours.

    may_shorten: a model without learned positions may train at a shorter block_size than its context.
    """
    ours, shape = model.model_dump(), theirs.keys() - {"preset", "init"}
    differing = {field: theirs[field] for field in sorted(shape) if theirs[field] != ours.get(field)}
    context = differing.get("block_size")
    if may_shorten and model.position != "learned" and isinstance(context, int) and model.block_size < context:
        del differing["block_size"]
    if differing:
        listed = "; ".join(f"{field} is {shown(value)} there, {ours.get(field)!r} here"
                           for field, value in differing.items())  # fmt: skip
        why = f" ({_why_this_context(model, may_shorten)})" if "block_size" in differing else ""
        raise refusal(pointer, f"{source} is a model of another shape: {listed}; set them as there{why}")


def _why_this_context(model: ModelSpec, may_shorten: bool) -> str:
    if model.position == "learned":
        return "a learned position table has one row per position, so block_size cannot change"
    if may_shorten:
        return "block_size may be shorter than there, not longer"
    return "a run that resumes counts its data in windows of block_size, so it cannot change"


def refuse_another_run(spec: TrainSpec, init: InitSpec, theirs: Mapping[str, Any], step: int) -> None:
    """Raise SpecError if a run's checkpoint of `step` cannot be what `init` asks for; `theirs`: that run's spec."""
    refuse_another_shape(init.source, spec.model, theirs["model"], may_shorten=not init.optimizer)
    if init.optimizer and (name := theirs["optim"]["name"]) != spec.optim.name:
        why = f"name {spec.optim.name!r} has no use for the optimiser state of {init.source}, which is {name}'s"
        raise refusal("/optim/name", f"{why}; set {name}, or leave init_from.optimizer out")
    if init.optimizer and step >= spec.max_steps:
        why = f"max_steps {spec.max_steps} is not beyond {init.source}'s step {step}; set more steps"
        raise refusal("/max_steps", why)


def count_parameters(model: ModelSpec) -> Parameters:
    """Counts held to the real model's by a test."""
    assert model.vocab_size is not None
    d, f, kv = model.n_embd, model.n_hidden, model.n_kv_head * model.head_dim
    q = model.n_head * model.head_dim
    hidden = d * (q + 2 * kv) + q * d + (3 if model.mlp == "swiglu" else 2) * d * f
    norm_vectors = {"layernorm": 2, "rmsnorm": 1, "rmsnorm_plain": 0}[model.norm]
    per_norm = norm_vectors * d
    vectors = 2 * per_norm
    vectors += (q + 2 * kv + d) if model.attention_bias else 0
    vectors += (f * (2 if model.mlp == "swiglu" else 1) + d) if model.mlp_bias else 0
    vectors += 2 * norm_vectors * model.head_dim if model.qk_norm else 0
    outer = per_norm if model.norm_placement == "pre" else 0  # the last norm
    outer += per_norm if model.embed_norm else 0
    outer += model.block_size * d if model.position == "learned" else 0
    tables = 1 if model.tie_embeddings else 2
    inner = model.n_layer * (hidden + vectors) + outer
    return Parameters(
        exported=inner + tables * model.vocab_size * d, trained=inner + tables * model.padded_vocab_size * d,
        matmul=model.n_layer * hidden + model.padded_vocab_size * d, hidden_matrices=model.n_layer * hidden,
    )  # fmt: skip


def flops_per_token(model: ModelSpec, matmul_parameters: int, causal: bool) -> int:
    """Forward and backward: 6 N + 12 L H hd T, attention halved where only the causal part counts.

    N are the parameters that are multiplied with, as in PaLM (arXiv 2204.02311) and nanochat. nanoGPT's formula also
    counts the input table. Where that is not tied to the output it is a look-up without FLOPs, and nanoGPT's number is
    11 % to 21 % higher for our nanochat presets.
    """
    attention = 12 * model.n_layer * model.n_head * model.head_dim * model.block_size
    return 6 * matmul_parameters + (attention // 2 if causal else attention)


def plan(spec: TrainSpec, hardware: Hardware) -> Plan:
    """Derive every number of a resolved spec. Raises SpecError with all that is impossible."""
    model, world_size = spec.model, spec.world_size
    if problems := _problems(spec, hardware):
        raise SpecError(problems)
    micro_batch_size = _micro_batch_size(spec, hardware)
    counts = count_parameters(model)
    name, reason = native_class(model)
    flops = flops_per_token(model, counts.matmul, causal=False)
    total_tokens = spec.max_steps * spec.tokens_per_step
    peak = peak_memory_bytes(spec, micro_batch_size, hardware.device)
    planned = Plan(
        device=hardware.device, world_size=world_size, micro_batch_size=micro_batch_size,
        grad_accum_steps=spec.tokens_per_step // (micro_batch_size * model.block_size * world_size),
        tokens_per_step=spec.tokens_per_step, total_steps=spec.max_steps, total_tokens=total_tokens,
        parameters=counts.exported, parameters_trained=counts.trained, matmul_parameters=counts.matmul,
        flops_per_token=flops, flops_per_token_causal=flops_per_token(model, counts.matmul, causal=True),
        total_flops=float(flops) * total_tokens,
        checkpoint_bytes=_checkpoint_bytes(spec, counts), peak_memory_bytes=peak,
        native_class=name, not_exportable_because=reason, warnings=_warnings(spec, reason),
    )  # fmt: skip
    if not fits(spec, hardware, micro_batch_size):
        smaller = "model or block_size" if micro_batch_size == 1 else 'micro_batch_size or "auto"'
        way_out = f"use a smaller {smaller}" + (
            "" if spec.activation_checkpointing else ", or activation_checkpointing"
        )
        message = (
            f"micro_batch_size {micro_batch_size} needs about {peak / 2**30:.1f} GiB a rank; "
            f"{hardware.device_name} has {(hardware.memory_bytes or 0) / 2**30:.1f} GiB; {way_out}"
        )
        raise refusal("/model" if micro_batch_size == 1 else "/micro_batch_size", message)
    return planned


def fits(spec: TrainSpec, hardware: Hardware, micro_batch_size: int, share: float = 1.0) -> bool:
    """Whether the estimated peak takes at most that share of a GPU's memory, or all ranks' that of a machine; also
    where that is not known."""
    ranks = spec.resources.ranks_per_node if hardware.device == "cpu" else 1
    needed = ranks * peak_memory_bytes(spec, micro_batch_size, hardware.device)
    return hardware.memory_bytes is None or needed <= share * hardware.memory_bytes


def _problems(spec: TrainSpec, hardware: Hardware) -> list[Problem]:
    asked, problems = spec.resources, []
    if asked.device != "auto" and asked.device != hardware.device:
        message = f"device {asked.device} is not what pool {asked.pool} has; use {hardware.device} or auto"
        problems.append(Problem(pointer="/resources/device", message=message))
    if asked.ranks_per_node > hardware.ranks:
        what = "GPUs" if hardware.device == "cuda" else "CPU cores"
        message = (
            f"ranks_per_node {asked.ranks_per_node} is more than the largest slot of pool "
            f"{asked.pool} holds: {hardware.ranks} {what}; use {hardware.ranks} or fewer"
        )
        problems.append(Problem(pointer="/resources/ranks_per_node", message=message))
    block_size, world_size = spec.model.block_size, spec.world_size
    unit, factors = block_size * world_size, f"block_size {block_size} × ranks {world_size}"
    if spec.micro_batch_size != "auto":
        unit, factors = unit * spec.micro_batch_size, f"micro_batch_size {spec.micro_batch_size} × {factors}"
    if spec.tokens_per_step % unit:
        below = spec.tokens_per_step // unit * unit
        near = " or ".join(str(n) for n in (below, below + unit) if n)
        message = f"tokens_per_step {spec.tokens_per_step} is not a multiple of {factors} = {unit}; use {near}"
        problems.append(Problem(pointer="/tokens_per_step", message=message))
    return problems


def _micro_batch_size(spec: TrainSpec, hardware: Hardware) -> int:
    """The micro-batch asked for, or the largest divisor of a rank's share that fits."""
    if spec.micro_batch_size != "auto":
        return spec.micro_batch_size
    sequences = spec.tokens_per_step // (spec.model.block_size * spec.world_size)
    cap = GPU_MICRO_BATCH_TOKENS if hardware.device == "cuda" else CPU_MICRO_BATCH_TOKENS
    most = min(sequences, max(1, cap // spec.model.block_size))
    for size in (n for n in range(most, 0, -1) if sequences % n == 0):
        if fits(spec, hardware, size, share=0.9):
            return size
    return 1


def peak_memory_bytes(spec: TrainSpec, micro_batch_size: int, device: Literal["cpu", "cuda"] = "cuda") -> int:
    """A rank's peak, estimated: weights, gradients, optimiser state, one chunk of logits, and of each layer what the
    compiler keeps for the backward pass: both norms' outputs, all of attention's ends, the MLP's inner values and,
    in float32, the residual before each norm.

    Without the compiler, and on a CPU in any case, since a short run is not compiled there, more is kept: the constants
    above are measured. A CPU also holds the process itself.
    """
    model = spec.model
    counts = count_parameters(model)
    state_bytes = 4 + 4 + (8 if spec.optim.name == "adamw" else 4)
    width = 4 if spec.precision == "fp32" else 2
    q_and_k = (model.n_head + model.n_kv_head) * model.head_dim  # as wide as v and the output
    attention = (3 if model.qk_norm else 2) * q_and_k
    mlp = (3 if model.mlp == "swiglu" else 2) * model.n_hidden
    per_layer = width * (attention + 2 * model.n_embd + mlp) + 4 * 2 * model.n_embd
    per_token = model.n_layer * per_layer
    if spec.activation_checkpointing:
        per_token = 2 * per_layer + 4 * model.n_layer * model.n_embd
    per_token += 4 * 2 * model.n_embd
    tokens = micro_batch_size * model.block_size
    chunk = LOSS_CHUNK_ELEMENTS if device == "cpu" else GPU_LOSS_CHUNK_ELEMENTS
    logits = min(tokens * model.padded_vocab_size, chunk)
    if device == "cpu" or spec.compile is False:
        copies = EAGER_LOGITS + (EAGER_SOFTCAP_LOGITS if model.logit_softcap is not None else 0.0)
        activations = int(tokens * EAGER_ACTIVATIONS * per_token + 4 * copies * logits)
        process = PROCESS_BYTES if device == "cpu" else 0
        return process + counts.trained * (state_bytes + (width if width == 2 else 0)) + activations
    logits *= 2 * width
    return counts.trained * (state_bytes + (width if width == 2 else 0)) + tokens * per_token + logits


def _checkpoint_bytes(spec: TrainSpec, counts: Parameters) -> int:
    """Float32 weights and moments: two an AdamW parameter, one a Muon parameter."""
    muon = counts.hidden_matrices if spec.optim.name == "muon" else 0
    return 4 * (3 * (counts.trained - muon) + 2 * muon)


def _warnings(spec: TrainSpec, not_exportable_because: str) -> list[str]:
    found = []
    checkpoint_bytes = _checkpoint_bytes(spec, count_parameters(spec.model))
    if spec.evaluate.every_steps % spec.checkpoint.every_steps and checkpoint_bytes >= NOTABLE_CHECKPOINT_BYTES:
        found.append(
            f"each evaluation saves its weights too, {checkpoint_bytes / 2**30:.1f} GiB every "
            f"{spec.evaluate.every_steps} steps beside a checkpoint every {spec.checkpoint.every_steps}"
        )
    if not_exportable_because:
        found.append(
            f"no stock transformers class holds this model, so it cannot be exported: {not_exportable_because}"
        )
    if spec.optim.warmup_steps >= spec.max_steps:
        found.append(f"warmup_steps {spec.optim.warmup_steps} never ends within max_steps {spec.max_steps}")
    if spec.evaluate.every_steps > spec.max_steps:
        found.append("evaluation happens only once, at the end")
    return found


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device by its name, FLOP/s; None where it is not known."""
    if any(chip in device_name for chip in OTHER_CHIPS):
        return None
    whole_words = [name for name in PEAK_FLOPS if re.search(rf"(?<![\w]){name}(?![\w])(?! Ti)", device_name)]
    return PEAK_FLOPS[max(whole_words, key=len)] if whole_words else None
