"""Small models, a small dataset of real text, and runs of the trainer as real processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore.dataset import Dataset
from gptcore.events import Step
from gptcore.model import GPT
from gptcore.prepare import prepare
from gptcore.rundir import RunDir, write_atomically
from gptcore.sources import text_files
from gptcore.spec import ModelSpec, TrainSpec, parse_spec
from tests.conftest import free_port, wait_until

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["gptcore.setup", "gptcore.train"])
FAMILIES = ("gpt2", "llama", "qwen3", "nanochat")


def wait_for_step(run: RunDir, step: int, attempt: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not any(isinstance(e, Step) and e.attempt == attempt and e.step >= step for e in run.events()):
        assert time.monotonic() < deadline, f"step {step} never came"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests share two cores; a model this small is slower with more threads than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_model(family: str, **changes: Any) -> ModelSpec:
    """Two layers of 32; heads explicit, so that changes of other fields stay alone."""
    fields = {"preset": f"{family}-tiny", "vocab_size": 96, "block_size": 64, "n_layer": 2, "n_embd": 32, "n_head": 4}
    return ModelSpec.model_validate(fields | changes)


def randomised(spec: ModelSpec, seed: int = 0) -> GPT:
    """A model whose every parameter is random: zero-initialised heads make tests vacuous."""
    torch.manual_seed(seed)
    model = GPT(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (0.5 if parameter.dim() == 1 else 0.0))
    return model


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TRAINMASTER_HOME with the dataset "small": this project's own sources, as bytes."""
    home = tmp_path_factory.mktemp("home")
    prepare_small(home / "datasets")
    return home


def prepare_small(root: Path) -> Dataset:
    project = Path(__file__).parents[2]
    sources = sorted(p for part in ("gptcore", "tests/gptcore") for p in (project / part).glob("*.py"))
    return prepare(root, "small", text_files(sources), "bytes", val_fraction=0.2)


@dataclass
class Trained:
    """A run that ended, and what its log said."""

    run: RunDir
    returncode: int
    output: str

    def losses(self) -> dict[int, float]:
        """Train loss by step; for a step logged twice the later one."""
        return {e.step: e.train_loss for e in self.run.events() if isinstance(e, Step)}

    def of_type(self, kind: type) -> list[Any]:
        return [e for e in self.run.events() if isinstance(e, kind)]


def tiny_spec(**changes: Any) -> TrainSpec:
    fields: dict[str, Any] = {
        "kind": "train",
        "name": "tiny",
        "model": {"preset": "llama-tiny", "block_size": 32, "n_layer": 2, "n_embd": 32, "n_head": 4},
        "data": {"dataset": "small"},
        "optim": {"lr": 0.003, "warmup_steps": 3},
        "max_steps": 20,
        "tokens_per_step": 512,
        "precision": "fp32",
        "compile": False,
        "evaluate": {"every_steps": 10, "eval_tokens": 1024},
        "checkpoint": {"every_steps": 5},
    }
    spec = parse_spec(fields | changes)
    assert isinstance(spec, TrainSpec)
    return spec


class Trainers:
    """Starts `gptcore.train` as the launcher does: one process, or several under torchrun."""

    def __init__(self, home: Path, folder: Path):
        self.home, self.folder = home, folder

    def start(
        self, run: RunDir, ranks: int = 1, module: str = "gptcore.train", **environment: str
    ) -> subprocess.Popen[str]:
        head = [sys.executable, "-m"]
        if ranks > 1:
            head += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
        given = {"TRAINMASTER_HOME": str(self.home), "OMP_NUM_THREADS": "1"} | environment
        return subprocess.Popen(
            [*head, module, str(run.path)],
            env=os.environ | given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start_node(self, run: RunDir, node_rank: int, port: int) -> subprocess.Popen[str]:
        """One of two nodes with a rank each, as a person starts them: torchrun without a rendezvous service."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node_rank)]
        address = ["--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
        return subprocess.Popen(
            [*torchrun, *address, "-m", "gptcore.train", str(run.path)],
            env=os.environ | {"TRAINMASTER_HOME": str(self.home), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def make(self, spec: TrainSpec, name: str) -> RunDir:
        run = RunDir(self.folder / name)
        write_atomically(run.spec, json.dumps(spec.model_dump(mode="json")))
        return run

    def __call__(self, spec: TrainSpec, name: str = "run", ranks: int = 1, **environment: str) -> Trained:
        """Train to the end. Without an environment of their own, ranks are forked: see `fork`."""
        run = self.make(spec, name)
        if not environment:
            return self.fork(run, ranks)
        process = self.start(run, ranks, **environment)
        output, _ = process.communicate(timeout=240)
        return Trained(run, process.returncode, output)

    def fork(self, run: RunDir, ranks: int = 1, module: str = "gptcore.train") -> Trained:
        """Run `python -m {module} RUN` in ranks forked from a process that has imported torch, which saves seconds.

        They get what torchrun tells its ranks. As there, all end when one fails, and its exit code is the answer.
        """
        output = self.folder / f"{run.path.name}.output"
        given = {"TRAINMASTER_HOME": str(self.home), "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            port = str(free_port())
            given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": port}
            given |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {} for rank in range(ranks)]
        processes = [FORK.Process(target=_run_module, args=(module, run.path, given | its, output)) for its in own]
        for process in processes:
            process.start()
        try:
            wait_until(lambda: any(p.exitcode for p in processes) or all(p.exitcode == 0 for p in processes), 240)
            code = next((p.exitcode for p in processes if p.exitcode), 0)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return Trained(run, code, output.read_text())


def _run_module(module: str, run: Path, environment: dict[str, str], output: Path) -> None:
    """In a process of its own: what `python -m {module} RUN` does, printing to the end of `output`."""
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    sys.argv = [module, str(run)]
    code: object = 0
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(int(code) if isinstance(code, int) else 1)  # multiprocessing would turn the code into its own


@pytest.fixture
def train(home: Path, tmp_path: Path) -> Trainers:
    return Trainers(home, tmp_path)


MakeModel = Callable[..., ModelSpec]
