"""torch.compile for the trainer. Nothing loads it before something is compiled: two fifths of the start of a run that
compiles nothing were that."""

import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from gptcore.locks import exclusive
from gptcore.loss import in_graph

BUILDING = "_CxxBuild"  # ends the name of torch's folder for a build


def compile_loss(model: Any, **options: Any) -> Any:
    """What ends in `head_loss`, compiled when it is first called; torch.compile alone fails there."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    torch.compiler.allow_in_graph(in_graph)
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(True)  # tells the compiler too
    cache, headers = Path(cache_dir()), Path(default_cache_dir(), "precompiled_headers")
    discard_torn(headers.glob("*"), headers / "locks")
    discard_torn((path for path in cache.glob("*/*") if path.parent.name != headers.name), cache / "locks")
    return torch.compile(model, dynamic=False, **options)


def compile_a_kernel(device: torch.device) -> None:
    """Compile, load and run a small kernel. Raises whatever goes wrong.

    In a folder of its own inside the cache, which a kernel compiled earlier would hide a broken compiler in.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch._inductor.utils import fresh_cache

    if device.type == "cpu":
        pick_vec_isa()  # builds a program for each instruction set: once a machine, not each time in a new folder
    try:
        with fresh_cache(dir=cache_dir()):
            result = torch.compile(_small_kernel, dynamic=False)(torch.ones(64, device=device))
        assert float(result[0]) == 3.0, "a compiled kernel gave a wrong result"
    finally:
        torch._dynamo.reset()


def _small_kernel(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


def discard_torn(paths: Iterable[Path], locks: Path) -> None:
    """Remove what a kill, or the machine's end, left of the C++ compiler's work under the final name: torch, which
    only looks whether that is there, would use it at this and every later start."""
    for path in paths:
        with suppress(FileNotFoundError, PermissionError):  # another rank was sooner, or it is another user's
            if _is_torn(path):
                _discard(path, locks)


def _discard(path: Path, locks: Path) -> None:
    key, _, _ = path.name.removesuffix(BUILDING).partition(".")
    with exclusive(locks / f"{key}.lock"):  # torch's own, while it builds
        if _is_torn(path):
            for built in (*path.parent.glob(f"{key}*.so"), *path.parent.glob(f"{key}*.gch")):
                built.unlink()
            shutil.rmtree(path, ignore_errors=True)


def _is_torn(path: Path) -> bool:
    """The folder of a build is removed after it; a file whose content never reached the disk is empty."""
    is_empty = path.suffix in (".so", ".gch") and path.is_file() and not path.stat().st_size
    return is_empty or (path.name.endswith(BUILDING) and path.is_dir())
