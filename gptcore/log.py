"""What the first rank says: events to the file, a line for each to the log."""

from gptcore.events import Evaluated, EventBase, JsonlReport, Report, Scored, Step
from gptcore.rundir import Attempt


def reporter(attempt: Attempt, first: bool) -> Report:
    """Rank 0 keeps the events and prints a line for each; the others are silent."""
    if not first:
        return lambda event: None
    keep = JsonlReport(attempt.events, attempt.number)

    def report(event: EventBase) -> None:
        keep(event)
        print(_line(event), flush=True)  # noqa: T201 - the log

    return report


def _line(event: EventBase) -> str:
    match event:
        case Step():
            return (
                f"step {event.step} | loss {event.train_loss:.4f} | lr {event.lr:.2e} | norm {event.grad_norm:.2f} "
                f"| {1000 * event.step_seconds:.0f} ms | {event.tokens_per_second:,.0f} tok/s"
            )
        case Evaluated():
            mark = " best" if event.best else ""
            return f"step {event.step} | val_loss {event.val_loss:.4f} | {event.bits_per_byte:.4f} bits/byte{mark}"
        case Scored():
            return f"step {event.step} | " + " | ".join(f"{name} {value:.4f}" for name, value in event.results.items())
        case _:
            fields = event.model_dump(mode="json", exclude={"type", "attempt", "seq", "time"})
            said = " | ".join(f"{key} {value}" for key, value in fields.items() if value not in ("", None))
            return f"{getattr(event, 'type', '')} | {said}"
