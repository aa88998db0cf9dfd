"""What switches a guard off still finds it; that each is needed, `python -m tests.chaos --guards` shows."""

from __future__ import annotations

import subprocess
import sys

# a process of one thread, so that it may fork: what is switched off stays off
EACH_APART = """
import os
from importlib import import_module
from tests.chaos.points.guards_off import GUARDS

for guard, changes in GUARDS.items():
    modules = [import_module(name) for name in changes]
    child = os.fork()
    if child == 0:
        for module, change in zip(modules, changes.values()):
            change(module)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(guard)
"""


def test_each_guard_can_still_be_switched_off() -> None:
    done = subprocess.run([sys.executable, "-c", EACH_APART], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), f"moved: {done.stdout}\n{done.stderr}"
