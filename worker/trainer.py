"""How a job's trainer is started: the command and the environment. `gptcore` itself is not imported."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from pathlib import Path

from gptcore.spec import PrepareSpec, TrainSpec
from worker.settings import Settings

# the job system's, none of a trainer's business
_PRIVATE = ("TRAINMASTER_REDIS_URL", "TRAINMASTER_TRAINER")


def command(spec: TrainSpec | PrepareSpec, settings: Settings, run_dir: Path, attempt: int) -> list[str]:
    arguments = [str(run_dir), "--attempt", str(attempt)]
    if settings.trainer:
        return [*shlex.split(settings.trainer), *arguments]
    if isinstance(spec, PrepareSpec):
        return [sys.executable, "-m", "gptcore.prepare", *arguments]
    # max-restarts 0: another attempt is the job system's to make, with a checkpoint and a new number
    torchrun = {
        "nnodes": 1,
        "nproc-per-node": spec.resources.ranks_per_node,
        "max-restarts": 0,
        "rdzv-backend": "static",
        "node-rank": 0,
        "master-addr": "127.0.0.1",
        "master-port": _free_port(),
    }
    options = [f"--{name}={value}" for name, value in torchrun.items()]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "gptcore.train", *arguments]


def environment(spec: TrainSpec | PrepareSpec, settings: Settings) -> dict[str, str]:
    """This process's, with the slot's cores shared out as threads of the ranks."""
    ranks = spec.resources.ranks_per_node if isinstance(spec, TrainSpec) else 1
    inherited = {name: value for name, value in os.environ.items() if name not in _PRIVATE}
    threads = max(1, len(slot_cores()) // ranks)
    # threads that wait by spinning starve each other once anything else wants a core: beside one busy
    # process a step on two cores took 1.3 s spinning and 0.8 s sleeping (0.44 and 0.49 s alone)
    patient = {"OMP_WAIT_POLICY": "PASSIVE"}
    return patient | inherited | {"TRAINMASTER_HOME": str(settings.home), "OMP_NUM_THREADS": str(threads)}


def slot_cores() -> list[int]:
    """The cores this process may use; a slot's worker has only its slot's."""
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _free_port() -> int:
    """For the ranks to meet. Another process may take it first; then the attempt fails and the next gets another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
