"""The ranks of a run: who am I, on which device, and what all of us must agree on."""

import ctypes
import fcntl
import ipaddress
import os
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.utils import deterministic

from gptcore.failure import Unavailable
from gptcore.spec import refusal

# how long a collective waits for a rank that does not come. Before training, ranks may compile and download for minutes
# at different speeds; in training a rank that is late by this much hangs.
START_TIMEOUT = timedelta(minutes=30)
TRAINING_TIMEOUT = timedelta(minutes=10)
HEARTBEAT_SECONDS = 5.0  # far below both
ANSWER_SECONDS = 300.0  # within which the ranks of all nodes start: a shared disk may show files late
SIOCGIFADDR = 0x8915  # Linux: an interface's IPv4 address


@dataclass(frozen=True)
class Dist:
    """One rank's place in the run."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on all ranks; in place."""
        if self.world_size > 1:
            c10d.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank. All ranks must call."""
        return bool(self.sum(torch.full((), float(flag), device=self.device)))

    def run_on_first(self, work: Callable[[], object]) -> None:
        """Run `work` on rank 0 while the other ranks wait, however long it takes. All ranks must call.

        The ranks exchange a heartbeat meanwhile, so that slow work is not taken for a rank that hangs. Raises on rank 0
        what `work` raises.
        """
        if self.world_size == 1:
            work()
        elif self.first:
            self._run_with_heartbeat(work)
        else:
            while not self.any(False):
                pass

    def _run_with_heartbeat(self, work: Callable[[], object]) -> None:
        with ThreadPoolExecutor(1, initializer=self._use_device) as pool:
            running = pool.submit(work)
            done = False
            while not done:
                done = bool(wait([running], HEARTBEAT_SECONDS).done)
                self.any(done)
        running.result()

    def _use_device(self) -> None:
        """Make this rank's GPU the current one of a new thread, where it would be the first."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def limit_waits(self, timeout: timedelta) -> None:
        """Let collectives wait at most this long from now on. All ranks must call."""
        if self.world_size > 1:
            c10d.barrier()  # none is under way under the limit of before
            c10d.distributed_c10d._set_pg_timeout(timeout)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable value, on all ranks."""
        if self.world_size == 1:
            return value
        box = [value]
        c10d.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


def start(device: str, threads: int | None = None) -> Dist:
    """Join the run that torchrun's environment names; without one, a run of one rank.

    device: "auto", "cpu" or "cuda". On CPU the results are made repeatable: deterministic kernels
    and a fixed number of threads, OMP_NUM_THREADS by default (torchrun sets it to 1 unless it is set).
    Raises SpecError; Unavailable if a worker gave this process a GPU that torch cannot use.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if device != "cpu" and not torch.cuda.is_available() and (given := _gpus_of_slot()):
        way_out = "check nvidia-smi, and that torch is built for CUDA"
        raise Unavailable(f"the worker's GPU {given} cannot be used: torch sees none; {way_out}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise refusal("/resources/device", "device cuda is not here: torch sees no GPU; use auto or cpu")
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
        torch.set_float32_matmul_precision("high")  # TF32 where a product is not bf16 already
    else:
        place = torch.device("cpu")
        _keep_freed_memory()
        torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms would load the compiler
        # every kernel here writes what it then reads
        deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        if threads := threads or int(os.environ.get("OMP_NUM_THREADS") or 0):
            torch.set_num_threads(threads)
    if world_size > 1:
        _join("nccl" if device == "cuda" else "gloo", rank, world_size)
    return Dist(rank, local_rank, world_size, place)


@lru_cache(1)
def start_store() -> Store:
    """Return the store of keys and values that all ranks of this start share: torchrun's, else rank 0's.

    An earlier start of the same run has another one, so nothing in it is out of date.
    """
    store, _, _ = next(rendezvous("env://", timeout=START_TIMEOUT))
    return store


def _join(backend: str, rank: int, world_size: int) -> None:
    """Make the process group. Raises RuntimeError with the ranks that are missing, or with what to set."""
    several_nodes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) != world_size
    if several_nodes:
        _wait_for_ranks(start_store(), rank, world_size)
    if several_nodes and backend == "gloo" and "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = interface_towards(os.environ["MASTER_ADDR"])
        if interface:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    store = PrefixStore("process_group", start_store())
    try:
        c10d.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=START_TIMEOUT)
    except RuntimeError as error:
        variable = "GLOO_SOCKET_IFNAME" if backend == "gloo" else "NCCL_SOCKET_IFNAME"
        chosen = os.environ.get(variable) or "not set"
        way_out = f"set {variable} (now: {chosen}) on each node to the network interface that reaches the others"
        raise RuntimeError(f"rank {rank} cannot connect to the other ranks: {error}; {way_out}") from error


def _wait_for_ranks(store: Store, rank: int, world_size: int) -> None:
    """Wait until every rank has started. Over the store, which needs neither gloo nor NCCL."""
    store.set(f"started/{rank}", "")
    deadline = time.monotonic() + ANSWER_SECONDS
    missing = set(range(world_size))
    while missing:
        missing = {other for other in missing if not store.check([f"started/{other}"])}
        if missing and time.monotonic() > deadline:
            ranks = ", ".join(map(str, sorted(missing)))
            raise RuntimeError(f"no answer from rank {ranks} of {world_size} within {ANSWER_SECONDS:.0f} s")
        time.sleep(0.1 if missing else 0.0)


def interface_towards(master: str) -> str | None:
    """Return the network interface by which this node reaches the master node; None if it cannot be told.

    gloo would take the one of the host name, and Debian and Ubuntu give that the address 127.0.1.1.
    """
    address = _own_address_towards(master)
    if address and address.is_loopback and not _is_loopback(master):
        address = _own_address_towards("192.0.2.1")  # this is the master: by the default route. Nothing is sent.
    return next((name for _, name in socket.if_nameindex() if address and _address_of(name) == address), None)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _own_address_towards(host: str) -> ipaddress.IPv4Address | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return None
        return ipaddress.IPv4Address(probe.getsockname()[0])


def _address_of(interface: str) -> ipaddress.IPv4Address | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None  # it has none
    return ipaddress.IPv4Address(answer[20:24])


def _gpus_of_slot() -> str:
    """Return the UUIDs of the GPUs that a worker gave this process; "" if none, or if it was started by hand."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible if visible.startswith(("GPU-", "MIG-")) else ""


def _keep_freed_memory() -> None:
    """glibc would give gradients and logits back to the kernel each step and pay for their pages anew: a tenth of
    it. Huge pages instead are no slower only until memory is in pieces."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks from the heap as well
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: which is never cut


def close() -> None:
    if c10d.is_initialized():
        c10d.destroy_process_group()
