from pathlib import Path

import pytest

from gptcore import cgroup

MACHINE = cgroup.memory_bytes()


@pytest.fixture(autouse=True)
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(cgroup, "MOUNTED", tmp_path / "mounted")
    return tmp_path


def lie(groups: Path, membership: str, **files: str) -> None:
    (groups / "membership").write_text(membership)
    for name, text in files.items():
        path = groups / "mounted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_without_groups_the_whole_machine_is_there() -> None:
    assert cgroup.memory_bytes() > 0 and cgroup.most_threads() is None


def test_the_least_of_a_group_and_those_around_it_counts(groups: Path) -> None:
    files = {"a/b/memory.max": "max\n", "a/memory.max": "1048576\n", "a/b/cpu.max": "250000 100000\n"}
    lie(groups, "0::/a/b\n", **files, **{"a/cpu.max": "max 100000\n", "other/memory.max": "1\n"})
    assert (cgroup.memory_bytes(), cgroup.most_threads()) == (1048576, 2)


def test_the_groups_of_version_1_are_read_too(groups: Path) -> None:
    membership = "4:memory:/of/the/host\n2:cpu,cpuacct:/of/the/host\n1:name=systemd:/\n"
    cpu = {"cpu,cpuacct/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}
    lie(groups, membership, **{"memory/memory.limit_in_bytes": "2097152\n"}, **cpu)
    assert (cgroup.memory_bytes(), cgroup.most_threads()) == (2097152, 1)


def test_a_group_without_limits_takes_nothing_away(groups: Path) -> None:
    cpu = {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}
    lie(groups, "4:memory:/\n3:cpu:/\n", **{"memory/memory.limit_in_bytes": "9223372036854771712\n"}, **cpu)
    assert (cgroup.memory_bytes(), cgroup.most_threads()) == (MACHINE, None)
