"""How near a plan comes: three examples with few steps on a fresh local stack, then each with half as many again.

    python benchmarks/plan.py [--steps 30] [--json FILE]

The first run of each is planned from the hardware alone, the second from the first. Parameters must be exact, the
checkpoint's size within 2 %, the second run's time within 25 %. The exit code is 1 where one is not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)  # the stack's processes run this tree too

from benchmarks.table import RESULTS, ROOT, Table
from trainmaster import Client
from trainmaster.stack import Stack
from worker.settings import Settings

EXAMPLES = ("demo", "gpt2-tiny", "qwen3-tiny")
MOST_OFF_BYTES, MOST_OFF_SECONDS = 0.02, 0.25
Json = dict[str, Any]


def run(client: Client, spec: Json) -> tuple[Json, float]:
    """The job as it ended, and the seconds that it took once it had started."""
    job = client.submit(spec)
    while job["finished_at"] is None:
        time.sleep(0.5)
        job = client.job(job["id"])
    assert job["status"] == "succeeded", job["error"]
    started, finished = (datetime.fromisoformat(job[name]) for name in ("started_at", "finished_at"))
    return job, (finished - started).total_seconds()


def compare(table: Table, client: Client, spec: Json, steps: int) -> None:
    name = spec["name"]
    job, seconds = run(client, spec | {"max_steps": steps})
    expected = job["plan"]["estimate"]["seconds"]
    table.row(f"{name}: {steps} steps planned from the hardware", expected["expected"], "s", real=seconds, **expected)
    events = list(client.events(job["id"]))
    parameters = next(event["parameters"] for event in events if event["type"] == "started")
    table.row(f"{name}: parameters", parameters, "", planned=job["plan"]["parameters"], target="as planned",
              met=parameters == job["plan"]["parameters"])  # fmt: skip
    saved = [event["bytes"] for event in events if event["type"] == "checkpointed"][-1]
    off = saved / job["plan"]["checkpoint_bytes"] - 1
    table.row(f"{name}: checkpoint against the plan", off, "of it more", bytes=saved,
              target=f"<= {MOST_OFF_BYTES}", met=abs(off) <= MOST_OFF_BYTES)  # fmt: skip
    job, seconds = run(client, spec | {"max_steps": steps + steps // 2})
    estimate = job["plan"]["estimate"]
    assert estimate["basis"] == "past_runs", estimate
    off = seconds / estimate["seconds"]["expected"] - 1
    table.row(f"{name}: {steps + steps // 2} steps, {seconds:.1f} s, against the plan from one run", off, "of it more",
              target=f"<= {MOST_OFF_SECONDS}", met=abs(off) <= MOST_OFF_SECONDS, real=seconds,
              **estimate["seconds"])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path, default=RESULTS / "plan.json")
    asked = parser.parse_args()
    table = Table(asked.json, ("torch", "fastapi"))
    with tempfile.TemporaryDirectory() as home, Stack(Settings(home=Path(home), device="cpu")) as stack:
        with Client(stack.url) as client:
            for name in EXAMPLES:
                spec = json.loads((ROOT / "examples" / f"{name}.json").read_text())
                spec["evaluate"] = spec.get("evaluate", {}) | {"every_steps": asked.steps // 2}
                compare(table, client, spec, asked.steps)
    return 0 if table.all_met else 1


if __name__ == "__main__":
    raise SystemExit(main())
