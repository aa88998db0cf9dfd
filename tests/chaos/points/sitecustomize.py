"""Crash points and switched-off guards for the processes of a chaos world; the product has no hook for them.

Python imports this module at start when its folder stands on PYTHONPATH. TRAINMASTER_CHAOS names the
world's folder: `armed/POINT.N.skip` lets the point pass once, `armed/POINT.N.kill` has the process
that reaches it kill itself, `armed/POINT.N.freeze` freezes the process whose id it holds. A file is
taken by removing it, so it works once, in one process. TRAINMASTER_CHAOS_WITHOUT names the guard that
is off. Both change a module right after its import; one that runs as `__main__` is out of reach.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

WORLD = Path(os.environ.get("TRAINMASTER_CHAOS", "/nonexistent"))
WITHOUT = os.environ.get("TRAINMASTER_CHAOS_WITHOUT", "")
Change = Callable[[Any], None]


def reach(point: str) -> None:
    """Die here, if this point is armed for now."""
    folder = WORLD / "armed"
    for path in sorted(folder.glob(f"{point}.*")) if folder.is_dir() else []:
        pid = path.read_text() if path.suffix == ".freeze" else ""
        try:
            path.unlink()
        except FileNotFoundError:  # another process was quicker
            continue
        if path.suffix == ".kill":
            (WORLD / "fired").mkdir(exist_ok=True)
            (WORLD / "fired" / point).write_text(f"{time.time()} {os.getpid()}")
            os.kill(os.getpid(), signal.SIGKILL)
        if pid:
            os.kill(int(pid), signal.SIGSTOP)
        return


def before(owner: Any, name: str, point: str) -> None:
    def made(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            reach(point)
            return call(*args, **named)

        return wrapped

    _wrap(owner, name, made)


def after(owner: Any, name: str, point: str) -> None:
    def made(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            answer = call(*args, **named)
            if answer:  # a claim that was refused, a look that found nothing: not what is meant
                reach(point)
            return answer

        return wrapped

    _wrap(owner, name, made)


def _wrap(owner: Any, name: str, made: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    setattr(owner, name, made(getattr(owner, name)))


# ---- crash points


def _tasks(module: Any) -> None:
    def hand_over(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> None:
            reach("after-reserve")  # the ticket is in the outbox, RQ has not heard of it
            call(*args, **named)
            reach("after-enqueue")  # RQ has it and the outbox too

        return wrapped

    _wrap(module, "hand_over", hand_over)


def _launch(module: Any) -> None:
    before(module, "run", "after-pop")


def _store(module: Any) -> None:
    after(module.Store, "claim", "after-claim")
    before(module.Store, "create_job", "before-create")


def _shipper(module: Any) -> None:
    after(module.Shipper, "send", "after-ship")


def _checkpoint(module: Any) -> None:
    before(module.Saver, "_retire", "after-rename")
    before(module, "write_tensors", "mid-checkpoint")


def _events(module: Any) -> None:
    def made(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(self: Any, event: Any) -> None:
            call(self, event)
            if isinstance(event, module.TERMINAL):
                reach("after-last-event")

        return wrapped

    _wrap(module.JsonlReport, "__call__", made)


POINTS: dict[str, Change] = {
    "worker.tasks": _tasks,
    "worker.launch": _launch,
    "worker.store": _store,
    "worker.shipper": _shipper,
    "gptcore.checkpoint": _checkpoint,
    "gptcore.events": _events,
}


# ---- how the changes get in


def _guard_off() -> dict[str, Change]:
    if not WITHOUT:
        return {}
    import guards_off  # type: ignore[import-not-found]  # beside this file

    changes: dict[str, Change] = guards_off.GUARDS[WITHOUT]
    return changes


class _Changed(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, changes: list[Change]):
        self._loader, self._changes = loader, changes

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for change in self._changes:
            change(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # get_code and get_source, for runpy and tracebacks


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self._tables = [POINTS, _guard_off()]

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        changes = [table[name] for table in self._tables if name in table]
        if not changes:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Changed(spec.loader, changes)
                return spec
        return None


if "TRAINMASTER_CHAOS" in os.environ:
    sys.meta_path.insert(0, _Finder())
