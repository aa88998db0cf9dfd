"""Losses and gradients, compiled and eager, in each precision, against float64's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.table import Row
from benchmarks.training import Case, Stepper

# |g - g64| / |g64| of a tensor, where |g64| counts as at least a tenth of what its size would have on average:
# the gradient of a key's bias is nothing but rounding where no rotation follows
SMALLEST = 0.1
FP32_TOLERANCE = 1e-4
BF16_LOSS_TOLERANCE, BF16_TOLERANCE = 2e-2, 0.1
COMPILED_FACTOR, COMPILED_MARGIN = 1.5, 0.01  # compiled may be off by so much more than eager is


def errors(case: Case) -> list[Row]:
    """Two rows a precision and mode: the worst tensor's gradient, and the loss."""
    truth, rows = gradients(case, "float64", compiled=False), []
    for dtype in ("float32", "bfloat16"):
        most_loss, most = (
            (FP32_TOLERANCE, FP32_TOLERANCE) if dtype == "float32" else (BF16_LOSS_TOLERANCE, BF16_TOLERANCE)
        )
        for compiled in (False, True):
            loss_error, worst, tensor = _errors(gradients(case, dtype, compiled), truth)
            what = f"{dtype} {'compiled' if compiled else 'eager'}"
            rows.append({"what": f"{what}: worst gradient ({tensor})", "value": worst, "unit": "relative",
                         "target": f"≤ {most:.2g}", "met": worst <= most})  # fmt: skip
            rows.append({"what": f"{what}: loss", "value": loss_error, "unit": "nats",
                         "target": f"≤ {most_loss:.2g}", "met": loss_error <= most_loss})  # fmt: skip
            margin = COMPILED_MARGIN if dtype == "bfloat16" else most
            most = min(most, COMPILED_FACTOR * worst + margin)  # compiled, which comes next
    return rows


def gradients(case: Case, dtype: str, compiled: bool) -> tuple[float, dict[str, Any]]:
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
