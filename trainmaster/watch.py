"""A job followed in the terminal: progress, loss, tokens a second, time left."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

Event = Mapping[str, Any]
RECENT_STEPS = 50  # what the time left is reckoned from


class Follower:
    """What a job's events say so far, kept as a line of text and a share done."""

    def __init__(self, total_steps: int | None):
        self.total_steps = total_steps
        self.step = 0
        self.phase = "waiting"
        self.train_loss: float | None = None
        self.val_loss: float | None = None
        self.tokens_per_second: float | None = None
        self._recent: deque[tuple[int, datetime]] = deque(maxlen=RECENT_STEPS)

    def take(self, event: Event) -> str | None:
        """Learn from one event. Returns what is worth a line of its own."""
        match event["type"]:
            case "started":
                self.total_steps = event["total_steps"] or self.total_steps
                self._recent.clear()
                of = f", {event['parameters']:,} parameters" if event["parameters"] else ""
                return f"attempt {event['attempt']} on {event['device_name']}{of}"
            case "phase":
                self.phase = event["phase"]
            case "step":
                self.step, self.train_loss = event["step"], float(event["train_loss"])
                self.tokens_per_second = event["tokens_per_second"]
                self._recent.append((event["step"], datetime.fromisoformat(event["time"])))
            case "evaluated":
                self.val_loss = float(event["val_loss"])
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
        known = [
            ("loss {:.3f}", self.train_loss),
            ("val {:.3f}", self.val_loss),
            ("{:,.0f} tokens/s", self.tokens_per_second),
            ("{} left", self.seconds_left()),
        ]
        return "  ".join(text.format(value) for text, value in known if value is not None)

    def seconds_left(self) -> timedelta | None:
        """From the pace of the recent steps, evaluations and checkpoints between them included."""
        if len(self._recent) < 2 or not self.total_steps or self.step >= self.total_steps:
            return None
        (first, began), (last, ended) = self._recent[0], self._recent[-1]
        if last <= first:
            return None
        seconds = (ended - began).total_seconds() / (last - first) * (self.total_steps - last)
        return timedelta(seconds=round(seconds))


def follow(events: Iterable[Event], job: Event, console: Console) -> None:
    """Show a job's events until they end: a bar in a terminal, else a line an evaluation."""
    follower = Follower(job["total_steps"])
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[numbers]}")
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task(escape(job["name"]), total=job["total_steps"], numbers="")
        for event in events:
            if said := follower.take(event):
                console.print(f"  {escape(said)}", highlight=False)
            total, phase = follower.total_steps, f"{follower.phase:<13}"
            numbers = f"{follower.step}/{total or '?'}  {follower.numbers()}"
            progress.update(bar, total=total, completed=follower.step, description=phase, numbers=numbers)
