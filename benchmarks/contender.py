"""A case in a process of its own: it compiles beside the others, and is measured while they wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.gradients import errors
from benchmarks.table import ROOT
from benchmarks.training import Case, Stepper

WARMUP_STEPS, TIMED_STEPS = 1, 4
COMPILE_THREADS = 4  # of each process: they compile at the same time


class Contender:
    """What it does for each word it is told."""

    def __init__(self, case: Case):
        self.case = case

    def answer(self, word: str) -> dict[str, Any]:
        try:
            return {"warm": self._warm, "time": self._time, "errors": lambda: {"rows": errors(self.case)}}[word]()
        except RuntimeError as error:  # torch.OutOfMemoryError, or CUDA's own where not even a context fits
            if self.case.device == "cpu" or "out of memory" not in str(error):
                raise
            return {"out_of_memory": True}

    def _warm(self) -> dict[str, Any]:
        self.stepper = Stepper(self.case)
        first = float(self.stepper.step())
        self.stepper.seconds(WARMUP_STEPS)
        return {"loss": first}

    def _time(self) -> dict[str, Any]:
        import torch

        self.stepper.seconds(WARMUP_STEPS)
        gpu = self.case.device == "cuda"
        return {
            "seconds": self.stepper.seconds(TIMED_STEPS),
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if gpu else None,
            "synchronisations": self.stepper.synchronisations(),
        }


class Here:
    """A contender in this process."""

    def __init__(self, case: Case):
        self.case, self._contender = case, Contender(case)

    def tell(self, word: str) -> None:
        self._said = self._contender.answer(word)

    def listen(self) -> dict[str, Any]:
        return self._said

    def close(self) -> None:
        pass


class Apart:
    """A contender in another process, told by lines and answering by lines of JSON."""

    def __init__(self, case: Case):
        self.case = case
        command = [sys.executable, __file__, json.dumps(asdict(case))]
        environment = {"TORCHINDUCTOR_COMPILE_THREADS": str(COMPILE_THREADS)} | os.environ
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )

    def tell(self, word: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def listen(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):  # a library may have said something too
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"{self.case} ended with {self._process.wait()}")

    def close(self) -> None:
        self._process.communicate()


def contender(case: Case) -> Here | Apart:
    """Toys are not worth a process, unless each library needs its own."""
    return Here(case) if case.tiny and case.who == "ours" else Apart(case)


if __name__ == "__main__":
    told = Contender(Case(**json.loads(sys.argv[1])))
    for word in sys.stdin:
        print(json.dumps(told.answer(word.strip())), flush=True)
