"""How a job's trainer is started: the command and the environment. `gptcore` itself is not imported."""

import os
import shlex
import socket
import sys
from pathlib import Path

from gptcore.cgroup import most_threads
from gptcore.spec import AnySpec, EvalSpec, TrainSpec
from worker import processes
from worker.job import Ticket
from worker.settings import Settings

MODULES = {
    "train": "gptcore.train", "eval": "gptcore.eval_job",
    "prepare": "gptcore.prepare_job", "publish": "gptcore.publish_job",
}  # fmt: skip
# the job system's, none of a trainer's business
_PRIVATE = frozenset(
    {"TRAINMASTER_REDIS_URL", "TRAINMASTER_REDIS_PASSWORD_FILE", "TRAINMASTER_API_KEY", "TRAINMASTER_TRAINER"}
)
# Set by a launcher that started the worker itself (torchrun, accelerate, mpirun, a Kubernetes training operator) and
# read by torch, accelerate or transformers. In a job they would name a rank and a meeting point that are not the job's.
_OUTER_LAUNCHER = frozenset({
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "NPROC", "GROUP_RANK", "GROUP_WORLD_SIZE",
    "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCH_ELASTIC_WORKER_IDENTICAL",
    "FORK_LAUNCHED", "MPI_LOCALRANKID", "MPI_LOCALNRANKS",
})  # fmt: skip
_OUTER_LAUNCHER_PREFIXES = (
    "TORCHELASTIC_", "PET_", "ACCELERATE_", "FSDP_", "DEEPSPEED_", "MEGATRON_LM_", "PARALLELISM_CONFIG_",
    "OMPI_COMM_WORLD_", "PMI_", "PMIX_", "MV2_COMM_WORLD_", "SMDATAPARALLEL_",
)  # fmt: skip


def start(spec: AnySpec, settings: Settings, run_dir: Path, ticket: Ticket, meeting: str, log: Path) -> processes.Tree:
    """meeting: "{address} {port}" on the first node, where the ranks find each other."""
    arguments = command(spec, settings, run_dir, ticket, meeting)
    return processes.Tree(arguments, ticket, environment(spec, settings), run_dir, log, settings.grace_seconds)


def command(spec: AnySpec, settings: Settings, run_dir: Path, ticket: Ticket, meeting: str) -> list[str]:
    arguments = [str(run_dir), "--attempt", str(ticket.attempt)]
    if settings.trainer:
        return [*shlex.split(settings.trainer), *arguments, "--node-rank", str(ticket.node_rank)]
    nodes = spec.resources.nodes if isinstance(spec, TrainSpec) else 1
    ranks = spec.resources.ranks_per_node if isinstance(spec, TrainSpec | EvalSpec) else 1
    if nodes == ranks == 1:  # torchrun would only load torch once more: over a second, and 200 MB
        return [sys.executable, "-u", "-m", MODULES[spec.kind], *arguments]
    address, port = meeting.split()
    # max-restarts 0: another attempt is the job system's to make, with a checkpoint and a new number
    torchrun = {
        "nnodes": nodes, "nproc-per-node": ranks, "max-restarts": 0, "rdzv-backend": "static",
        "node-rank": ticket.node_rank, "master-addr": address, "master-port": port,
    }  # fmt: skip
    options = [f"--{name}={value}" for name, value in torchrun.items()]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", MODULES[spec.kind], *arguments]


def environment(spec: AnySpec, settings: Settings) -> dict[str, str]:
    """Return the trainer's environment: this process's variables without the job system's own and those of an outer
    launcher, and the slot's cores divided among the ranks as threads."""
    ranks = spec.resources.ranks_per_node if isinstance(spec, TrainSpec | EvalSpec) else 1
    inherited = {name: value for name, value in os.environ.items() if _is_inherited(name)}
    cores = len(slot_cores())
    threads = max(1, min(cores, most_threads() or cores) // ranks)
    # threads that wait by spinning starve each other once anything else wants a core, and threads that sleep at once
    # wake too late for the next small product: libgomp's look a thousand times first (docs/decisions.md)
    patient = {} if "OMP_WAIT_POLICY" in inherited else {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
    ours = {"TRAINMASTER_HOME": str(settings.home), "OMP_NUM_THREADS": str(threads)}
    # for torchrun's ranks too: import nothing from the working directory, and use UTF-8 whatever the locale
    python = {"PYTHONSAFEPATH": "1", "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"}
    return patient | inherited | ours | python


def _is_inherited(name: str) -> bool:
    return name not in _PRIVATE and name not in _OUTER_LAUNCHER and not name.startswith(_OUTER_LAUNCHER_PREFIXES)


def slot_cores() -> list[int]:
    """The cores this process may use; a slot's worker has only its slot's."""
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def free_port() -> int:
    """Another process may take it first; then the attempt fails and the next gets another."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
