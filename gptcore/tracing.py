"""A torch.profiler trace of some steps: `profile_steps` in the spec."""

from pathlib import Path

from torch.profiler import profile


class Tracer:
    """Traces this rank from before step `first` until after step `last`, then writes one file."""

    def __init__(self, steps: tuple[int, int] | None, path: Path):
        self._steps, self.path = steps, path
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Call with the number of the step about to run."""
        if self._steps and step == self._steps[0]:
            self._profile = profile(profile_memory=True)  # of the CPU, and of the GPU where there is one
            self._profile.__enter__()

    def after(self, step: int) -> bool:
        """Call with the number of the step just run; True once the trace has been written."""
        return self._steps is not None and step >= self._steps[1] and self.close()

    def close(self) -> bool:
        """End a trace under way; whether there was one."""
        if self._profile is None:
            return False
        self._profile.__exit__(None, None, None)
        self.path.parent.mkdir(exist_ok=True)
        self._profile.export_chrome_trace(str(self.path))
        self._profile = None
        return True
