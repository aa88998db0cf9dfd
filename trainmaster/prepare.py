"""`trainmaster prepare`: a dataset made on this machine, with a progress bar."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from gptcore.dataset import Dataset
from gptcore.prepare import adopt_shards
from gptcore.prepare import prepare as prepare_dataset
from gptcore.sources import Source, hub_files, jsonl_files, parquet_files, text_files


@dataclass(frozen=True)
class Asked:
    """What the command line gives. Exactly one of the sources is there."""

    text: list[Path]
    jsonl: list[Path]
    parquet: list[Path]
    shards: Path | None
    hub: str | None
    hub_files: str
    field: str

    def problem(self) -> str:
        """What is wrong with the choice of sources, or ""."""
        given = [name for name in ("text", "jsonl", "parquet", "shards", "hub") if getattr(self, name)]
        if len(given) == 1:
            return ""
        kinds = "--text, --jsonl, --parquet, --shards or --hub"
        return f"{' and '.join(f'--{name}' for name in given)} exclude each other" if given else f"give {kinds}"

    def source(self) -> Source:
        if self.hub is not None:
            return hub_files(self.hub, self.hub_files, self.field)
        if self.jsonl:
            return jsonl_files(self.jsonl, self.field)
        return parquet_files(self.parquet, self.field) if self.parquet else text_files(self.text)


def run_prepare(
    root: Path, name: str, asked: Asked, tokenizer: str, val_fraction: float, max_tokens: int | None, console: Console
) -> Dataset:
    """Raises FileNotFoundError and ValueError with a message for the user. Called again, it goes on."""
    if asked.shards is not None:
        return adopt_shards(root, name, asked.shards, tokenizer)
    columns = SpinnerColumn(), BarColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=max_tokens)

        def show(documents: int, tokens: int) -> None:
            said = f"{name}: {documents:,} documents, {tokens:,} tokens"
            progress.update(task, completed=tokens, description=said)

        return prepare_dataset(
            root, name, asked.source(), tokenizer,
            val_fraction=val_fraction, max_tokens=max_tokens, progress=show,
        )  # fmt: skip
