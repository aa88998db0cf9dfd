"""The local Redis's append-only file after a power loss: where it is whole, and what is cut off.

Redis reads such a file to its end at each start. It accepts a last command that was cut short, but not the zero
bytes that a file system leaves where data did not reach the disk, and the bundled server has no tool for it.
"""

import logging
import re
import shutil
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger("trainmaster")


def newest(folder: Path) -> Path | None:
    """Return the file that the server in `folder` appends to, None before its first start."""
    files = [*folder.glob("appendonlydir/*.incr.aof"), *folder.glob("appendonly.aof")]  # since Redis 7; before
    return max(files, key=lambda file: file.stat().st_mtime, default=None)


def repair(folder: Path) -> None:
    """Cut off zero bytes at the end of the file, and the command before them that they cut short; keep a copy.

    Reads the whole file only if its last byte is zero. The server must not run.
    """
    path = newest(folder)
    if path is None or not _ends_in_zero(path):
        return
    with path.open("rb") as file:
        whole = whole_bytes(file)
        file.seek(whole)
        rest = file.read()
    zeros = len(rest) - len(rest.rstrip(b"\0"))
    if b"\0" in rest[:-zeros]:  # a hole, with commands behind it that would be lost: see `advice`
        return
    copy = folder / f"{path.name}.damaged"
    shutil.copy2(path, copy)
    with path.open("r+b") as file:
        file.truncate(whole)
    log.warning("%s ended in %d zero bytes, as after a power loss, and was cut; the whole is in %s", path, zeros, copy)


def advice(folder: Path) -> str:
    """Return what to do about a damaged file that the server refuses, "" if it is whole."""
    path = newest(folder)
    if path is None:
        return ""
    with path.open("rb") as file:
        whole = whole_bytes(file)
    size = path.stat().st_size
    if whole == size:
        return ""
    return (
        f"{path} is damaged from byte {whole:,} of {size:,} on. To start without what follows: "
        f"cp {path} {folder}, then truncate -s {whole} {path}"
    )


def whole_bytes(file: BinaryIO) -> int:
    """Return the length of the leading part that holds whole commands: *N, then N times $LENGTH and that many bytes."""
    whole = 0
    while (count := _number(file, b"*")) is not None:
        for _ in range(count):
            length = _number(file, b"$")
            if length is None or len(data := file.read(length + 2)) < length + 2 or data[-2:] != b"\r\n":
                return whole
        whole = file.tell()
    return whole


def _number(file: BinaryIO, kind: bytes) -> int | None:
    found = re.fullmatch(rb"(.)(\d{1,10})\r\n", file.readline(20))
    return int(found[2]) if found and found[1] == kind else None


def _ends_in_zero(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        return file.read(1) == b"\0"
