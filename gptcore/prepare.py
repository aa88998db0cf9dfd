"""Text to token shards.

Documents are parted by the tokenizer's `eot`, which stands before each. A document goes to
validation by the hash of its text: the splits share none, and adding a file moves no other. Documents without text are
left out.
Interrupted work goes on where it stopped: the state names the documents done and how much of each
open shard is theirs.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptcore.dataset import (
    BUILTIN,
    FINEWEB,
    HEADER_BYTES,
    TOKEN_BYTES,
    Dataset,
    Shard,
    Split,
    dataset_file,
    read_dataset,
    shard_header,
    shard_problem,
)
from gptcore.locks import exclusive
from gptcore.rundir import write_atomically
from gptcore.sources import Document, Source, hub_files, python_stdlib
from gptcore.tokenizer import Tokenizer, load_tokenizer

BATCH_CHARACTERS = 4_000_000  # tokenized between two saves of the state
LEAST_TOKENS = 9  # of a split: a window of the shortest context, and the token that it predicts last
BYTES = 'tokens of "bytes"; remove it, or use another tokenizer'
NOTHING = Split(tokens=0, bytes=0, documents=0, shards=[])
Progress = Callable[[int, int], None]  # documents done, tokens so far


class SplitWriter:
    """Tokens of one split into shards of at most `shard_tokens`; goes on behind what `split` says is written."""

    def __init__(self, folder: Path, name: str, shard_tokens: int, split: Split = NOTHING):
        self._folder, self._name, self._shard_tokens = folder, name, shard_tokens
        self.shards, self.documents = list(split.shards), split.documents
        self.tokens, self.bytes = split.tokens, split.bytes
        self._open_tokens = split.tokens - sum(shard.tokens for shard in split.shards)
        self._file = self._open()

    @property
    def _path(self) -> Path:
        """Of the open shard: no other's, so that what a killed process wrote behind its last state is written again."""
        return self._folder / f"{self._name}-{len(self.shards):05d}.bin"

    def _open(self) -> BinaryIO:
        """The open shard, cut back to what is known of it."""
        size = HEADER_BYTES + TOKEN_BYTES * self._open_tokens
        whole = not self._open_tokens or self._path.stat().st_size >= size
        assert whole, f"{self._path} lost its end; remove {self._folder} to begin anew"
        file = self._path.open("r+b" if self._open_tokens else "w+b")
        file.truncate(size)
        file.seek(size)
        return file

    def append(self, tokens: np.ndarray, text_bytes: int, begins: bool = True) -> None:
        """Write tokens (n,) uint16 over as many shards as they need. begins: they start a document."""
        self.documents += begins
        self.tokens += len(tokens)
        self.bytes += text_bytes
        while len(tokens):
            part = tokens[: self._shard_tokens - self._open_tokens]
            self._file.write(part.astype("<u2").tobytes())
            self._open_tokens += len(part)
            tokens = tokens[len(part) :]
            if self._open_tokens == self._shard_tokens:
                self._finish_shard()

    def _finish_shard(self) -> None:
        self._file.seek(0)
        self._file.write(shard_header(self._open_tokens))
        self._sync()
        self._file.close()
        self.shards.append(_shard(self._path, self._open_tokens))
        self._open_tokens = 0
        self._file = self._open()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def split(self) -> Split:
        """What is on the disk by now."""
        self._sync()
        return Split(tokens=self.tokens, bytes=self.bytes, documents=self.documents, shards=self.shards)

    def finish(self) -> Split:
        if self._open_tokens:
            self._finish_shard()
        split = self.split()
        self.close()
        self._path.unlink()  # the next shard's, which holds nothing
        return split

    def close(self) -> None:
        self._file.close()


def prepare(
    root: Path, name: str, source: Source, tokenizer_name: str, *, val_fraction: float = 0.01,
    max_tokens: int | None = None, shard_tokens: int = 100_000_000,
    progress: Progress = lambda documents, tokens: None,
) -> Dataset:  # fmt: skip
    """Write `root/name/` from a source's documents; an equal dataset that is there already is kept.

    Raises ValueError where another dataset has the name, or nothing is left for one of the splits.
    """
    settings = {
        "source": f"{source.fingerprint} {source.description}", "tokenizer": tokenizer_name,
        "val_fraction": val_fraction, "max_tokens": max_tokens, "shard_tokens": shard_tokens,
        "split_by": "text",
    }  # fmt: skip
    root.mkdir(parents=True, exist_ok=True)
    with exclusive(root / f".{name}.lock"):  # of two that prepare the same dataset the second finds it made
        final, folder = root / name, root / f".{name}.preparing"
        made, as_before = final / "settings.json", settings | {"source": source.fingerprint}  # until November 2026
        # and what versions made that split by name: a dataset that exists is kept
        as_made = [{k: v for k, v in s.items() if k != "split_by"} for s in (settings, as_before)]
        known = made.is_file() and json.loads(made.read_text("utf-8")) in (settings, *as_made)
        if known and (done := read_dataset(root, name)):
            return done
        if final.exists():
            raise _taken(root, name)
        tokenizer = load_tokenizer(tokenizer_name)
        splits = _write(folder, source, tokenizer, settings, progress)
        for split, found in splits.items():
            if found.tokens < LEAST_TOKENS:
                raise ValueError(
                    f"dataset {name}: {found.tokens or 'no'} tokens for {split}, of {LEAST_TOKENS} needed, "
                    f"from {source.description} "
                    f"({sum(s.documents for s in splits.values())} documents); give more text or another val_fraction"
                )
        dataset = _described(name, tokenizer, source.description, splits)
        write_atomically(dataset_file(folder.parent, folder.name), dataset.model_dump_json(indent=2))
        write_atomically(folder / "settings.json", json.dumps(settings))
        folder.rename(final)
        (final / "state.json").unlink()
        return dataset


def begun_commit(root: Path, name: str, repo: str, pattern: str) -> str | None:
    """Return the commit of a Hub dataset from which `root/name` was made, or is being made; None if it is not begun.

    A dataset keeps the commit it began with: interrupted work would otherwise start anew at each commit to the Hub.
    """
    for file in (root / name / "settings.json", root / f".{name}.preparing" / "state.json"):
        if file.is_file():
            saved = json.loads(file.read_text("utf-8"))
            source = saved.get("settings", saved)["source"]
            if match := re.match(rf"{re.escape(repo)}@([0-9a-f]{{40}})/{re.escape(pattern)}(?: |$)", source):
                return match[1]
    return None


def prepare_builtin(root: Path, name: str, progress: Progress = lambda documents, tokens: None) -> Dataset:
    """Make a dataset of `gptcore.dataset.BUILTIN`."""
    tokenizer, _ = BUILTIN[name]
    if name in FINEWEB:
        repo, pattern = FINEWEB[name]
        source = hub_files(repo, pattern, "text", begun_commit(root, name, repo, pattern))
        val_fraction = 0.001
    else:
        source, val_fraction = python_stdlib(), 0.05
    return prepare(root, name, source, tokenizer, val_fraction=val_fraction, progress=progress)


def adopt_shards(root: Path, name: str, folder: Path, tokenizer_name: str) -> Dataset:
    """A dataset from shards that exist already, llm.c's FineWeb ones among them: linked, not copied.

    A file whose name holds "val" is validation. Raises ValueError naming a damaged shard, or the
    split that none is for.
    """
    files = sorted(folder.glob("*.bin"))
    problems = [problem for path in files if (problem := shard_problem(path))]
    if problems:
        raise ValueError("; ".join(problems))
    tokenizer = load_tokenizer(tokenizer_name)
    splits = {}
    for split in ("train", "val"):
        own = [path for path in files if ("val" in path.name) == (split == "val")]
        if not own:
            raise ValueError(
                f'{folder} holds no shard for {split}: files *.bin, with "val" in a validation one\'s name'
            )
        splits[split] = _describe(own, tokenizer)
    dataset = _described(name, tokenizer, f"shards: {folder.name}", splits)
    root.mkdir(parents=True, exist_ok=True)
    with exclusive(root / f".{name}.lock"):
        if (made := read_dataset(root, name)) is not None and made != dataset:
            raise _taken(root, name)
        (root / name).mkdir(exist_ok=True)
        for path in files:
            link = root / name / path.name
            if link.resolve() != path.resolve():  # they may lie there already
                link.unlink(missing_ok=True)
                link.symlink_to(path.resolve())
        write_atomically(dataset_file(root, name), dataset.model_dump_json(indent=2))
    return dataset


def _described(name: str, tokenizer: Tokenizer, source: str, splits: dict[str, Split]) -> Dataset:
    return Dataset(name=name, tokenizer=tokenizer.name, vocab_size=tokenizer.vocab_size, source=source, **splits)


def _taken(root: Path, name: str) -> ValueError:
    """Runs may be training on it, and would resume on other data."""
    way_out = "use another name" + (f", or remove {root / name} first" if dataset_file(root, name).exists() else "")
    return ValueError(f"dataset {name} exists, made from other text or settings; {way_out}")


def _shard(path: Path, tokens: int) -> Shard:
    with path.open("rb") as file:
        return Shard(file=path.name, tokens=tokens, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _describe(files: list[Path], tokenizer: Tokenizer) -> Split:
    lengths, shards, text_bytes, documents = tokenizer.token_bytes(), [], 0, 0
    for path in files:
        tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)
        if int(tokens.max(initial=0)) >= tokenizer.vocab_size:
            raise ValueError(f"{path} holds token {tokens.max()}; {tokenizer.name} has {tokenizer.vocab_size} tokens")
        shards.append(_shard(path, len(tokens)))
        counts = np.bincount(tokens, minlength=tokenizer.vocab_size)
        text_bytes += int(counts @ lengths)
        documents += int(counts[tokenizer.eot])
    return Split(tokens=sum(s.tokens for s in shards), bytes=text_bytes, documents=documents, shards=shards)


def _write(
    folder: Path, source: Source, tokenizer: Tokenizer, settings: dict[str, Any], progress: Progress
) -> dict[str, Split]:
    state = _saved_state(folder, settings)
    shard_tokens, max_tokens = settings["shard_tokens"], settings["max_tokens"]
    documents, last_split = state.get("documents", 0), state.get("last_split", "train")
    written = {s: Split.model_validate(state.get(s, NOTHING)) for s in ("train", "val")}
    writers = {s: SplitWriter(folder, s, shard_tokens, split) for s, split in written.items()}
    lengths = tokenizer.token_bytes()
    try:
        for batch in _batches(source.read(documents), BATCH_CHARACTERS):
            room = max_tokens and max_tokens - sum(writer.tokens for writer in writers.values())
            if room is not None and room <= 0:
                break
            for document, encoded in zip(batch, _encode_all(tokenizer, batch), strict=True):
                if not document.text:  # a row without text: a bare separator would teach nothing
                    continue
                if "\0" in document.text and tokenizer.eot == 0:
                    raise ValueError(f"{document.name} holds a NUL character, which separates documents in {BYTES}")
                split = "val" if _share(document.text) < settings["val_fraction"] else "train"
                if document.continues and not document.divides:
                    split = last_split
                follows = document.continues and split == last_split
                last_split = split
                # no separator where a document was only cut for size; the last is cut, so that max_tokens is exact
                tokens = encoded[int(follows) :][:room]
                room = room and room - len(tokens)
                writers[split].append(tokens, int(lengths[tokens].sum()), begins=not follows)
                if room == 0:
                    break
            documents += len(batch)
            saved = {s: writer.split().model_dump() for s, writer in writers.items()}
            saved |= {"settings": settings, "documents": documents, "last_split": last_split}
            write_atomically(folder / "state.json", json.dumps(saved))
            progress(documents, sum(w.tokens for w in writers.values()))
        return {split: writer.finish() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()


def _encode_all(tokenizer: Tokenizer, batch: list[Document]) -> Iterator[np.ndarray]:
    """Each document's tokens with `eot` before them. tiktoken lets go of the lock, so threads do."""
    eot = np.array([tokenizer.eot], dtype=np.uint16)
    with ThreadPoolExecutor() as pool:
        for tokens in pool.map(lambda document: tokenizer.encode(document.text), batch):
            yield np.concatenate((eot, tokens))


def _batches(documents: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += len(document.text)
        if held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _share(text: str) -> float:
    """Return a document's place in [0, 1), from its text alone: equal documents land in one split."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big") / 2**64


def _saved_state(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What an interrupted call with the same settings left; else an empty folder and {}."""
    path = folder / "state.json"
    if path.is_file():
        state: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if state["settings"] == settings:
            return state
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return {}
