"""What is read from the end of a run's files, so that a long run starts as fast as a short one."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptcore import events, rundir
from gptcore.events import JsonlReport, last_event, read_lines, read_lines_backwards
from gptcore.rundir import RunDir
from tests.worker.fake_trainer import step_event


@pytest.mark.parametrize("block_bytes", [1, 7, 1 << 16])
def test_lines_are_read_backwards_as_they_are_forwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(events, "BLOCK_BYTES", block_bytes)
    file = tmp_path / "events.jsonl"
    for text in ("", "\n", "torn", "one\n", "one\n\nthree, the \u00e4lteste\n", "one\ntwo\ntorn"):
        file.write_text(text)
        assert [*read_lines_backwards(file)] == [*read_lines(file)][::-1], text


def test_a_report_goes_on_after_the_last_whole_line(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    for torn in ("", '{"type": "st', "{damaged\n", ""):
        report = JsonlReport(file, 1)
        report(step_event(1))
        report.close()
        with file.open("a") as more:
            more.write(torn)
    assert [line.partition('"seq":')[2][:1] for _, line in read_lines(file)] == ["1", "2", "3", "", "5"]
    assert last_event(file).seq == 5 and last_event(tmp_path / "none") is None


def test_losses_after_a_checkpoint_are_read_without_the_steps_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    for number, steps in ((1, range(1, 101)), (2, range(91, 96)), (3, range(91, 93))):
        report = JsonlReport(run.claim_attempt().events, number)
        for step in steps:
            report(step_event(step).model_copy(update={"train_loss": float(number)}))
        report.close()
    parsed: list[str] = []
    parse = events.parse_event
    monkeypatch.setattr(rundir, "parse_event", lambda line: parsed.append(line) or parse(line))
    expected = dict.fromkeys(range(91, 101), 1.0) | dict.fromkeys(range(91, 96), 2.0)
    assert run.losses_after(90, before_attempt=3) == expected
    assert len(parsed) == 5 + 10 + 1
