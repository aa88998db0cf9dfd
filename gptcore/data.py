"""Token shards to batches. Where a run stands in its data is one number, so resuming is exact.

A window is block_size + 1 neighbouring tokens of one shard; windows overlap by the one token that
is target of the first and input of the next. Sequence number g of a run is window
`permuted(g mod windows)` of epoch `g div windows`: every full window once an epoch, whatever the
number of ranks.
"""

import itertools
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptcore.dataset import HEADER_BYTES, Split, shard_problem
from gptcore.dist import Dist
from gptcore.spec import Problem, SpecError

Batch = tuple[Tensor, Tensor]  # tokens, targets (B, T) int64
PREFETCHED_BATCHES = 4
OPEN_SHARDS = 256  # of one split, at once


class Windows:
    """The windows of one split's shards, memory-mapped. Raises SpecError naming a damaged shard."""

    def __init__(self, folder: Path, split: Split, block_size: int):
        problems = [p for shard in split.shards if (p := shard_problem(folder / shard.file))]
        if problems:
            raise SpecError([Problem(pointer="/data/dataset", message=p) for p in problems])
        self.block_size = block_size
        self._files = [folder / shard.file for shard in split.shards]
        # each map holds a file descriptor, and a process may often have no more than 1,024
        self._shard = lru_cache(OPEN_SHARDS)(self._map)
        counts = [max(0, (shard.tokens - 1) // block_size) for shard in split.shards]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self.count = int(self._ends[-1]) if counts else 0

    def _map(self, number: int) -> np.ndarray:
        return np.memmap(self._files[number], dtype="<u2", mode="r", offset=HEADER_BYTES)

    def read(self, indices: np.ndarray) -> Batch:
        """Window numbers (B,) → tokens, targets (B, T) int64."""
        T = self.block_size
        rows = np.empty((len(indices), T + 1), dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            shard = int(np.searchsorted(self._ends, index, side="right"))
            first = self._ends[shard - 1] if shard else 0
            start = int(index - first) * T
            row[:] = self._shard(shard)[start : start + T + 1]
        block = torch.from_numpy(rows)
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()


def permuted(indices: np.ndarray, count: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """A shuffle of 0 … count - 1 computed at single points: indices (B,), epoch (B,) → (B,) int64.

    A four-round Feistel network over the next power of four, walked until it lands inside
    (Black & Rogaway 2002): a bijection without a table, so ten million windows cost no memory.
    """
    half_bits = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    key = (np.uint64(seed & (2**64 - 1)) ^ _mix(epoch.astype(np.uint64))).astype(np.uint64)
    value = indices.astype(np.uint64)
    outside = np.ones(len(value), dtype=bool)
    while outside.any():
        left, right = value[outside] >> shift, value[outside] & mask
        for turn in range(1, 5):
            salt = key[outside] + np.uint64(turn * 0x9E3779B97F4A7C15 % 2**64)
            left, right = right, left ^ (_mix(right ^ salt) & mask)
        value[outside] = (left << shift) | right
        outside = value >= np.uint64(count)
    return value.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): each bit of x moves every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Sequence:
    """The endless order in which a run sees its windows."""

    windows: Windows
    seed: int

    def read(self, first: int, count: int) -> Batch:
        """Sequences `first` … `first + count - 1` of the run → tokens, targets (count, T) int64."""
        position = np.arange(first, first + count, dtype=np.int64)
        epoch, index = np.divmod(position, self.windows.count)
        return self.windows.read(permuted(index, self.windows.count, self.seed, epoch))


class Prefetcher:
    """One rank's micro-batches from where `seek` says, read ahead by a thread into pinned memory.

    A step's global batch is `sequences_per_step` consecutive sequences; rank r takes the r-th equal
    part, in micro-batches. So another number of ranks sees the same global batches.
    """

    def __init__(self, sequence: Sequence, dist: Dist, *, sequences_per_step: int, micro_batch_size: int):
        self._sequence, self._dist = sequence, dist
        self._sequences_per_step, self._micro_batch_size = sequences_per_step, micro_batch_size
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")

    def seek(self, position: int) -> None:
        """Go on from this sequence of the run, whatever was read ahead."""
        share = self._sequences_per_step // self._dist.world_size
        self._starts = (
            first + self._dist.rank * share + offset
            for first in itertools.count(position, self._sequences_per_step)
            for offset in range(0, share, self._micro_batch_size)
        )
        self._ready = deque(self._ask() for _ in range(PREFETCHED_BATCHES))

    def _ask(self) -> Future[Batch]:
        return self._pool.submit(self._read, next(self._starts))

    def _read(self, start: int) -> Batch:
        tokens, targets = self._sequence.read(start, self._micro_batch_size)
        return (tokens.pin_memory(), targets.pin_memory()) if self._dist.device.type == "cuda" else (tokens, targets)

    def take(self) -> Batch:
        """The next micro-batch, on the device; waits where the disk is slower than the model."""
        self._ready.append(self._ask())
        tokens, targets = self._ready.popleft().result()
        return tokens.to(self._dist.device, non_blocking=True), targets.to(self._dist.device, non_blocking=True)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
