"""Parameter groups, the learning rate's schedule, and Muon with its work shared by the ranks."""

import math
from collections import defaultdict
from collections.abc import Iterable
from inspect import unwrap
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor, nn

from gptcore.device import multiplies_bf16
from gptcore.dist import Dist
from gptcore.model import GPT
from gptcore.spec import OptimSpec

Optimizers = list[torch.optim.Optimizer]
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024
MUON_FIRST_MOMENTUM = 0.85


def lr_factor(step: int, optim: OptimSpec, max_steps: int) -> float:
    """What the peak rates are multiplied with for update number `step` (from 0).

    The cosine's last update has min_lr. The line of wsd would reach it one update after the last: with min_lr 0 the
    last update is not lost.
    """
    if step < optim.warmup_steps:
        return optim.warmup_from + (1 - optim.warmup_from) * (step + 1) / optim.warmup_steps
    floor = optim.min_lr / optim.lr
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "wsd":
        cooldown_steps = max(1, round(optim.cooldown_fraction * max_steps))
        left = min(1.0, (max_steps - step) / cooldown_steps)
        return floor + (1 - floor) * left
    done = (step - optim.warmup_steps) / max(1, max_steps - 1 - optim.warmup_steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_lr(optimizers: Optimizers, step: int, optim: OptimSpec, max_steps: int) -> float:
    """Set every group's rate (and Muon's momentum) for update `step`; returns AdamW's base rate."""
    factor = lr_factor(step, optim, max_steps)
    warmup_steps = optim.muon_momentum_warmup_steps
    warmed = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    for group in (g for o in optimizers for g in o.param_groups):
        group["lr"] = group["peak_lr"] * factor
        if "momentum" in group:
            group["momentum"] = MUON_FIRST_MOMENTUM + warmed * (optim.muon_momentum - MUON_FIRST_MOMENTUM)
    return optim.lr * factor


def parameter_groups(model: GPT, optim: OptimSpec) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """AdamW's groups and Muon's: every parameter once. Matrices decay; vectors do not."""
    tables = {id(model.wte.weight)} | ({id(model.wpe.weight)} if model.wpe is not None else set())
    kinds: dict[str, list[Tensor]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.dim() < 2:
            kinds["vectors"].append(parameter)
        elif id(parameter) in tables:
            kinds["tables"].append(parameter)
        elif parameter is model.lm_head.weight:
            kinds["head"].append(parameter)
        else:
            kinds["hidden"].append(parameter)
    rates = {"tables": optim.embed_lr or optim.lr, "head": optim.head_lr or optim.lr}
    adamw = [
        {"params": parameters, "peak_lr": rates.get(kind, optim.lr),
         "weight_decay": 0.0 if kind == "vectors" else optim.weight_decay}
        for kind, parameters in kinds.items()
        if not (kind == "hidden" and optim.name == "muon")
    ]  # fmt: skip
    muon = [{"params": kinds["hidden"], "peak_lr": optim.muon_lr, "weight_decay": optim.muon_weight_decay}]
    return adamw, muon if optim.name == "muon" else []


def build_optimizers(model: GPT, optim: OptimSpec, dist: Dist) -> Optimizers:
    """AdamW for all parameters, or AdamW and Muon, as the spec says."""
    adamw, muon = parameter_groups(model, optim)
    built: Optimizers = [AdamW(adamw, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)]
    if muon:
        built.append(Muon(muon, lr=optim.muon_lr, momentum=optim.muon_momentum, beta2=optim.muon_beta2, dist=dist))
    return built


def update(optimizers: Optimizers, grad_scale: Tensor | None) -> None:
    """One step of each; the gradients, gone after it, are divided by grad_scale () where there is one.

    The optimisers divide as they read, so that clipping costs no pass over the gradients of its own.
    """
    for optimizer in optimizers:
        optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class Eager(torch.optim.Optimizer):
    """torch's, whose methods load torch.compile's front end to hide themselves from it: see `gptcore.compiler`."""

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(Eager, torch.optim.AdamW):
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


class Muon(Eager):
    """Momentum, orthogonalised (Jordan et al. 2024), for the hidden matrices; with `beta2` each neuron's part of it
    is divided by the root of its mean square so far, and the whole is as large as before (NorMuon, Li et al. 2025).

    Each matrix has an owner rank that alone keeps its moments and computes its update; the new
    weights are then shared. Matrices of one shape are orthogonalised in one batch. Owners have about equal work.
    """

    grad_scale: Tensor | None = None  # what gradients are divided by, as in torch's fused AdamW

    def __init__(
        self, params: Iterable[Any], *, lr: float, momentum: float, dist: Dist, weight_decay: float = 0.0,
        beta2: float | None = None,
    ):  # fmt: skip
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._dist, self._beta2 = dist, beta2
        self._owners = {
            parameter: rank
            for group in self.param_groups
            for parameter, rank in zip(
                group["params"], share_evenly([_work(p) for p in group["params"]], dist.world_size), strict=True
            )
        }
        # bfloat16 suffices, but a CPU that cannot multiply it imitates it, up to 15 times slower
        self._dtype = torch.bfloat16 if multiplies_bf16(dist.device) else torch.float32

    def owner(self, parameter: Tensor) -> int:
        """Return the rank that updates this matrix."""
        return self._owners[parameter]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if self.owner(parameter) == self._dist.rank:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)
            self._share(group["params"])

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        grads = [p.grad for p in parameters if p.grad is not None]
        assert len(grads) == len(parameters), "a hidden matrix without a gradient"
        if self.grad_scale is not None:
            torch._foreach_div_(grads, self.grad_scale)
        moments = [self.moments(p) for p in parameters]
        buffers = [each["momentum_buffer"] for each in moments]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        nesterov = torch._foreach_lerp(grads, buffers, momentum)
        updates = orthogonalise(torch.stack(nesterov), self._dtype).to(parameters[0].dtype)
        if self._beta2 is not None:
            updates = _even_out(updates, [each["mean_squares"] for each in moments], self._beta2)
        rows, columns = parameters[0].shape
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, updates.unbind(), alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the owner's state of a matrix, made when it is first asked for."""
        state: dict[str, Tensor] = self.state[parameter]
        if len(state) < (1 if self._beta2 is None else 2):
            state.update(self.no_moments(parameter) | state)
        return state

    def no_moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Its state before the first update; mean squares are of a matrix's rows, of a wide one's columns."""
        none = {"momentum_buffer": torch.zeros_like(parameter)}
        if self._beta2 is not None:
            none["mean_squares"] = torch.zeros_like(parameter.mean(_within_neurons(parameter), keepdim=True))
        return none

    def _share(self, parameters: list[Tensor]) -> None:
        if self._dist.world_size == 1:
            return
        sent = [c10d.broadcast(p.data, src=self.owner(p), async_op=True) for p in parameters]
        for work in sent:
            work.wait()


def _work(matrix: Tensor) -> int:
    """Return the multiplications of a Newton–Schulz step: two products with the longer side, one without."""
    short, long = sorted(matrix.shape)
    return short * short * (2 * long + short)


def share_evenly(work: list[int], ranks: int) -> list[int]:
    """Return a rank for each piece of work: the largest first, each to the rank that has the least so far."""
    owners, loads = [0] * len(work), [0] * ranks
    for index in sorted(range(len(work)), key=lambda i: -work[i]):
        owners[index] = min(range(ranks), key=loads.__getitem__)
        loads[owners[index]] += work[index]
    return owners


def _within_neurons(matrices: Tensor) -> int:
    """The dimension to average over: the shorter side of an orthogonalised matrix has equal parts already."""
    return -1 if matrices.shape[-2] >= matrices.shape[-1] else -2


def _even_out(updates: Tensor, mean_squares: list[Tensor], beta2: float) -> Tensor:
    """updates (N, rows, columns) float32 → the same, each neuron's by its own history; changes `mean_squares`."""
    squares = updates.square().mean(_within_neurons(updates), keepdim=True)
    torch._foreach_lerp_(mean_squares, squares.unbind(), 1 - beta2)
    even = updates / torch.stack(mean_squares).sqrt().clamp(min=1e-7)
    before, after = (matrices.norm(dim=(-2, -1), keepdim=True) for matrices in (updates, even))
    return even * (before / after.clamp(min=1e-7))


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """matrices (N, rows, columns) → about U Vᵀ of each, in dtype, by five Newton–Schulz steps."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


# What is saved: tensors by parameter name, so that another number of ranks can take them up.


def optimizer_tensors(model: nn.Module, optimizers: Optimizers, dist: Dist) -> dict[str, Tensor]:
    """Every state tensor as "{parameter}|{state}", on rank 0; the other ranks get {}. All must call."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if isinstance(optimizer, Muon) and (owner := optimizer.owner(parameter)) != 0:
                    if dist.rank == owner:
                        moments = optimizer.moments(parameter)
                        _send([moments[name] for name in optimizer.no_moments(parameter)])  # in the receiver's order
                    state = _receive(optimizer.no_moments(parameter), owner) if dist.first else {}
                tensors |= {f"{names[parameter]}|{key}": value for key, value in state.items()}
    return tensors if dist.first else {}


def _send(moments: list[Tensor]) -> None:
    for moment in moments:
        c10d.send(moment, 0)


def _receive(moments: dict[str, Tensor], owner: int) -> dict[str, Tensor]:
    """Return what the owner sends, in the CPU's memory: together the moments may be more than a GPU has room for."""
    for moment in moments.values():
        c10d.recv(moment, owner)
    return {name: moment.cpu() for name, moment in moments.items()}


def load_optimizer_tensors(model: nn.Module, optimizers: Optimizers, dist: Dist, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` gave; Muon's buffers go to their owners of now."""
    saved: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        name, _, state = key.partition("|")
        saved[name][state] = value
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if isinstance(optimizer, Muon) and optimizer.owner(parameter) != dist.rank:
                    continue
                optimizer.state[parameter] = {
                    key: value.to(parameter.device, copy=True) for key, value in saved[names[parameter]].items()
                }
