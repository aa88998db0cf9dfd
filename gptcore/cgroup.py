"""What a container or a batch system lets this process have of its machine, by Linux's control groups."""

import os
from collections.abc import Iterator
from pathlib import Path

MEMBERSHIP, MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def memory_bytes() -> int:
    """Of the machine, or of this process's groups where they have less: over it the kernel kills."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = [*_settings("memory.max"), *_settings("memory.limit_in_bytes")]  # version 2, version 1
    return min([machine, *(int(text) for text in found if text.isdecimal())])


def most_threads() -> int | None:
    """As many as may always run at once; None: no limit. More would all stand still together, over and over."""
    found = [*zip(_settings("cpu.cfs_quota_us"), _settings("cpu.cfs_period_us"), strict=True)]
    found += [(quota, period) for quota, period in map(str.split, _settings("cpu.max"))]
    shares = [int(quota) / int(period) for quota, period in found if quota.isdecimal()]
    return max(1, int(min(shares))) if shares else None


def _settings(file: str) -> Iterator[str]:
    """What a file of this name says in each group that this process is in, and in those around it."""
    for line in MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.exists() else []:
        _, controllers, group = line.split(":", 2)
        root = MOUNTED / controllers  # none in version 2
        own = root / group.lstrip("/")
        for folder in (own, *own.parents):
            # in a container the path may be the host's: then the root is its own group
            if folder.is_relative_to(root) and (folder / file).is_file():
                yield (folder / file).read_text().strip()
