"""`trainmaster prepare`: a dataset made on this machine, with a progress bar."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from gptcore.dataset import Dataset
from gptcore.prepare import prepare as prepare_dataset
from gptcore.sources import Source


def run_prepare(
    root: Path, name: str, source: Source, tokenizer: str, val_fraction: float, max_tokens: int | None, console: Console
) -> Dataset:
    """Raises FileNotFoundError and ValueError with a message for the user. Called again, it goes on."""
    columns = SpinnerColumn(), BarColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=max_tokens)

        def show(documents: int, tokens: int) -> None:
            said = f"{name}: {documents:,} documents, {tokens:,} tokens"
            progress.update(task, completed=tokens, description=said)

        return prepare_dataset(
            root, name, source, tokenizer,
            val_fraction=val_fraction, max_tokens=max_tokens, progress=show,
        )  # fmt: skip
