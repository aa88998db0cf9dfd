"""`python -m tests.chaos --rounds 40 --seed 1`, `--guards`, `--without GUARD`"""

from __future__ import annotations

import argparse
import signal
import sys

from tests.chaos.gang import gang
from tests.chaos.guards import GUARDS, run_guards
from tests.chaos.kills import Blow
from tests.chaos.outage import outage
from tests.chaos.rounds import ORPHAN_SECONDS, run_rounds
from tests.chaos.submits import submit_many
from tests.chaos.watch import Watch
from tests.chaos.world import World


def main() -> int:
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(1))  # a world left half is cleared away
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--rounds", type=int, help="so many rounds of random kills")
    what.add_argument("--without", choices=GUARDS, help="switch off one guard and see its script turn red")
    what.add_argument("--guards", action="store_true", help="do so with each guard")
    what.add_argument("--outage", type=float, metavar="SECONDS", help="kill Redis for so long in mid-run")
    what.add_argument("--submits", type=int, metavar="N", help="submit so many jobs while services are killed")
    what.add_argument("--gang", action="store_true", help="jobs of one and two nodes on four agents, real torchrun")
    parser.add_argument("--seed", type=int, default=1, help="what rounds are drawn from")
    parser.add_argument("--intact", action="store_true", help="run the guards' scripts with all guards on")
    arguments = parser.parse_args()
    if arguments.rounds:
        return min(1, run_rounds(arguments.rounds, arguments.seed))
    if arguments.outage:
        return _outage(arguments.outage)
    if arguments.submits:
        return _submits(arguments.submits)
    if arguments.gang:
        return _gang()
    names = [arguments.without] if arguments.without else list(GUARDS)
    return min(1, run_guards(names, intact=arguments.intact))


def _outage(seconds: float) -> int:
    with World() as world, Watch(ORPHAN_SECONDS) as watch:
        away = outage(world, watch, 0.0, seconds)
    print(away)
    return _tell(away.violations)


def _submits(count: int) -> int:
    blows = [Blow("kill", "redis"), Blow("kill", "api"), Blow("freeze", "redis", seconds=7.0), Blow("kill", "redis")]
    with World() as world:
        done = submit_many(world, count, blows)
    print(f"{count} jobs in {done.seconds:.1f} s, the slowest acknowledged after {done.slowest_seconds:.1f} s")
    return _tell(done.violations)


def _gang() -> int:
    played = gang(real=True)
    print(f"{dict(played.statuses)} in {played.seconds:.0f} s, {played.samples} looks at the reservations")
    return _tell(played.violations)


def _tell(violations: list[str]) -> int:
    for violation in violations:
        print(f"VIOLATED: {violation}")
    print("all invariants hold" if not violations else f"{len(violations)} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    raise SystemExit(main())
