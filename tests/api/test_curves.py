"""The columns beside a run's events: derived, so whatever happens to them the curves stay those of the events."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from api.series import Run, RunCache
from gptcore import curves
from gptcore.events import Evaluated, JsonlReport, Sampled, Scored, Step
from gptcore.rundir import Attempt, RunDir


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "BLOCK_BYTES", 4096)  # some ten steps


def step(number: int, **fields: Any) -> Step:
    values: dict[str, Any] = {
        "tokens": number, "train_loss": 1 / number, "lr": 0.1, "grad_norm": 1.0, "step_seconds": 0.1,
        "tokens_per_second": 1.0, "data_wait_seconds": 0.0,
    }  # fmt: skip
    return Step.model_validate({"step": number} | values | fields)


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    """Of 100 steps, with something of everything between them."""
    attempt = RunDir(tmp_path / "job").attempt(1)
    attempt.path.mkdir(parents=True)
    report = JsonlReport(attempt.events, 1)
    for number in range(1, 101):
        report(step(number, grad_norm=math.nan if number == 30 else 2.0, mfu=0.4 if number % 2 else None))
        if number % 10 == 0:
            report(
                Evaluated(
                    step=number, tokens=1, val_loss=5 / number, bits_per_byte=1, eval_tokens=1, best=True, seconds=1
                )
            )
    report(step(90, train_loss=7.0))  # rolled back: the newer value counts
    report(Scored(step=100, task="hellaswag", results={"hellaswag_acc": 0.5}, seconds=1))
    report(Sampled(step=50, prompt="a", text="b"))
    report.close()
    return attempt


def read(attempt: Attempt) -> str:
    run = Run(attempt.path.parent.parent)
    return run.metrics().model_dump_json() + json.dumps([one.text for one in run.samples()])


def test_a_run_reads_the_same_from_its_columns_as_from_its_events(attempt: Attempt) -> None:
    first = read(attempt)
    assert len(curves.stored_blocks(attempt)) > 5
    with attempt.events.open("r+b") as file:
        file.write(b"\n" * 8000)  # had the first blocks been parsed again, this would show
    assert read(attempt) == first
    assert '"hellaswag_acc"' in first and '"NaN"' in first


def test_a_launcher_stores_the_columns_while_the_run_goes_on(attempt: Attempt) -> None:
    after, ends = 0, []
    while (end := curves.extend(attempt, after)) != after:
        after = end
        ends.append(end)
    assert [block.summary.end for block in curves.stored_blocks(attempt)] == ends
    size = attempt.curves.stat().st_size
    stored = read(attempt)
    assert attempt.curves.stat().st_size == size  # the reader adds no block twice
    attempt.curves.unlink()
    assert read(attempt) == stored


@pytest.mark.parametrize("harm", ["torn", "zeros", "garbage", "directory", "empty", "of other events"])
def test_damaged_columns_are_made_again_from_the_events(attempt: Attempt, harm: str) -> None:
    first = read(attempt)
    content = attempt.curves.read_bytes()
    block = curves.stored_blocks(attempt)[2]
    match harm:
        case "torn":
            attempt.curves.write_bytes(content[: block.file_end - 100])
        case "zeros":
            attempt.curves.write_bytes(content[: block.columns_at] + bytes(len(content) - block.columns_at))
        case "garbage":
            attempt.curves.write_bytes(b"x" * 1000 + content)
        case "directory":
            attempt.curves.write_bytes(content.replace(b'"samples"', b'"simples"'))
        case "empty":
            attempt.curves.write_bytes(b"")
        case "of other events":
            events = attempt.events.read_text()
            attempt.events.write_text(events.replace("0.1,", "0.3,"))
            attempt.curves.unlink()
            first = read(attempt)
            attempt.curves.write_bytes(content)
    assert read(attempt) == first
    assert read(attempt) == first  # and what was stored meanwhile is whole


def test_columns_that_cannot_be_stored_stay_in_memory(attempt: Attempt) -> None:
    attempt.curves.mkdir()  # not even root can write a file there
    in_memory = read(attempt)
    assert curves.stored_blocks(attempt) == []
    attempt.curves.rmdir()
    assert read(attempt) == in_memory


def test_curves_take_no_more_memory_than_their_budget(attempt: Attempt, tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"job-{number}").symlink_to(tmp_path / "job")
    runs = RunCache(tmp_path, budget=20_000)
    answers = {runs(f"job-{number}").metrics().model_dump_json().partition(",")[2] for number in range(10)}
    assert len(answers) == 1
    kept = [runs(f"job-{number}").memory for number in range(10)]
    assert 0 < sum(kept) <= 20_000
    for number in range(10):
        runs(f"job-{number}").sparkline()
    kept = [runs(f"job-{number}").memory for number in range(10)]
    assert 0 < sum(kept) <= 20_000
    assert runs("job-9").metrics(["lr"]).series["lr"].step[-1] == 100


def test_curves_of_one_run_take_no_more_memory_than_the_budget(attempt: Attempt) -> None:
    whole, small = (Run(attempt.path.parent.parent, budget=budget) for budget in (1 << 20, 2_000))
    assert small.metrics().model_dump_json() == whole.metrics().model_dump_json()  # NaN equals nothing
    read_from_file = sum(one.memory for one in whole._attempts.values())
    assert small.memory - read_from_file <= 2_000 < whole.memory - read_from_file


def test_a_sparkline_is_kept_when_its_curves_are_not(attempt: Attempt) -> None:
    run = Run(attempt.path.parent.parent)
    before = run.sparkline()
    assert len(before.train_loss.step) <= 80 and before.val_loss.value[-1] == 0.05
    run.unload()
    assert run.sparkline() is before and run.memory == 0


def test_a_table_comes_whole_and_in_pieces(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(attempt.path.parent.parent)
    whole = "".join(run.table(["train_loss", "val_loss"], None, None))
    monkeypatch.setattr("api.series.ROWS", 7)
    assert len(list(run.table(["train_loss", "val_loss"], None, None))) > 10
    assert "".join(run.table(["train_loss", "val_loss"], None, None)) == whole
    assert [line.partition(",")[0] for line in whole.splitlines()] == ["step", *map(str, range(1, 101))]
    assert "".join(run.table(["lr"], 99, 99)) == "step,lr\n99,0.1\n"
    assert "".join(run.table(["lr"], 98, None)).count("\n") == 4


HUGE = {"type": "step", "attempt": 1, "seq": 1, "step": 1 << 63, "train_loss": 1.0}


@pytest.mark.parametrize(
    "event",
    [HUGE, HUGE | {"step": "1"}, HUGE | {"step": 1.5}, HUGE | {"step": 5, "train_loss": [1]}, HUGE | {"seq": None}],
)
def test_a_damaged_step_is_passed_over(attempt: Attempt, event: dict[str, Any]) -> None:
    before = Run(attempt.path.parent.parent).metrics(["train_loss"]).series
    with attempt.events.open("a") as file:
        file.write(json.dumps(event) + "\n")
    assert Run(attempt.path.parent.parent).metrics(["train_loss"]).series == before


@pytest.mark.parametrize("seq", [0, 1, 57, 111, 112, 113, 114, 500])
def test_a_page_of_events_begins_at_its_line_wherever_that_is(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch, seq: int
) -> None:
    lines = attempt.events.read_text().splitlines()
    monkeypatch.setattr("gptcore.rundir.SCANNED_BYTES", 1024)
    found = list(RunDir(attempt.path.parent.parent).lines_behind(1, seq))
    assert found == [(f"1-{number}", line) for number, line in enumerate(lines, 1)][seq:]


def test_damaged_lines_move_no_page_of_events(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = attempt.events.read_bytes().splitlines()
    lines[40:60] = [b"\xff" * 300] * 20
    attempt.events.write_bytes(b"\n".join(lines) + b"\n")
    monkeypatch.setattr("gptcore.rundir.SCANNED_BYTES", 1024)
    for seq in range(35, 65):
        (first, _), *_ = RunDir(attempt.path.parent.parent).lines_behind(1, seq)
        assert first == f"1-{seq + 1}"
