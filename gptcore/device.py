"""What a rank runs on, and which precision and compile mode are right for it."""

import gc
import os
import platform
import resource
import shutil
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

import torch

from gptcore.cgroup import memory_bytes
from gptcore.compiler import compile_a_kernel
from gptcore.dist import Dist
from gptcore.plan import Hardware
from gptcore.spec import ModelSpec, TrainSpec

# Below this much work a CPU run ends no sooner compiled: that takes 25 to 50 s, measured in docs/benchmarks.md
CPU_COMPILE_FLOPS = 1e14
# Above this much saved a graph of its own for evaluations, compiled in about 15 s, pays: at 1e12 and 4e14 FLOP/s
EVALUATION_COMPILE_FLOPS = {"cpu": 1.5e13, "cuda": 6e15}


def hardware(dist: Dist) -> Hardware:
    """This node as `plan` wants it; the ranks that run are those that fit."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if dist.device.type == "cuda":
        properties = torch.cuda.get_device_properties(dist.device)
        return Hardware(
            device="cuda", device_name=properties.name, ranks=local_ranks, memory_bytes=properties.total_memory
        )
    return Hardware(device="cpu", device_name=_cpu_name(), ranks=local_ranks, memory_bytes=memory_bytes())


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def resolve_precision(asked: str, device: torch.device) -> tuple[str, str]:
    """ "auto" is bf16 where the device multiplies it natively, else fp32. And a notice where what is asked is slow."""
    native = multiplies_bf16(device)
    if asked == "auto":
        return "bf16" if native else "fp32", ""
    if asked == "fp32" or native:
        return asked, ""
    return asked, f"precision bf16: this {device.type} has no instructions for it and is many times slower than in fp32"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether it has instructions for that; a device that has none may still take bfloat16, and imitates it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_compile(spec: TrainSpec, dist: Dist, total_flops: float) -> tuple[bool, str]:
    """Return whether all ranks compile, and a notice for the user if that is not what the spec asked for.

    total_flops: of one rank. All ranks must call.
    """
    if spec.compile is False:
        return False, ""
    if spec.compile == "auto" and dist.device.type == "cpu" and total_flops <= CPU_COMPILE_FLOPS:
        return False, ""
    problem = compiler_problem(dist.device.type)
    if dist.any(bool(problem)):
        problem = problem or "torch.compile does not work on another rank"
        return False, f"{problem}: training runs eager, which is slower"
    return True, ""


@cache
def compiler_problem(device_type: str) -> str:
    """Return why torch.compile does not work here, "" if it does. Asked once a process, by compiling a small kernel.

    A compiler on the PATH says little: its folder for temporary files may forbid execution, its cache may be read-only.
    """
    if not _has_compiler():
        return "no C++ compiler (g++ or clang++) on the PATH, or no Python headers (python3-dev)"
    cache_folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()
    try:  # before torch's compiler is imported: that fails half-way without it
        Path(cache_folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_folder):
            pass
    except OSError as error:
        return f"the compiler's cache cannot be written ({error}); set TORCHINDUCTOR_CACHE_DIR to a folder that can"
    try:
        compile_a_kernel(torch.device(device_type))
    except Exception as error:  # noqa: BLE001 - whatever the compiler, the linker, the loader or the disk raises
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        return f"torch.compile does not work here ({type(error).__name__}: {reason[:300]})"
    return ""


def evaluation_graph_pays(model: ModelSpec, tokens: int, device_type: str) -> bool:
    """Return whether to compile the model once more for `tokens` of evaluations on this rank, without gradients.

    The training graph computes the output matrix's gradients along with its loss: 4 more FLOPs a weight and token.
    """
    assert model.vocab_size is not None
    return 4.0 * model.padded_vocab_size * model.n_embd * tokens > EVALUATION_COMPILE_FLOPS[device_type]


def _has_compiler() -> bool:
    """What torch.compile builds its kernels with."""
    compiler = any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if name)
    return compiler and (Path(sysconfig.get_path("include")) / "Python.h").exists()


def release_memory(device: torch.device) -> None:
    """Give freed memory back, so that blocks of another size fit."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this rank has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
