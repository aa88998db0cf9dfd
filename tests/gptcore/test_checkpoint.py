from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore.checkpoint import Saver, best_checkpoint, list_checkpoints
from gptcore.events import Checkpointed, EventBase
from gptcore.rundir import RunDir
from gptcore.state import TrainState
from tests.gptcore.conftest import tiny_spec


class Saves:
    """A saver over a run directory, and what it reported."""

    def __init__(self, folder: Path, keep: int = 2, attempt: int = 1):
        self.run = RunDir(folder)
        self.reported: list[EventBase] = []
        self.saver = Saver(self.run, tiny_spec(checkpoint={"keep": keep}), attempt, self.reported.append)

    def save(self, step: int, best_step: int | None = None, position: int = 0, **extra: Any) -> None:
        state = TrainState(step=step, best_step=best_step, position=position)
        self.saver.save(state, {"w": torch.full((1000,), float(step))}, {"w|m": torch.zeros(1000)}, extra)

    def steps(self) -> list[int]:
        return [c.step for c in list_checkpoints(self.run)]


def test_a_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    saves = Saves(tmp_path)
    saves.save(7, world_size=2)
    saves.saver.close()
    [checkpoint] = list_checkpoints(saves.run)
    assert checkpoint.state().step == 7
    assert checkpoint.meta()["world_size"] == 2
    assert torch.equal(checkpoint.weights()["w"], torch.full((1000,), 7.0))
    [saved] = saves.reported
    assert isinstance(saved, Checkpointed)
    assert saved.bytes == sum(p.stat().st_size for p in checkpoint.path.iterdir())


def test_saving_takes_a_copy_so_training_may_go_on(tmp_path: Path) -> None:
    saves = Saves(tmp_path)
    weights = torch.zeros(2_000_000)
    saves.saver.save(TrainState(step=1), {"w": weights}, {}, {})
    weights += 1
    saves.saver.close()
    assert list_checkpoints(saves.run)[0].weights()["w"].max() == 0


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    saves = Saves(tmp_path, keep=2)
    for step in range(1, 8):
        saves.save(step, best_step=3 if step >= 3 else None)
    saves.saver.close()
    assert saves.steps() == [3, 6, 7]
    best = best_checkpoint(saves.run, TrainState(best_step=3))
    assert best is not None
    assert best.step == 3


@pytest.mark.parametrize("damage", ["missing", "short", "no_state", "half_written"])
def test_an_incomplete_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    saves = Saves(tmp_path)
    saves.save(1)
    saves.save(2)
    saves.saver.close()
    newest = list_checkpoints(saves.run)[-1].path
    if damage == "missing":
        (newest / "optimizer.safetensors").unlink()
    elif damage == "short":
        (newest / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:-1])
    elif damage == "no_state":
        (newest / "state.json").unlink()
    else:
        newest.rename(newest.with_name(f".{newest.name}.writing"))
    assert saves.steps() == [1]


def test_a_later_attempts_checkpoint_is_newer(tmp_path: Path) -> None:
    for attempt, step in ((1, 10), (2, 6)):
        saves = Saves(tmp_path, attempt=attempt)
        saves.save(step)
        saves.saver.close()
    assert [(c.attempt, c.step) for c in list_checkpoints(RunDir(tmp_path))] == [(1, 10), (2, 6)]


def test_what_an_evaluation_finds_is_put_beside_the_same_weights(tmp_path: Path) -> None:
    saves = Saves(tmp_path)
    saves.save(5)
    saves.saver.amend(TrainState(step=5, best_step=5, best_val_loss=1.5))
    saves.saver.close()
    [checkpoint] = list_checkpoints(saves.run)
    assert checkpoint.state().best_val_loss == 1.5
    assert checkpoint.weights()["w"][0] == 5


def test_a_later_attempt_too_says_what_its_evaluation_found(tmp_path: Path) -> None:
    first = Saves(tmp_path)
    first.save(5)
    first.saver.close()
    again = Saves(tmp_path, attempt=2)
    again.saver.amend(TrainState(step=5, best_step=5, best_val_loss=1.5))
    again.saver.close()
    [checkpoint] = list_checkpoints(again.run)
    assert (checkpoint.attempt, checkpoint.state().best_val_loss) == (1, 1.5)


def test_a_step_gone_back_to_keeps_its_tensors_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = Saves(tmp_path, keep=1)
    saves.save(5)
    saves.saver.wait()
    monkeypatch.setattr("gptcore.checkpoint.save_file", None)  # a kill while they are written would leave nothing
    saves.save(5, position=77)
    saves.saver.close()
    [checkpoint] = list_checkpoints(saves.run)
    assert (checkpoint.state().position, checkpoint.weights()["w"][0]) == (77, 5)


def test_what_a_killed_attempt_was_writing_is_cleared_away(tmp_path: Path) -> None:
    saves = Saves(tmp_path, attempt=2)
    left = saves.run.checkpoints / ".step-00000003-a0001.writing"
    left.mkdir(parents=True)
    saves.save(4)
    saves.saver.close()
    assert saves.steps() == [4] and not left.exists()


def test_what_a_killed_attempt_was_deleting_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, ignore_errors: bool = False) -> None:
        (path / "optimizer.safetensors").unlink()

    saves = Saves(tmp_path, keep=1)
    saves.save(1)
    saves.saver.wait()
    with monkeypatch.context() as patched:
        patched.setattr("gptcore.checkpoint.shutil.rmtree", killed)
        saves.save(2)
        saves.saver.wait()
    saves.save(3)
    saves.saver.close()
    assert [path.name for path in saves.run.checkpoints.iterdir()] == ["step-00000003-a0001"]
