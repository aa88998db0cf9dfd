import math
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptcore.data import OPEN_SHARDS, Prefetcher, Sequence, Windows, permuted
from gptcore.dataset import HEADER_BYTES, MAGIC, Shard, Split, read_dataset
from gptcore.dist import Dist
from gptcore.evaluate import bits_per_byte
from gptcore.prepare import adopt_shards
from gptcore.spec import SpecError

CPU = torch.device("cpu")


def write_shard(path: Path, tokens: np.ndarray, magic: int = MAGIC) -> Shard:
    header = np.zeros(256, dtype="<i4")
    header[:3] = (magic, 1, len(tokens))
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    return Shard(file=path.name, tokens=len(tokens), sha256="")


def windows(folder: Path, *sizes: int, block_size: int = 4) -> Windows:
    """Shards of counting tokens, so that a window says where it is from."""
    first, shards = 0, []
    for number, size in enumerate(sizes):
        shards.append(write_shard(folder / f"{number}.bin", np.arange(first, first + size)))
        first += size
    return Windows(folder, Split(tokens=first, bytes=first, documents=1, shards=shards), block_size)


@given(count=st.integers(1, 3000), seed=st.integers(0, 2**62), epoch=st.integers(0, 9))
def test_the_shuffle_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    order = permuted(np.arange(count), count, seed, np.full(count, epoch))
    assert sorted(order.tolist()) == list(range(count))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    index = np.arange(1000)
    orders = {tuple(permuted(index, 1000, seed, np.full(1000, epoch))) for seed in (1, 2) for epoch in (0, 1)}
    assert len(orders) == 4
    assert tuple(range(1000)) not in orders
    # no visible order is left: neighbours are as far apart as in a random permutation
    jumps = np.abs(np.diff(permuted(index, 1000, 1, np.zeros(1000, dtype=np.int64))))
    assert 280 < jumps.mean() < 390


def drain(sequence: Sequence, position: int, steps: int, ranks: int, micro: int, per_step: int) -> list[list[int]]:
    """First tokens of every window by step, over all ranks in order."""
    found: list[list[int]] = [[] for _ in range(steps)]
    for rank in range(ranks):
        dist = Dist(rank, rank, ranks, CPU)
        batches = Prefetcher(sequence, dist, sequences_per_step=per_step, micro_batch_size=micro)
        batches.seek(position + 3)
        batches.take()
        batches.seek(position)  # what was read ahead counts no more
        for step in range(steps):
            for _ in range(per_step // ranks // micro):
                tokens, targets = batches.take()
                assert torch.equal(tokens[:, 1:], targets[:, :-1])
                found[step] += tokens[:, 0].tolist()
        batches.close()
    return found


@pytest.mark.parametrize(("ranks", "micro"), [(1, 4), (1, 1), (2, 2), (4, 1)])
def test_an_epoch_has_every_full_window_once_on_any_number_of_ranks(tmp_path: Path, ranks: int, micro: int) -> None:
    data = windows(tmp_path, 33, 18, 3, 29)  # 8 + 4 + 0 + 7 windows of 4, and what is left over
    assert data.count == 19
    steps = drain(Sequence(data, seed=5), 0, 19, ranks, micro, 4)  # four epochs
    seen = [start for step in steps for start in step]
    for epoch in range(4):
        assert sorted(seen[19 * epoch : 19 * (epoch + 1)]) == [
            *range(0, 32, 4), *range(33, 49, 4), *range(54, 82, 4)
        ]  # fmt: skip


def test_any_number_of_ranks_sees_the_same_global_batches(tmp_path: Path) -> None:
    sequence = Sequence(windows(tmp_path, 400), seed=1)
    one, two, four = (drain(sequence, 8, 5, ranks, 1, 8) for ranks in (1, 2, 4))
    assert one == two == four


def test_reading_goes_on_at_any_position(tmp_path: Path) -> None:
    sequence = Sequence(windows(tmp_path, 400), seed=1)
    assert drain(sequence, 0, 10, 1, 2, 8)[6:] == drain(sequence, 48, 4, 1, 2, 8)


def test_a_truncated_shard_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.bin", np.arange(100))
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-10])
    with pytest.raises(SpecError, match=r"a\.bin is truncated.*100 tokens"):
        Windows(tmp_path, Split(tokens=100, bytes=1, documents=1, shards=[shard]), 8)


def test_a_foreign_file_is_named_with_its_magic(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.bin", np.arange(100), magic=7)
    with pytest.raises(SpecError, match="no token shard: magic 7"):
        Windows(tmp_path, Split(tokens=100, bytes=1, documents=1, shards=[shard]), 8)


def test_shards_made_elsewhere_load_unchanged(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    tokens = np.array([50256, 15496, 995, 50256, 15496])
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"):
        write_shard(theirs / name, tokens)
    dataset = adopt_shards(tmp_path / "datasets", "fineweb", theirs, "gpt2")
    assert dataset.train.tokens == 10
    assert dataset.val.documents == 2
    assert dataset.val.bytes == len("Hello worldHello")
    tokens_read, _ = Windows(tmp_path / "datasets" / "fineweb", dataset.val, 4).read(np.array([0]))
    assert tokens_read.tolist() == [[50256, 15496, 995, 50256]]


def test_a_shard_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    for name in ("val.bin", "train.bin"):
        write_shard(tmp_path / name, np.array([1, 300]))
    with pytest.raises(ValueError, match="holds token 300; bytes has 256"):
        adopt_shards(tmp_path / "datasets", "x", tmp_path, "bytes")


def test_shards_that_cannot_be_taken_leave_the_name_free(tmp_path: Path) -> None:
    root, theirs = tmp_path / "datasets", tmp_path / "theirs"
    theirs.mkdir()
    write_shard(theirs / "train.bin", np.array([1, 2, 3]))
    with pytest.raises(ValueError, match="holds no shard for val"):
        adopt_shards(root, "x", theirs, "bytes")
    assert not (root / "x").exists()


def test_other_shards_do_not_replace_a_dataset(tmp_path: Path) -> None:
    root, theirs = tmp_path / "datasets", tmp_path / "theirs"
    theirs.mkdir()
    for name in ("train.bin", "val.bin"):
        write_shard(theirs / name, np.array([1, 2, 3]))
    made = adopt_shards(root, "x", theirs, "bytes")
    assert adopt_shards(root, "x", theirs, "bytes") == made
    write_shard(theirs / "more.bin", np.array([4, 5, 6]))
    with pytest.raises(ValueError, match="dataset x exists"):
        adopt_shards(root, "x", theirs, "bytes")
    assert read_dataset(root, "x") == made


def test_a_shard_header_is_the_one_that_other_trainers_write(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", np.arange(3))
    magic, version, count = struct.unpack("<3i", (tmp_path / "a.bin").read_bytes()[:12])
    assert (magic, version, count, HEADER_BYTES) == (20240520, 1, 3, 1024)


def test_more_shards_than_a_process_may_open_are_read(tmp_path: Path) -> None:
    many = windows(tmp_path, *[9] * 300)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + OPEN_SHARDS + 10, limits[1]))
    try:
        assert [many.read(np.array([2 * n]))[0][0, 0].item() for n in range(300)] == [9 * n for n in range(300)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_bits_per_byte_count_the_bytes_of_the_tokens_that_were_evaluated(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.bin", np.array([65] * 5 + [0] * 8))
    own = Windows(tmp_path, Split(tokens=13, bytes=5, documents=8, shards=[shard]), 4)
    assert bits_per_byte(math.log(2), own, 4, "bytes") == pytest.approx(1.0)
