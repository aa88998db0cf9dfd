"""Plans and jobs as people read them in a terminal."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

STYLES = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "running": "cyan"}


def facts(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Two columns: what, and how much of it."""
    table = Table(title=title, title_justify="left", box=SIMPLE, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for what, value in rows:
        table.add_row(what, Text(value))  # Text: names may hold brackets, which are no markup
    return table


def plan_table(planned: Mapping[str, Any]) -> Table:
    plan, title = planned["plan"], f"plan of {planned['spec']['name']}"
    if plan is None:  # only training has numbers that follow from its spec
        return facts(title, [("plan", f"{planned['spec']['kind']} jobs need none: submit it")])
    ranks = f"{plan['world_size']} × {plan['device']}"
    batch = f"{plan['micro_batch_size']} sequences × {plan['grad_accum_steps']} accumulated × {ranks}"
    rows = [
        ("parameters", f"{plan['parameters']:,}"),
        ("steps", f"{plan['total_steps']:,} of {plan['tokens_per_step']:,} tokens"),
        ("tokens", f"{plan['total_tokens']:,} ({plan['total_tokens'] / plan['parameters']:.1f} a parameter)"),
        ("a step", batch),
        ("compute", f"{plan['total_flops']:.2e} FLOPs, {plan['flops_per_token']:,} a token"),
        ("memory", f"{size(plan['peak_memory_bytes'])} a rank at most, estimated"),
        ("checkpoint", size(plan["checkpoint_bytes"])),
        *_estimate_rows(plan.get("estimate")),
        ("exports as", plan["native_class"] or f"nothing: {plan['not_exportable_because']}"),
        *(("warning", warning) for warning in plan["warnings"]),
    ]
    return facts(title, rows)


def _estimate_rows(estimate: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if not estimate:
        return []
    of = f"from {estimate['past_runs']} runs like it" if estimate["past_runs"] else "from the hardware alone"
    hours = {name: value / 3600 for name, value in estimate["seconds"].items()}
    rows = [("time", f"{hours['expected']:,.2f} h ({hours['low']:,.2f} to {hours['high']:,.2f}), {of}")]
    if cost := estimate["cost"]:
        rows.append(("cost", f"{cost['expected']:,.2f} ({cost['low']:,.2f} to {cost['high']:,.2f})"))
    return rows


def job_table(job: Mapping[str, Any]) -> Table:
    best, error = job["best_checkpoint"], job["error"]
    status = ": ".join(filter(None, [job["status"], job["status_reason"] or job["phase"]]))
    # where the user's mistake is named, the trainer's traceback only hides it; `trainmaster logs` has it
    log = error["log"] if error and error["reason"] != "user_error" else []
    rows = [
        ("id", job["id"]),
        ("status", status),
        ("steps", f"{job['step']}/{job['total_steps']}" if job["total_steps"] else ""),
        ("attempt", str(job["attempt"])),
        ("best", f"val loss {best['val_loss']:.4f} at step {best['step']}" if best else ""),
        *((name, f"{float(value):.4f}") for name, value in job["results"].items()),
        ("published", f"{job['published']['url']} at {job['published']['tag']}" if job["published"] else ""),
        ("parent", job["parent_job_id"] or ""),
        ("speed", f"{job['tokens_per_second']:,.0f} tokens/s" if job["tokens_per_second"] else ""),
        ("left", f"{job['eta_seconds']:,.0f} s" if job["eta_seconds"] else ""),
        ("queue", f"position {job['queue_position']}" if job["queue_position"] else ""),
        ("labels", ", ".join(f"{k}={v}" for k, v in job["labels"].items())),
        *((what, moment(job[f"{what}_at"])) for what in ("created", "started", "finished")),
        ("error", "\n".join([f"{error['reason']}: {error['message']}", *log]) if error else ""),
    ]
    return facts(job["name"], [(what, value) for what, value in rows if value])


def jobs_table(page: Mapping[str, Any]) -> Table:
    table = Table(box=SIMPLE, padding=0, collapse_padding=True)  # a name must have room in eighty columns
    for heading in ("id", "name", "kind", "status", "step", "val loss", "created"):
        table.add_column(heading, no_wrap=heading != "name", overflow="fold")
    for job in page["data"]:
        best = job["best_checkpoint"]
        table.add_row(
            job["id"], Text(job["name"]), job["kind"], Text(job["status"], style=STYLES.get(job["status"], "")),
            f"{job['step']}/{job['total_steps']}" if job["total_steps"] else "",
            f"{best['val_loss']:.4f}" if best else "",
            moment(job["created_at"], "%m-%d %H:%M"),
        )  # fmt: skip
    return table


def workers_table(nodes: Iterable[Mapping[str, Any]]) -> Table:
    table = Table("node", "pool", "is", "slot", "offers", "job", box=SIMPLE)
    for node in nodes:
        state = ("live" if node["schedulable"] else "drained") if node["live"] else "gone"
        for slot in node["slots"]:
            offers = f"{slot['hardware']['ranks']} × {slot['hardware']['device_name']}"
            table.add_row(node["id"], node["pool"], state, slot["id"], offers, slot["job_id"])
    return table


def keys_table(keys: Iterable[Mapping[str, Any]]) -> Table:
    table = Table("id", "name", "scope", "created", box=SIMPLE)
    for key in keys:
        table.add_row(key["id"], Text(key["name"]), key["scope"], moment(key["created_at"]))
    return table


def moment(time: str | None, style: str = "%Y-%m-%d %H:%M:%S") -> str:
    """An API time, in the reader's own zone."""
    return datetime.fromisoformat(time).astimezone().strftime(style) if time else ""


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("the last unit takes all")
