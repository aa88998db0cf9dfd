"""From an attempt's events to the fields of its job."""

from collections import deque
from typing import Any

from gptcore import events
from worker.job import BestCheckpoint

RECENT_STEPS = 10  # that the shown speed is the mean of
HANG_STEPS = 20  # of the slowest so far: a silence in training that long is none of work


class Progress:
    """What one attempt's events say so far. `results`: the job's, of earlier attempts too."""

    def __init__(self, total_steps: int | None, results: dict[str, float] | None = None):
        self._total_steps = total_steps
        self.results = results or {}
        self._first: events.Step | None = None
        self._recent: deque[events.Step] = deque(maxlen=RECENT_STEPS)
        self._phase, self._slowest_seconds = "", 0.0
        self.outcome: events.Finished | events.Stopped | events.Failed | None = None

    @property
    def step(self) -> int:
        """The last step that this attempt reached; 0 before it made one."""
        return self._recent[-1].step if self._recent else 0

    def hang(self, silent_seconds: float, patience_seconds: float) -> str:
        """What to say of a trainer that was silent for so long; "" while it may be at work.

        Only steps are judged, by those before them: a compilation or an evaluation may take hours.
        """
        too_long = max(patience_seconds, HANG_STEPS * self._slowest_seconds)
        if self._phase != "training" or not self.step or silent_seconds < too_long:
            return ""
        slowest = f"the slowest before took {self._slowest_seconds:.3g} s"
        return f"no step for {silent_seconds:.0f} s after step {self.step}, {slowest}: it hangs; its log shows where"

    def take(self, event: events.EventBase) -> dict[str, Any]:
        """The job's fields that this event changes."""
        match event:
            case events.Started():
                self._total_steps = event.total_steps or self._total_steps
                return {"total_steps": self._total_steps}
            case events.PhaseChanged():
                self._phase = event.phase
                return {"phase": event.phase, "progress": event.progress}
            case events.Step():
                return self._step(event)
            case events.Evaluated() if event.best:
                return {"best_checkpoint": BestCheckpoint(step=event.step, val_loss=event.val_loss)}
            case events.BestReverted():
                if event.step is None or event.val_loss is None:
                    return {"best_checkpoint": None}
                return {"best_checkpoint": BestCheckpoint(step=event.step, val_loss=event.val_loss)}
            case events.Scored():
                self.results = self.results | event.results
                return {"results": self.results}
            case events.Verified():
                self.results = self.results | {f"publish_{name}": value for name, value in event.numbers.items()}
                return {"results": self.results}
            case events.Published():
                return {"published": event.model_dump(mode="json", exclude={"type", "attempt", "seq"})}
            case events.Checkpointed():
                return {"failures": 0}  # what is saved is not lost again: the count starts anew
            case events.Finished():
                self.outcome = event
                return {"progress": 1.0, "eta_seconds": 0.0}
            case events.Stopped() | events.Failed():
                self.outcome = event
        return {}

    def _step(self, event: events.Step) -> dict[str, Any]:
        self._first = self._first or event
        self._recent.append(event)
        self._slowest_seconds = max(self._slowest_seconds, event.step_seconds)
        total = self._total_steps
        rates = [step.tokens_per_second for step in self._recent]
        mfus = [step.mfu for step in self._recent if step.mfu is not None]
        return {
            "step": event.step, "tokens_seen": event.tokens, "progress": event.step / total if total else None,
            "tokens_per_second": sum(rates) / len(rates), "mfu": sum(mfus) / len(mfus) if mfus else None,
            "train_loss": event.train_loss,  # for monitoring
            "eta_seconds": self._seconds_per_step(event) * (total - event.step) if total else None,
        }  # fmt: skip

    def _seconds_per_step(self, event: events.Step) -> float:
        """By the wall clock since this attempt's first step: evaluations and checkpoints take part."""
        assert self._first is not None
        steps = event.step - self._first.step
        if steps < 1:  # none yet, or rolled back
            return event.step_seconds
        return (event.time - self._first.time).total_seconds() / steps
