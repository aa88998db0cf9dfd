"""Where a dataset's text comes from: named documents in a fixed order."""

import gzip
import hashlib
import json
import os
import platform
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePath
from typing import IO, Any, cast

from gptcore.hub_client import prepare_hub_client

UTF8 = "utf-8-sig"  # with a mark in front or without
SEPARATOR = "<|endoftext|>"  # a line of a text file
FEW_TEXTS = 20
PIECES = 128  # few texts are cut into about this many each, or validation would have whole texts or nothing
LEAST_PIECE, LARGEST_PIECE = 1024, 16_384  # characters
LARGEST_DOCUMENT_PIECE = 1_000_000  # characters of a document that is read at once


@dataclass(frozen=True)
class Document:
    name: str
    text: str
    continues: bool = False  # a further piece of the document before it, which was cut for its size
    divides: bool = True  # such a piece may go to another split than the one before it


@dataclass(frozen=True)
class Source:
    """Documents that come in the same order each time, so that counting them is a position."""

    description: str  # for people: stands in dataset.json
    fingerprint: str  # changes when the documents do
    read: Callable[[int], Iterator[Document]]  # from the n-th document on


def local_files(format: str, paths: list[Path], field: str) -> Source:
    """Files of "text", "jsonl" or "parquet", and all of it in the folders among `paths`."""
    if format == "text":
        return text_files(paths)
    return {"jsonl": jsonl_files, "parquet": parquet_files}[format](paths, field)


def text_files(paths: list[Path]) -> Source:
    """Return plain text, packed by gzip or not. A file is a document; a line `<|endoftext|>` ends one within it.

    Fewer than 20 files are cut into pieces at line ends, which may go to different splits. Line ends are kept.

    Raises FileNotFoundError naming what is not there.
    """
    files = _files(paths, "*.txt", "*.txt.gz")

    def read(path: Path) -> Iterator[Document]:
        return _documents(path, files[path], few=len(files) < FEW_TEXTS)

    return Source(f"text: {_names(paths)}", _fingerprint(files), partial(_one_by_one, files, read))


def jsonl_files(paths: list[Path], field: str) -> Source:
    """JSON lines, packed by gzip too; the text is in `field`. Raises ValueError naming file and line without it."""
    files = _files(paths, "*.jsonl", "*.jsonl.gz")

    def read(path: Path) -> Iterator[Document]:
        with _open_text(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield Document(f"{files[path]}:{number}", _field(path, number, line, field))

    return Source(f"jsonl: {_names(paths)}, field {field}", _fingerprint(files), partial(_one_by_one, files, read))


def parquet_files(paths: list[Path], field: str) -> Source:
    """Parquet tables; a row is a document, its text in column `field`."""
    files = _files(paths, "*.parquet")
    named = {str(path): name for path, name in files.items()}
    read = partial(_from_tables, named, partial(open, mode="rb"), field)
    return Source(f"parquet: {_names(paths)}, column {field}", _fingerprint(files), read)


def hub_files(repo: str, pattern: str, field: str, begun: str | None = None) -> Source:
    """Return Parquet files of a dataset on the Hugging Face Hub, read as they come: no copy is kept.

    pattern: a glob inside the repository, "sample/10BT/*.parquet". begun: the commit at which interrupted work reads;
    by default, and if the Hub has it no more, the newest one.
    Raises FileNotFoundError if nothing matches, and ValueError if HF_TOKEN or HF_ENDPOINT cannot be meant; the Hub
    client's own errors pass.
    """
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.errors import RevisionNotFoundError

    prepare_hub_client()
    try:
        commit = HfApi().dataset_info(repo, revision=begun).sha
    except RevisionNotFoundError:  # its history was rewritten
        commit = HfApi().dataset_info(repo).sha
    files = HfFileSystem()
    names = {str(name): PurePath(name).name for name in sorted(files.glob(f"datasets/{repo}@{commit}/{pattern}"))}
    if not names:
        raise FileNotFoundError(f"dataset {repo} holds no file {pattern}")
    read = partial(_from_tables, names, partial(files.open, mode="rb"), field)
    return Source(f"hub: {repo}@{commit} {pattern}, column {field}", f"{repo}@{commit}/{pattern}", read)


def python_stdlib() -> Source:
    """The Python standard library's own source: real text that every machine has.

    Tests and installed packages are left out, since distributions differ in them.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    found = sorted(p for p in folder.rglob("*.py") if not left_out & set(p.relative_to(folder).parts))
    files = {path: str(path.relative_to(folder)) for path in found}

    def read(path: Path) -> Iterator[Document]:
        yield Document(files[path], path.read_text(encoding="utf-8", errors="replace"))

    description = f"Python {platform.python_version()} standard library"
    return Source(description, _fingerprint(files), partial(_one_by_one, files, read))


def _one_by_one(files: Iterable[Path], read: Callable[[Path], Iterator[Document]], skip: int) -> Iterator[Document]:
    return islice((document for path in files for document in _named(path, read(path))), skip, None)


def _named(path: Path, documents: Iterator[Document]) -> Iterator[Document]:
    """The same; raises ValueError with the file's name where it is not text, or packed and damaged."""
    try:
        yield from documents
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}; unpack or convert it first") from error


def _open_text(path: Path) -> IO[str]:
    """Open a text file, packed by gzip or not, with its line ends kept."""
    if path.suffix == ".zst":
        raise ValueError(f"{path} is packed by zstd, which is not read here; unpack it (zstd -d) or use gzip")
    opener = gzip.open if path.suffix == ".gz" else open
    return cast(IO[str], opener(path, "rt", encoding=UTF8, newline=""))


def _from_tables(
    files: Mapping[str, str], open_file: Callable[[str], Any], field: str, skip: int
) -> Iterator[Document]:
    for name, known_as in files.items():
        with open_file(name) as file:
            import pyarrow.parquet

            try:
                table = pyarrow.parquet.ParquetFile(file)
            except pyarrow.ArrowInvalid as error:
                raise ValueError(f"{name} is no Parquet file: {error}") from error
            if field not in table.schema_arrow.names:
                raise ValueError(f"{name}: no column {field!r}; it has {', '.join(table.schema_arrow.names)}")
            kind = str(table.schema_arrow.field(field).type)
            if not kind.removeprefix("dictionary<values=").startswith(("string", "large_string")):
                raise ValueError(f"{name}: column {field!r} holds {kind}, not text; name another")
            try:
                for row, text in _rows(table, field, skip):
                    yield Document(f"{known_as}:{row}", text)
            except (pyarrow.ArrowException, OSError) as error:
                if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                    raise  # the disk or the Hub; Arrow's own has no number
                raise ValueError(f"{name} is damaged: {error}") from error
            skip = max(0, skip - table.metadata.num_rows)


def _rows(table: Any, field: str, skip: int) -> Iterator[tuple[int, str]]:
    """Row number and text from row `skip` on; row groups before it are not read."""
    first = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if skip < first + rows:
            # without pyarrow's threads: one that still holds the file as Python ends takes the process down
            texts = table.read_row_group(group, columns=[field], use_threads=False).column(field).to_pylist()
            begin = max(0, skip - first)
            yield from ((first + i, texts[i] or "") for i in range(begin, rows))
        first += rows


def _documents(path: Path, name: str, few: bool) -> Iterator[Document]:
    """Yield a text file's documents in pieces, so that no file is read whole.

    few: a file without separator lines gives pieces to both splits. Otherwise a document's pieces stay together.
    """
    characters = _characters_of_one_document(path) if few else None
    divides = characters is not None
    size = LARGEST_DOCUMENT_PIECE if characters is None else min(LARGEST_PIECE, max(LEAST_PIECE, characters // PIECES))
    held, length, offset, continues = list[str](), 0, 0, False
    for line, starts_line in _lines(path):
        is_separator = starts_line and line.rstrip("\r\n") == SEPARATOR
        full = length >= size and (starts_line or length >= 2 * size)  # within a line only if that is very long
        if held and (is_separator or full):
            yield Document(f"{name}@{offset}", "".join(held), continues, divides)
            held, length, offset, continues = [], 0, offset + length, True
        if is_separator:
            offset, continues = offset + len(line), False
        else:
            held.append(line)
            length += len(line)
    if held:
        yield Document(f"{name}@{offset}", "".join(held), continues, divides)


def _characters_of_one_document(path: Path) -> int | None:
    """Return the length of a text file; None if a separator line is in it."""
    characters = 0
    for line, starts_line in _lines(path):
        if starts_line and line.rstrip("\r\n") == SEPARATOR:
            return None
        characters += len(line)
    return characters


def _lines(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the lines of a text file, a long one in parts, and whether each starts a line.

    Raises ValueError if the file holds NUL characters.
    """
    with _open_text(path) as file:
        starts_line = True
        while line := file.readline(LEAST_PIECE):
            if "\0" in line:
                raise ValueError(f"{path} holds NUL characters, as text in UTF-16 does; convert it first")
            yield line, starts_line
            starts_line = line.endswith(("\n", "\r"))


def _field(path: Path, number: int, line: str, field: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get(field, row), str | None):
        fields = row.items() if isinstance(row, dict) else [("no fields", row)]
        has = ", ".join(f"{name} ({type(value).__name__})" for name, value in fields)
        raise ValueError(f"{path}, line {number}: no text in field {field!r}; it has {has}")
    return str(row[field] or "")


def _files(paths: list[Path], *patterns: str) -> dict[Path, str]:
    """The files meant, each path itself or all in a folder that match one, and what each is known as."""
    files: dict[Path, str] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        found = sorted(f for p in patterns for f in path.rglob(p) if f.is_file()) if path.is_dir() else [path]
        if not found:
            raise FileNotFoundError(f"{path} holds no file {' or '.join(patterns)}")
        files |= {file: str(file.relative_to(path)) if path.is_dir() else file.name for file in found}
    return files


def _names(paths: list[Path]) -> str:
    return ", ".join(os.fsencode(p.name).decode("utf-8", "replace") for p in paths)


def _fingerprint(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        stat = path.stat()
        digest.update(os.fsencode(path.resolve()) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
