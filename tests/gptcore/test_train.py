import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gptcore.checkpoint import list_checkpoints
from gptcore.data import Windows
from gptcore.dataset import read_dataset
from gptcore.dist import Dist
from gptcore.events import (
    Evaluated,
    Exported,
    Failed,
    Finished,
    Notice,
    PhaseChanged,
    Resumed,
    Sampled,
    Started,
    Step,
    Stopped,
)
from gptcore.plan import resolve
from gptcore.rundir import RunDir
from gptcore.setup import build
from tests.conftest import free_port
from tests.gptcore.conftest import FAMILIES, Trainers, tiny_spec, wait_for_step


def last_weights(run: RunDir) -> str:
    newest = list_checkpoints(run)[-1].path
    return hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest()


def test_a_run_learns_evaluates_exports_and_says_so(train: Trainers) -> None:
    done = train(tiny_spec(max_steps=40, sample={"every_steps": 20, "max_tokens": 10}))
    assert done.returncode == 0, done.output
    events = list(done.run.events())
    assert [e.seq for e in events] == list(range(1, len(events) + 1))
    assert isinstance(events[0], Started)
    dataset = read_dataset(train.home / "datasets", "small")
    assert dataset and events[0].dataset_sha256 == dataset.sha256
    finished = events[-1]
    assert isinstance(finished, Finished)
    losses = done.losses()
    assert list(losses) == list(range(1, 41))
    assert losses[40] < losses[1] - 1
    evaluated = done.of_type(Evaluated)
    assert [e.step for e in evaluated] == [10, 20, 30, 40]
    assert finished.best_val_loss == min(e.val_loss for e in evaluated)
    windows = Windows(train.home / "datasets" / "small", dataset.val, 32)
    bytes_a_token = np.mean(windows.read(np.arange(1024 // 32))[1].numpy() > 0)
    assert evaluated[0].bits_per_byte == pytest.approx(evaluated[0].val_loss / 0.6931472 / bytes_a_token)
    assert len(done.of_type(Sampled)) == 2
    # only what is called training is taken for a step that takes too long
    phase, seen = "", defaultdict(set)
    for event in events:
        phase = event.phase if isinstance(event, PhaseChanged) else phase
        seen[type(event)].add(phase)
    assert seen[Step] == {"training"} and seen[Sampled] == seen[Evaluated] == {"evaluating"}
    assert "checkpointing" in seen[PhaseChanged]
    assert (done.run.path / done.of_type(Exported)[0].path / "model.safetensors").is_file()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_compiles_nothing_never_loads_the_compiler(train: Trainers, optimizer: str) -> None:
    spec = tiny_spec(max_steps=2, optim={"name": optimizer, "lr": 0.003}, sample={"every_steps": 1, "max_tokens": 3})
    done = train(spec, PYTHONPROFILEIMPORTTIME="1")
    assert isinstance(list(done.run.events())[-1], Finished), done.output
    loaded = {line.rpartition("|")[2].strip() for line in done.output.splitlines() if line.startswith("import time:")}
    assert "torch" in loaded and not {"torch._dynamo", "torch._inductor"} & loaded


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_with_muon(train: Trainers, family: str) -> None:
    model = {"preset": f"{family}-tiny", "block_size": 32, "n_layer": 2, "n_embd": 32, "n_head": 4}
    done = train(tiny_spec(model=model, optim={"name": "muon", "lr": 0.003}, max_steps=50))
    losses = done.losses()
    assert losses[50] < losses[1] - 1, done.output


class Reads(TorchDispatchMode):
    """Counts numbers read from tensors and tensors made of Python's numbers: on a GPU each waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.lift_fresh):
            self.seen.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_waits_for_the_device_only_where_all_ranks_agree(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    monkeypatch.setenv("TRAINMASTER_HOME", str(home))
    spec = tiny_spec(optim={"name": optimizer, "lr": 0.003})
    dataset = read_dataset(home / "datasets", spec.data.dataset)
    assert dataset is not None
    run = RunDir(tmp_path / "run")
    dist = Dist(0, 0, 1, torch.device("cpu"))
    trainer = build(resolve(spec, home / "datasets"), dataset, dist, run, run.claim_attempt(), lambda event: None)
    trainer.batches.seek(0)
    trainer.step()  # makes the optimiser's state
    with Reads() as reads:
        trainer.step()
        assert reads.seen == []  # the one list that all ranks agree on is no number, on a CPU
        float(torch.ones(1))
    trainer.batches.close()
    assert len(reads.seen) == 1


def test_a_graph_for_evaluations_computes_no_gradients_that_it_drops(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINMASTER_HOME", str(home))
    monkeypatch.setattr("gptcore.kernels.ONEDNN", False)  # torch counts its own operators only
    spec = tiny_spec()
    dataset = read_dataset(home / "datasets", spec.data.dataset)
    assert dataset is not None
    run = RunDir(tmp_path / "run")
    dist = Dist(0, 0, 1, torch.device("cpu"))
    trainer = build(resolve(spec, home / "datasets"), dataset, dist, run, run.claim_attempt(), lambda event: None)
    trainer.batches.close()
    trainer.compiled = True  # what it would compile runs as it is
    flops = {}
    for trainer.evaluates_apart in (False, True):
        with FlopCounterMode(display=False) as counter:
            trainer._probe_loss()
        flops[trainer.evaluates_apart] = counter.get_total_flops()
    model = trainer.model.spec
    tokens = trainer.planned.micro_batch_size * model.block_size
    assert flops[False] - flops[True] == 4 * model.padded_vocab_size * model.n_embd * tokens


def test_a_compiler_that_fails_leaves_the_run_eager(train: Trainers) -> None:
    done = train(tiny_spec(max_steps=2, compile=True), CXX="/no/such/compiler")
    assert done.returncode == 0, done.output
    assert not done.of_type(Started)[0].compiled
    [notice] = [e for e in done.of_type(Notice) if e.level == "warning"]
    assert "torch.compile does not work here" in notice.message and "runs eager" in notice.message


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_ranks_follow_one(train: Trainers, ranks: int) -> None:
    spec = tiny_spec(max_steps=50, evaluate={"every_steps": 50, "eval_tokens": 1024})
    one, several = train(spec, "one"), train(spec, "several", ranks=ranks)
    assert several.returncode == 0, several.output
    for step, loss in one.losses().items():
        assert several.losses()[step] == pytest.approx(loss, abs=1e-4 * loss)
    assert several.of_type(Step)[0].grad_norm == pytest.approx(one.of_type(Step)[0].grad_norm, rel=1e-5)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_first_gradients_of_several_ranks_are_those_of_one(train: Trainers, ranks: int) -> None:
    run = train.make(tiny_spec(tokens_per_step=1024, micro_batch_size=4), "run")
    for count in (1, ranks):
        done = train.fork(run, count, "tests.gptcore.dump_gradients")
        assert (run.path / f"gradients-{count}.pt").exists(), done.output
    one, several = (torch.load(run.path / f"gradients-{count}.pt") for count in (1, ranks))
    for name, gradient in one.items():
        assert (gradient - several[name]).norm() <= 1e-5 * gradient.norm(), name


def test_all_ranks_halve_the_micro_batch_that_does_not_fit_on_one(train: Trainers) -> None:
    run = train.make(tiny_spec(tokens_per_step=1024, micro_batch_size=16), "run")
    done = train.fork(run, 2, "tests.gptcore.halve_on_one_rank")
    assert [(run.path / f"rank-{rank}").read_text() for rank in range(2)] == ["4 x 4"] * 2, done.output


def test_ranks_agree_on_the_norm_and_wait_for_a_slow_first_rank(train: Trainers) -> None:
    spec = tiny_spec(
        max_steps=3,
        optim={"name": "muon", "lr": 0.01, "warmup_steps": 0, "eps": 1e-3, "grad_clip": 0.01, "muon_beta2": 0.95},
        checkpoint={"every_steps": 1},
        evaluate={"every_steps": 3, "eval_tokens": 64},
        sample={"every_steps": 2, "max_tokens": 3},  # so that a step follows, in which the others would wait
    )
    run = train.make(spec, "run")
    done = train.fork(run, 2, "tests.gptcore.slow_first_rank")
    written = [run.path / f"rank-{rank}" for rank in range(2)]
    assert all(path.exists() for path in written), done.output
    assert written[0].read_text() == written[1].read_text()
    saved = list_checkpoints(run)[-1].optimizer()
    assert {name.partition("|")[2] for name in saved} >= {"momentum_buffer", "mean_squares"}
    assert all(moment.any() for name, moment in saved.items() if name.endswith("momentum_buffer"))


@pytest.mark.slow
def test_muon_on_two_ranks_follows_one(train: Trainers) -> None:
    spec = tiny_spec(max_steps=50, optim={"name": "muon", "lr": 0.003, "muon_beta2": 0.95})
    one, two = train(spec, "one"), train(spec, "two", ranks=2)
    for step, loss in one.losses().items():
        assert two.losses()[step] == pytest.approx(loss, abs=5e-3 * loss)


KILLS = int(os.environ.get("KILLS", "2"))  # of one run; more take longer
LONG_ONLY = [pytest.mark.slow, pytest.mark.skipif(KILLS < 10, reason="minutes of compiling; KILLS=10 runs it")]
# long enough that a kill comes before the end, with steps between the checkpoints
LONG: dict[str, Any] = {
    "max_steps": 130 + 60 * KILLS,
    "checkpoint": {"every_steps": 17},
    "evaluate": {"every_steps": 60, "eval_tokens": 1024},
}


def kill_at_random(train: Trainers, run: RunDir, ranks: int, kills: int, draw: random.Random) -> None:
    """Start the run again and again, SIGKILL its processes at a random step each time."""
    for attempt in range(1, kills + 1):
        process = train.start(run, ranks)
        reached = max((c.step for c in list_checkpoints(run)), default=0)
        wait_for_step(run, reached + draw.randint(20, 60), attempt, 240)  # it may compile first, on a busy machine
        # ranks first: orphaned by torchrun's death they would stop cleanly, with a checkpoint
        for pid in [*rank_processes(process.pid).values(), process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=60)


@pytest.mark.parametrize(
    ("ranks", "optimizer", "compiled"),
    [
        (1, "adamw", False),
        pytest.param(2, "muon", False, marks=pytest.mark.slow),
        pytest.param(4, "adamw", False, marks=pytest.mark.slow),
        pytest.param(2, "muon", True, marks=pytest.mark.slow),
        pytest.param(1, "adamw", True, marks=LONG_ONLY),
        pytest.param(4, "muon", True, marks=LONG_ONLY),
    ],
)
@pytest.mark.timeout(600)  # two ranks that compile, four times
def test_a_killed_run_resumes_bit_for_bit(train: Trainers, ranks: int, optimizer: str, compiled: bool) -> None:
    spec = tiny_spec(optim={"name": optimizer, "lr": 0.003, "muon_beta2": 0.95}, compile=compiled, **LONG)
    whole = train(spec, "whole", ranks=ranks)
    assert whole.returncode == 0, whole.output
    run = train.make(spec, "killed")
    kill_at_random(train, run, ranks, kills=KILLS, draw=random.Random(ranks))
    killed = train(spec, "killed", ranks=ranks)
    assert killed.returncode == 0, killed.output
    assert killed.losses() == whole.losses()
    assert last_weights(run) == last_weights(whole.run)
    assert all(e.difference == 0 for e in killed.of_type(Resumed))
    replayed = [e.replay_difference for e in killed.of_type(Step) if e.replay_difference is not None]
    assert replayed
    assert set(replayed) == {0.0}


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(train: Trainers) -> None:
    spec = tiny_spec(optim={"name": "muon", "lr": 0.003, "muon_beta2": 0.95}, **LONG | {"max_steps": 90})
    whole = train(spec, "whole")
    run = train.make(spec, "moved")
    kill_at_random(train, run, 2, kills=1, draw=random.Random(5))
    moved = train(spec, "moved")
    assert moved.returncode == 0, moved.output
    assert [e.micro_batch_size for e in moved.of_type(Started)] == [8, 16]
    assert [e.difference for e in moved.of_type(Resumed)] == [pytest.approx(0, abs=1e-5)]
    assert moved.losses().keys() == whole.losses().keys()
    for step, loss in whole.losses().items():
        assert moved.losses()[step] == pytest.approx(loss, abs=1e-2 * loss)


@pytest.mark.parametrize(("how", "reason"), [("cancel", "cancel"), ("SIGTERM", "pause")])
def test_a_stop_leaves_a_checkpoint_of_the_last_step(train: Trainers, how: str, reason: str) -> None:
    run = train.make(tiny_spec(max_steps=100_000), "run")
    process = train.start(run)
    wait_for_step(run, 8, attempt=1)
    if how == "SIGTERM":
        process.terminate()
    else:
        run.attempt(1).stop.write_text(how)
    output, _ = process.communicate(timeout=60)
    stopped = list(run.events())[-1]
    assert isinstance(stopped, Stopped), output
    assert stopped.reason == reason
    assert list_checkpoints(run)[-1].step == stopped.step
    assert process.returncode == 0


def test_a_resume_with_a_changed_model_is_refused_saying_what_differs(train: Trainers) -> None:
    train(tiny_spec(max_steps=5), "run")
    model = {"preset": "llama-tiny", "block_size": 32, "n_layer": 3, "n_embd": 32, "n_head": 4}
    changed = train(tiny_spec(max_steps=9, model=model), "run")
    failed = list(changed.run.events())[-1]
    assert isinstance(failed, Failed)
    assert failed.reason == "user_error"
    assert "n_layer is 2 there, 3 here" in failed.message


def test_a_larger_vocabulary_or_seed_and_no_temperature_are_sampled(train: Trainers) -> None:
    model = {"preset": "llama-tiny", "block_size": 32, "n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 600}
    sampling = {"every_steps": 1, "max_tokens": 200}
    spec = tiny_spec(max_steps=2, model=model, seed=2**62, sample=sampling)
    assert len(train(spec, "hot").of_type(Sampled)) == 2
    cold = tiny_spec(max_steps=2, model=model, sample=sampling | {"temperature": 1e-40})
    assert len(train(cold, "cold").of_type(Sampled)) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens_per_step": 100}, "/tokens_per_step: tokens_per_step 100 is not a multiple"),
        ({"resources": {"device": "cuda"}}, "/resources/device: device cuda is not here: torch sees no GPU"),
    ],
)
def test_a_spec_that_cannot_run_is_refused_in_a_line(
    train: Trainers, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    if "resources" in changes and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (tmp_path / "spec.json").write_text(tiny_spec(**changes).model_dump_json())
    command = [sys.executable, "-m", "gptcore.train", "--spec", str(tmp_path / "spec.json")]
    home = tmp_path / "home"
    home.mkdir()
    (home / "datasets").symlink_to(train.home / "datasets")
    done = subprocess.run(command, env=os.environ | {"TRAINMASTER_HOME": str(home)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(said)


def test_a_rank_that_is_killed_ends_all_and_is_named(train: Trainers) -> None:
    run = train.make(tiny_spec(max_steps=100_000), "run")
    process = train.start(run, ranks=2)
    wait_for_step(run, 3, attempt=1)
    ranks = rank_processes(process.pid)
    began = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=40)
    assert time.monotonic() - began < 30
    assert process.returncode != 0
    assert not psutil.pid_exists(ranks[0])
    assert "local_rank: 1) exitcode: -9" in " ".join(output.split()).replace(" :", ":"), output


def rank_processes(launcher: int) -> dict[int, int]:
    """Process ids of torchrun's ranks, by rank; of a process without torchrun none."""
    children = psutil.Process(launcher).children()
    return {int(rank): child.pid for child in children if (rank := child.environ().get("RANK")) is not None}


def test_two_nodes_of_a_plain_torchrun_agree_on_each_attempt(train: Trainers) -> None:
    run = train.make(tiny_spec(max_steps=2), "run")
    for attempt in (1, 2):
        port = free_port()
        nodes = [train.start_node(run, rank, port) for rank in range(2)]
        outputs = [node.communicate(timeout=120)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], outputs
        assert [one.number for one in run.attempts()] == list(range(1, attempt + 1))
        assert any(e.attempt == attempt and "node rank 1" in e.message for e in run.events() if isinstance(e, Notice))
