import errno
import fcntl
import os
from pathlib import Path

import pytest

from gptcore.locks import LOCKS, exclusive, holder, is_held, shared


def test_locks_exclude_each_other_as_they_should(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with shared(path), shared(path):
        assert is_held(path)
    with exclusive(path):
        assert is_held(path)
    assert not is_held(path)


def test_a_lock_file_is_its_owners_alone_and_names_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch(0o644)  # as earlier versions made it
    assert holder(path) is None
    with exclusive(path):
        assert path.stat().st_mode & 0o777 == 0o600
        assert holder(path) == (os.getpid() if LOCKS.exists() else None)
    with shared(tmp_path / "new"):
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600


def test_a_lock_is_asked_for_as_nfs_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux asks there for what the file may be: shared only what can be read, alone only what can be written."""
    really = fcntl.flock

    def as_nfs(file: int, how: int) -> None:
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        wrong = os.O_WRONLY if how & fcntl.LOCK_SH else os.O_RDONLY
        if mode == wrong:
            raise OSError(errno.EBADF, "Bad file descriptor")
        really(file, how)

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    with shared(tmp_path / "lock"):
        assert is_held(tmp_path / "lock")
    with exclusive(tmp_path / "lock"):
        pass
