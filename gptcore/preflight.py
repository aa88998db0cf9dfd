"""Before the first step on several nodes: is a node far slower to reach than the rest?"""

import os
import statistics
import time

import torch
import torch.distributed as c10d

from gptcore.dist import Dist
from gptcore.events import Notice, Report

PROBE_BYTES = 8 * 2**20
SLOW_FACTOR = 3.0  # times the median of the nodes
SLOW_SECONDS = 0.05  # below this nothing is slow


def preflight(dist: Dist, report: Report) -> None:
    """Measure the links between nodes. That every rank answers, `dist.start` has seen. Nothing to do on one node."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", dist.world_size))
    if local_ranks == dist.world_size:
        return
    probe = torch.ones(PROBE_BYTES // 4, device=dist.device)
    assert float(dist.sum(probe)[0]) == dist.world_size, "an all-reduce gave a wrong sum"
    peers = range(local_ranks, dist.world_size, local_ranks)  # the first rank of each further node
    seconds = {peer // local_ranks: _there_and_back(dist, peer, probe) for peer in peers}
    usual = statistics.median(seconds.values())
    measured = ", ".join(f"node rank {node} {1000 * taken:.0f} ms" for node, taken in seconds.items())
    report(Notice(message=f"all {dist.world_size} ranks answer; 8 MiB to a node and back: {measured}"))
    for node, taken in seconds.items():
        if taken > max(SLOW_FACTOR * usual, SLOW_SECONDS):
            message = f"node rank {node} is slow to reach: {1000 * taken:.0f} ms where {1000 * usual:.0f} ms is usual"
            report(Notice(level="warning", message=message))


def _there_and_back(dist: Dist, peer: int, probe: torch.Tensor) -> float:
    """Seconds for rank 0 to send `probe` to `peer` and have it back: the second time, the connection made."""
    began = 0.0
    for _ in range(2):
        began = time.perf_counter()
        if dist.rank == 0:
            c10d.send(probe, peer)
            c10d.recv(probe, peer)
            float(probe[0])  # waits for a GPU to have it
        elif dist.rank == peer:
            c10d.recv(probe, 0)
            c10d.send(probe, 0)
    return time.perf_counter() - began
