"""What the run does when something harms it: bad batches, a full disk."""

import math
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import gptcore.checkpoint
from gptcore import guard
from gptcore.checkpoint import list_checkpoints
from gptcore.data import Batch
from gptcore.dataset import read_dataset
from gptcore.dist import Dist
from gptcore.events import (
    BestReverted,
    Evaluated,
    Exported,
    Finished,
    JsonlReport,
    Notice,
    Report,
    Resumed,
    RolledBack,
    Skipped,
    Started,
    Step,
    Stopped,
)
from gptcore.failure import Diverged, describe
from gptcore.plan import Hardware, peak_memory_bytes, resolve
from gptcore.rundir import RunDir
from gptcore.setup import build
from gptcore.spec import SpecError, TrainSpec
from gptcore.train import Trainer
from tests.gptcore.conftest import Trainers, tiny_spec


class Harmed:
    """Attempts at one run in this process, with gradients that go bad at chosen positions."""

    def __init__(self, spec: TrainSpec, home: Path, run: RunDir):
        self.spec, self.home, self.run = resolve(spec, home / "datasets"), home, run
        self.events: list[Any] = []
        self.report: Report = self.events.append

    def attempt(self, bad: dict[int, float], stop_after: int | None = None, word: str = "pause") -> Trainer:
        """bad: loss by the position (sequences consumed) of the batch it happens to."""
        attempt = self.run.claim_attempt()
        dataset = read_dataset(self.home / "datasets", "small")
        assert dataset is not None
        dist = Dist(0, 0, 1, torch.device("cpu"))
        trainer = build(self.spec, dataset, dist, self.run, attempt, self.report)
        healthy = trainer._accumulate_gradients

        def accumulate() -> tuple[torch.Tensor, float]:
            if stop_after is not None and trainer.state.step >= stop_after:
                attempt.stop.write_text(word)
            loss, waited = healthy()
            return (torch.tensor(bad.get(trainer.state.position, loss.item()))), waited

        trainer._accumulate_gradients = accumulate  # type: ignore[method-assign]
        trainer.train()
        return trainer

    def of_type(self, kind: type) -> list[Any]:
        return [e for e in self.events if isinstance(e, kind)]


@pytest.fixture
def harmed(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Harmed]:
    monkeypatch.setenv("TRAINMASTER_HOME", str(home))
    monkeypatch.setattr(guard, "WINDOW", 12)
    # twelve steps of a model this small say little: at six sigmas some texts have spikes of their own
    spec = tiny_spec(max_steps=40, checkpoint={"every_steps": 5}, optim={"lr": 0.001, "spike_sigmas": 20.0})
    yield Harmed(spec, home, RunDir(tmp_path / "run"))


PER_STEP = 512 // 32


@pytest.mark.parametrize(("loss", "reason"), [(math.nan, "non_finite"), (math.inf, "non_finite"), (50.0, "spike")])
def test_a_bad_batch_is_skipped_and_its_step_consumed(harmed: Harmed, loss: float, reason: str) -> None:
    trainer = harmed.attempt({20 * PER_STEP: loss})
    [skipped] = harmed.of_type(Skipped)
    assert (skipped.step, skipped.reason) == (21, reason)
    assert [e.step for e in harmed.of_type(Step)] == [*range(1, 21), *range(22, 41)]
    assert isinstance(harmed.events[-1], Finished)
    assert trainer.state.batches_skipped == 1
    assert trainer.state.position == 40 * PER_STEP


def test_a_skipped_update_leaves_the_weights_alone(harmed: Harmed) -> None:
    before = harmed.attempt({}, stop_after=20)
    weights = {n: p.detach().clone() for n, p in before.model.named_parameters()}
    after = harmed.attempt({before.state.position: math.nan}, stop_after=before.state.step)
    assert after.state.step == before.state.step + 1
    assert all(torch.equal(p, weights[n]) for n, p in after.model.named_parameters())


def test_bad_batches_in_a_row_lead_back_and_are_passed_over(harmed: Harmed) -> None:
    first_bad = 22
    bad = {step * PER_STEP: math.nan for step in range(first_bad, first_bad + guard.SKIPS_BEFORE_ROLLBACK)}
    trainer = harmed.attempt(bad)
    [back] = harmed.of_type(RolledBack)
    assert (back.from_step, back.to_step, back.batches_passed_over) == (27, 25, 2)
    assert isinstance(harmed.events[-1], Finished)
    # the steps went back by two, the data did not
    assert trainer.state.position == (40 + 2) * PER_STEP


def test_a_run_harmed_across_a_resume_ends_as_the_undisturbed_one(harmed: Harmed, home: Path, tmp_path: Path) -> None:
    bad = {step * PER_STEP: math.nan for step in (*range(22, 27), 33)}
    whole = harmed.attempt(bad)
    parts = Harmed(harmed.spec, home, RunDir(tmp_path / "parts"))
    for stop_after in (18, 23, 26, 34):
        parts.attempt(bad, stop_after=stop_after)
    resumed = parts.attempt(bad)
    assert resumed.state == whole.state
    assert len(parts.of_type(RolledBack)) == 1
    for (name, p), (_, q) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_the_guard_ends_no_run_whose_loss_stays_higher(harmed: Harmed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the run goes back before the guard has accepted the new level: it keeps what it has seen."""
    monkeypatch.setattr(guard, "SKIPS_BEFORE_ROLLBACK", 2)
    optim = harmed.spec.optim.model_copy(update={"spike_sigmas": 2.0})
    harmed.spec = harmed.spec.model_copy(update={"optim": optim})
    harmed.attempt({step * PER_STEP: 9.0 for step in range(20, 500)})
    assert isinstance(harmed.events[-1], Finished)
    assert len(harmed.of_type(RolledBack)) == 1


def test_rollbacks_are_capped_and_the_way_out_is_named(harmed: Harmed) -> None:
    with pytest.raises(Diverged, match=r"after 3 rollbacks; lower lr"):
        harmed.attempt({step * PER_STEP: math.nan for step in range(10, 500)})
    assert len(harmed.of_type(RolledBack)) == guard.MAX_ROLLBACKS


def test_the_best_weights_are_some_that_were_saved(harmed: Harmed, monkeypatch: pytest.MonkeyPatch) -> None:
    really, saves = gptcore.checkpoint.save_file, 0

    def on_a_disk_full_for_a_while(*given: Any) -> None:
        nonlocal saves
        saves += 1
        if saves > 2 * 2:  # two files each: after steps 5 and 10
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        really(*given)

    monkeypatch.setattr("gptcore.checkpoint.save_file", on_a_disk_full_for_a_while)
    with pytest.raises(OSError, match="No space left"):  # the last one is not to be lost
        harmed.attempt({})
    assert [(e.step, e.best) for e in harmed.of_type(Evaluated)] == [(step, True) for step in (10, 20, 30, 40)]
    reverted = harmed.of_type(BestReverted)
    assert [(e.lost_step, e.step, e.val_loss) for e in reverted] == [
        (step, 10, harmed.of_type(Evaluated)[0].val_loss) for step in (20, 30, 40)
    ]
    monkeypatch.setattr("gptcore.checkpoint.save_file", really)
    assert harmed.attempt({}).state.best_step == 40
    assert [e.step for e in harmed.of_type(Exported)] == [40]


def test_training_goes_on_while_the_weights_of_an_evaluation_are_still_written(
    harmed: Harmed, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, trained_on = gptcore.checkpoint.save_file, threading.Event()

    def on_a_slow_disk(*given: Any) -> None:
        if "step-00000010" in str(given[1]):
            assert trained_on.wait(20), "no step came before the weights were written"
        really(*given)

    def see(event: Any) -> None:
        harmed.events.append(event)
        if isinstance(event, Step) and event.step == 12:
            trained_on.set()

    monkeypatch.setattr("gptcore.checkpoint.save_file", on_a_slow_disk)
    harmed.report = see
    harmed.attempt({}, stop_after=17)
    evaluated = harmed.of_type(Evaluated)
    assert [(e.step, e.best) for e in evaluated] == [(10, True)]
    [amended] = [c.state() for c in list_checkpoints(harmed.run) if c.step == 10]
    assert (amended.best_step, amended.best_val_loss, amended.evaluation_owed) == (10, evaluated[0].val_loss, False)


@pytest.mark.parametrize("word", ["pause", "cancel"])
def test_a_stop_without_room_for_its_checkpoint_is_a_full_disk(
    harmed: Harmed, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    def on_a_full_disk(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("gptcore.checkpoint.save_file", on_a_full_disk)
    with pytest.raises(OSError, match="No space left") as full:
        harmed.attempt({}, stop_after=2, word=word)
    assert describe(full.value, 0).reason == "disk_full"
    assert not harmed.of_type(Stopped)


def test_a_loss_that_is_no_number_is_not_the_best(harmed: Harmed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptcore.train.validation_loss", lambda *_: math.nan)
    assert harmed.attempt({}).state.best_step is None
    assert "not exported: no checkpoint has a validation loss that is a finite number" in [
        e.message for e in harmed.of_type(Notice)
    ]


def test_a_resume_keeps_the_precision_of_its_checkpoint(harmed: Harmed, monkeypatch: pytest.MonkeyPatch) -> None:
    harmed.spec = harmed.spec.model_copy(update={"precision": "auto"})
    for bf16_here in (False, True):  # the second attempt is on another machine
        monkeypatch.setattr("gptcore.device.multiplies_bf16", lambda _, here=bf16_here: here)
        harmed.attempt({}, stop_after=20)
    assert [e.precision for e in harmed.of_type(Started)] == ["fp32", "fp32"]
    assert [e.difference for e in harmed.of_type(Resumed)] == [0.0]


def test_a_streak_over_a_checkpoint_is_passed_over_by_one_rollback(harmed: Harmed) -> None:
    """The checkpoint in the middle of it counts some refused already."""
    harmed.attempt({position * PER_STEP: math.nan for position in range(21, 29)})
    assert [(e.from_step, e.to_step) for e in harmed.of_type(RolledBack)] == [(26, 25)]
    assert isinstance(harmed.events[-1], Finished)


def test_a_run_that_goes_on_from_another_has_all_its_rollbacks_before_it(harmed: Harmed) -> None:
    first = harmed.attempt({position * PER_STEP: math.nan for position in range(21, 29)})
    assert first.state.rollbacks == 1
    init = {"source": harmed.run.path.name, "optimizer": True}
    body = harmed.spec.model_dump(mode="json") | {"max_steps": 44, "init_from": init}
    further = Harmed(TrainSpec.model_validate(body), harmed.home, RunDir(harmed.run.path.with_name("further")))
    state = further.attempt({}).state
    assert (state.step, state.rollbacks) == (44, 0)


def test_the_micro_batch_fits_the_precision_and_the_machine(harmed: Harmed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a resumed run's, on a smaller machine than it began on."""
    harmed.spec = harmed.spec.model_copy(update={"micro_batch_size": "auto", "precision": "auto"})
    monkeypatch.setattr("gptcore.device.multiplies_bf16", lambda _: False)
    narrow, wide = (harmed.spec.model_copy(update={"precision": name}) for name in ("bf16", "fp32"))
    monkeypatch.setattr("gptcore.plan.PROCESS_BYTES", 0)  # more than this model needs in either precision
    enough_for_bf16 = int(peak_memory_bytes(narrow, 16, "cpu") / 0.9) + 1
    assert peak_memory_bytes(wide, 16, "cpu") > enough_for_bf16
    for stop_after, memory in ((10, None), (20, enough_for_bf16), (30, None)):
        here = Hardware(memory_bytes=memory)
        monkeypatch.setattr("gptcore.device.hardware", lambda _, here=here: here)
        harmed.attempt({}, stop_after=stop_after)
    first, small, large = (e.micro_batch_size for e in harmed.of_type(Started))
    assert (first, large) == (16, small) and small < 16


def test_a_micro_batch_that_does_not_fit_is_halved_and_the_step_is_the_same(
    harmed: Harmed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a resume too, which tries no larger one again."""
    healthy = Trainer._forward_backward
    tried: list[int] = []

    def on_a_small_gpu(trainer: Trainer, batch: Batch, share: float, last: bool) -> torch.Tensor:
        tried.append(len(batch[0]))
        if tried[-1] > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return healthy(trainer, batch, share, last)

    def with_micro_batch(size: int) -> TrainSpec:
        return harmed.spec.model_copy(update={"micro_batch_size": size, "max_steps": 12})

    whole = Harmed(with_micro_batch(4), harmed.home, RunDir(harmed.run.path.with_name("whole")))
    whole.attempt({})
    harmed.spec = with_micro_batch(16)
    monkeypatch.setattr(Trainer, "_forward_backward", on_a_small_gpu)
    harmed.attempt({}, stop_after=5)
    assert tried[:3] == [16, 8, 4]
    assert [e.message.split(";")[0] for e in harmed.of_type(Notice)] == [
        f"micro_batch_size {size} does not fit into memory" for size in (16, 8)
    ]
    harmed.attempt({})
    assert tried.count(16) == 1
    assert [e.micro_batch_size for e in harmed.of_type(Started)] == [16, 4]
    steps = [[(e.step, e.train_loss, e.grad_norm) for e in run.of_type(Step)] for run in (harmed, whole)]
    assert steps[0] == steps[1]


def test_one_sequence_that_does_not_fit_is_out_of_memory(harmed: Harmed, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_a_tiny_machine(*_: Any, last: bool) -> torch.Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(Trainer, "_forward_backward", on_a_tiny_machine)
    with pytest.raises(RuntimeError) as full:
        harmed.attempt({})
    assert describe(full.value, 0).reason == "out_of_memory"
    assert "training with 1 and 16 accumulation steps" in harmed.of_type(Notice)[-1].message


def test_bf16_where_it_is_imitated_is_named_as_slow(harmed: Harmed, monkeypatch: pytest.MonkeyPatch) -> None:
    harmed.spec = harmed.spec.model_copy(update={"precision": "bf16"})
    for native in (True, False):
        monkeypatch.setattr("gptcore.device.multiplies_bf16", lambda _, native=native: native)
        harmed.attempt({}, stop_after=10)
    slow = [(e.level, e.message) for e in harmed.of_type(Notice) if "bf16" in e.message]
    assert slow == [
        ("warning", "precision bf16: this cpu has no instructions for it and is many times slower than in fp32")
    ]


def test_a_resume_on_other_tokens_is_refused(harmed: Harmed) -> None:
    harmed.attempt({}, stop_after=20)
    report = JsonlReport(harmed.run.attempt(1).events, 1)
    report(harmed.of_type(Started)[0].model_copy(update={"dataset_sha256": "another"}))
    report.close()
    with pytest.raises(SpecError, match="/data/dataset: dataset small holds other tokens than this run began with"):
        harmed.attempt({})


def test_a_full_disk_ends_the_save_and_leaves_the_older_checkpoint_whole(train: Trainers, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", disk]).returncode:
        pytest.skip("a small disk can be mounted only by root")
    try:
        small = Trainers(train.home, disk)
        done = small(tiny_spec(max_steps=20, checkpoint={"every_steps": 5, "keep": 20}), "run")
        warnings = [e.message for e in done.of_type(Notice)]
        assert any("not saved" in w and "No space left" in w for w in warnings), done.output
        kept = list_checkpoints(done.run)
        assert kept
        assert kept[0].weights()
        assert "disk_full" in done.output
    finally:
        subprocess.run(["umount", disk], check=True)
