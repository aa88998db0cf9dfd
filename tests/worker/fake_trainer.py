"""A trainer's outside without its inside: events, stop file, processes. The spec's labels say how it behaves."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from gptcore import events
from gptcore.locks import shared
from gptcore.procs import die_with_parent
from gptcore.rundir import Attempt, RunDir
from gptcore.spec import TrainSpec, read_spec

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"


def step_event(step: int) -> events.Step:
    return events.Step(
        step=step,
        tokens=step * 256,
        train_loss=5.0 / step,
        lr=0.001,
        grad_norm=1.0,
        step_seconds=0.02,
        tokens_per_second=12800.0,
        data_wait_seconds=0.0,
    )


def follow(attempt: Attempt, labels: dict[str, str], rank: int) -> None:
    """A further node's ranks: they end when the first one's do."""
    for _ in range(3000):
        if labels.get("member_dies", "") >= str(attempt.number):
            sys.exit(1)
        lines = [line for _, line in events.read_lines(attempt.events)] if attempt.events.exists() else []
        if lines and isinstance(events.parse_event(lines[-1]), events.TERMINAL):
            return
        time.sleep(0.02)


def main() -> None:
    die_with_parent()
    faulthandler.register(signal.SIGUSR1)
    run, number = RunDir(Path(sys.argv[1])), int(sys.argv[3])
    spec = read_spec(run.spec)
    assert isinstance(spec, TrainSpec)
    attempt, labels = run.attempt(number), spec.labels
    if (rank := int(sys.argv[5])) > 0:
        with shared(attempt.lock):
            follow(attempt, labels, rank)
        return
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append("pause"))
    report = events.JsonlReport(attempt.events, number)
    with shared(attempt.lock):
        print(f"attempt {number} says hello", flush=True)
        if "stubborn_child" in labels:
            subprocess.Popen([sys.executable, "-c", STUBBORN], start_new_session=True)
        for path in sorted(run.checkpoints.glob("*")):
            report(events.Notice(message=f"resumed from {path.name}"))
        for step in range(1, spec.max_steps + 1):
            report(step_event(step))
            if step == 3 and labels.get("save", "") >= str(number):
                run.checkpoints.mkdir(exist_ok=True)
                (run.checkpoints / "step-3").touch()
                report(events.Checkpointed(step=3, path="step-3", bytes=0, seconds=0.0))
            if step == 3 and labels.get("hangs", "") >= str(number):
                report(events.PhaseChanged(phase="training"))
                time.sleep(1000)
            if step == 3 and "fails" in labels:
                report(events.Failed.model_validate({"reason": labels["fails"], "message": "as it was told"}))
                sys.exit(1)
            if step == 3 and "another_rank_fails" in labels:
                failed = events.Failed.model_validate(
                    {"reason": labels["another_rank_fails"], "message": "no room", "rank": 1}
                )
                attempt.leave_word(1, failed)
                with attempt.events.open("a") as torn:
                    torn.write('{"type": "st')
                    torn.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
            if step == 3 and labels.get("dies", "") >= str(number):
                print("the last words", flush=True)
                sys.exit(1)
            word = attempt.stop.read_text() if attempt.stop.exists() else (told or [""])[0]
            if word and "no_room_at_the_end" in labels:
                report(events.Failed(reason="disk_full", message="no room"))
                sys.exit(1)
            if word and "deaf" not in labels:
                report(events.Stopped.model_validate({"step": step, "reason": word}))
                return
            time.sleep(0.02)
        report(events.Finished(step=spec.max_steps, seconds=1.0))


if __name__ == "__main__":
    main()
