"""A job followed in the terminal: progress, loss, tokens a second, time left."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from gptcore.events import EVENT
from worker import progress

Event = Mapping[str, Any]
CONTEXT_EVENTS = 200  # shown before what comes: a long run's events take hundreds of megabytes
KNOWN = ("step", "phase", "train_loss", "tokens_per_second", "eta_seconds")  # fields of a job that a follower has too
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


class Follower:
    """What a job's events say so far, kept as a line of text and a share done."""

    def __init__(self, total_steps: int | None):
        self._progress = progress.Progress(total_steps)
        # of the job, as its worker keeps them, and the newest losses
        self.fields: dict[str, Any] = {"total_steps": total_steps, "step": 0, "phase": "waiting"}

    def take(self, event: Event) -> str | None:
        """Learn from one event. Returns what is worth a line of its own."""
        if event["type"] == "started":  # a new attempt has a pace of its own
            self._progress = progress.Progress(self.fields["total_steps"])
        with suppress(ValidationError):  # a change of status, or a newer trainer's
            self.fields |= self._progress.take(EVENT.validate_python(event))
        match event["type"]:
            case "started":
                of = f", {event['parameters']:,} parameters" if event["parameters"] else ""
                return f"attempt {event['attempt']} on {event['device_name']}{of}"
            case "evaluated":
                self.fields["val_loss"] = float(event["val_loss"])
                return f"step {event['step']}: {self.numbers()}"
            case "scored":
                results = ", ".join(f"{name} {float(value):.4f}" for name, value in event["results"].items())
                return f"step {event['step']}: {results}"
            case "published":
                return f"published {event['url']}, {event['tag']}"
            case "notice" | "failed":
                return str(event["message"])
            case "skipped" | "rolled_back":
                return f"step {event.get('step', event.get('to_step'))}: {event['type']} ({event['reason']})"
            case "resumed":
                return f"resumed at step {event['step']}"
        return None

    def numbers(self) -> str:
        """Losses in nats a token, speed, time left: as much as is known."""
        left = self.fields.get("eta_seconds")
        known = [
            ("loss {:.3f}", self.fields.get("train_loss")),
            ("val {:.3f}", self.fields.get("val_loss")),
            ("{:,.0f} tokens/s", self.fields.get("tokens_per_second")),
            ("{} left", timedelta(seconds=round(left)) if left else None),
        ]
        return "  ".join(text.format(value) for text, value in known if value is not None)


def follow(events: Iterable[Event], job: Event, console: Console) -> None:
    """Show a job's events until they end: a bar in a terminal, else a line an evaluation."""
    follower = Follower(job["total_steps"])
    follower.fields |= {name: job[name] for name in KNOWN if job.get(name) is not None}
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[numbers]}")
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        bar = bars.add_task(escape(job["name"]), total=job["total_steps"], numbers="")
        for event in events:
            if said := follower.take(event):
                console.print(f"  {escape(said)}", highlight=False)
            step, total = follower.fields["step"], follower.fields["total_steps"]
            numbers, phase = f"{step}/{total or '?'}  {follower.numbers()}", f"{follower.fields['phase']:<13}"
            bars.update(bar, total=total, completed=step, description=phase, numbers=numbers)
