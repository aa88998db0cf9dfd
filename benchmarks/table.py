"""What every benchmark here prints and writes: rows as they come, each met or missed, and the machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]


def machine(packages: Iterable[str]) -> Row:
    """The machine, how busy it is, and the versions of `packages` that are installed."""
    info = Path("/proc/cpuinfo")
    described = [line.partition(":") for line in info.read_text().splitlines()] if info.exists() else []
    models = [value.strip() for name, _, value in described if name.strip() == "model name"]
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(psutil.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := _version(name))},
        "commit": git.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _short(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) >= 0.01 or not value else f"{value:.2e}"


class Table:
    """Rows to the terminal and to a JSON file as they come, so that a killed run leaves what it had."""

    def __init__(self, file: Path, packages: Iterable[str]):
        self._file = file
        self.rows: list[Row] = []
        self.machine = machine(packages)
        print(json.dumps(self.machine), flush=True)

    def row(self, what: str, value: float | None, unit: str, *, target: str = "", met: bool | None = None,
            **more: Any) -> None:  # fmt: skip
        """One figure. `met` is its verdict where it has a target; `more` goes to the file as it is."""
        verdict = "" if met is None else "met" if met else "MISSED"
        row = {"what": what, "value": value, "unit": unit, "target": target, "verdict": verdict} | more
        self.rows.append(row)
        number = "-" if value is None else _short(value)
        print(f"{what:<72} {number:>12} {unit:<12} {target:<14} {verdict}".rstrip(), flush=True)
        self._write()

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        beside = self._file.with_suffix(".tmp")
        # where a file lay on this machine says nothing on another
        command = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]
        beside.write_text(json.dumps({"command": command, "machine": self.machine, "rows": self.rows}, indent=1))
        beside.replace(self._file)

    @property
    def all_met(self) -> bool:
        return all(row["verdict"] != "MISSED" for row in self.rows)
