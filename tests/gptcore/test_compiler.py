"""What a kill leaves in the compiler's cache stops no later run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gptcore.compiler import discard_torn
from gptcore.locks import exclusive

COMPILED = """
import torch
from gptcore.compiler import compile_loss
from gptcore.dist import start
start("cpu")
compile_loss(torch.sin)
assert torch._inductor.config.deterministic
print(float(compile_loss(lambda x: x.sin().sum())(torch.ones(1000))))
"""


def run_compiled(cache: Path) -> float:
    given = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=given, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [True, False])
def test_a_torn_build_is_made_again(tmp_path: Path, killed: bool) -> None:
    whole = run_compiled(tmp_path)
    sizes = {built: built.stat().st_size for built in tmp_path.glob("*/*.so")}
    for built, size in sizes.items():
        if killed:
            os.truncate(built, size // 2)
            built.with_name(f"{built.stem}_CxxBuild").mkdir()
        else:  # the machine ended, and the name alone had reached the disk
            os.truncate(built, 0)
    assert run_compiled(tmp_path) == whole
    assert {built: built.stat().st_size for built in tmp_path.glob("*/*.so")} == sizes != {}


@pytest.mark.parametrize(
    ("file", "folder"), [("k.main.so", "k.main_CxxBuild"), ("k.so", "k_CxxBuild"), ("h.h.gch", "h.h_CxxBuild")]
)
def test_of_a_torn_build_only_its_source_stays(tmp_path: Path, file: str, folder: str) -> None:
    (tmp_path / "locks").mkdir()
    for name in (file, "other.main.so", file.replace("so", "cpp")):
        (tmp_path / name).write_text("…")
    (tmp_path / folder).mkdir()
    discard_torn(list(tmp_path.iterdir()), tmp_path / "locks")
    left = {path.name for path in tmp_path.iterdir()} - {"locks"}
    assert left == {"other.main.so", file.replace("so", "cpp")} - {file}


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_what_another_rank_removed_first_or_another_user_left_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    (tmp_path / "locks").mkdir()
    torn = [tmp_path / f"{name}.main.so" for name in ("first", "second")]
    for path in torn:
        path.touch()
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path: unlink(path) if path != torn[0] else _fail(error))
    discard_torn(torn, tmp_path / "locks")
    assert [path.exists() for path in torn] == [True, False]


def _fail(error: type[OSError]) -> None:
    raise error


def test_a_build_under_way_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "locks").mkdir()
    building, built = tmp_path / "k.main_CxxBuild", tmp_path / "k.main.so"
    building.mkdir()
    built.touch()
    discarding = threading.Thread(target=discard_torn, args=([building, built], tmp_path / "locks"))
    with exclusive(tmp_path / "locks" / "k.lock"):
        discarding.start()
        discarding.join(0.2)
        assert discarding.is_alive() and built.exists()
        built.write_text("whole")
        building.rmdir()
    discarding.join(5)
    assert not discarding.is_alive() and built.read_text() == "whole"
