"""Death signals and adoption: a child must not outlive its parent, a grandchild not be lost."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def python_module(module: str, *arguments: str) -> list[str]:
    """Return the command that runs one of our modules.

    Without -P, Python would import a file `worker.py` or `api.py` of the working directory in place of our package.
    Without -X utf8, it would read and write files in the encoding of the user's locale.
    """
    return [sys.executable, "-P", "-X", "utf8", "-m", module, *arguments]


def die_with_parent(signum: int = signal.SIGTERM, parent_pid: int | None = None) -> None:
    """Have the kernel send this process `signum` when its parent dies. Linux; elsewhere nothing.

    Call it in the child, right after it starts. The signal follows the parent's *thread*, so a
    parent starts such children from its main thread. With `parent_pid` given, a parent that died
    before the call is noticed, and this process ends at once.
    """
    if sys.platform != "linux":
        return
    _prctl(_PR_SET_PDEATHSIG, signum)
    if parent_pid is not None and os.getppid() != parent_pid:
        os.kill(os.getpid(), signum)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies. Linux; elsewhere nothing."""
    if sys.platform == "linux":
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")
