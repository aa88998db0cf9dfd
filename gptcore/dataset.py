"""What a dataset is: a folder of token shards and a `dataset.json` that describes them.

Shards are llm.c's: 256 little-endian int32 (magic 20240520, version 1, token count), then uint16
tokens. No tensor and no numpy here: the API reads these descriptions too.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from gptcore.presets import closest
from gptcore.spec import SpecError, refusal

Tokenizer = Literal["bytes", "gpt2"]
MAGIC = 20240520
HEADER_BYTES = 256 * 4
TOKEN_BYTES = 2
VOCAB_SIZES = {"bytes": 256, "gpt2": 50257}
# built-in datasets are prepared on first use: name → (tokenizer, what it is)
BUILTIN: dict[str, tuple[Tokenizer, str]] = {
    "python-stdlib": ("bytes", "the Python standard library's own source, as bytes"),
    "fineweb-10bt": ("gpt2", "FineWeb's sample of 10 billion tokens, streamed from the Hub, in GPT-2's BPE"),
    "fineweb-edu-10bt": ("gpt2", "FineWeb-Edu's sample of 10 billion tokens, streamed, in GPT-2's BPE"),
    "python-stdlib-gpt2": ("gpt2", "the Python standard library's own source, in GPT-2's BPE"),
}

# folders beside the datasets: the harness's own tasks, the text that prepare jobs read, HellaSwag's items
RESERVED = ("lm_eval", "sources", "hellaswag")
# where they lie on the Hub: repository, files
FINEWEB = {
    "fineweb-10bt": ("HuggingFaceFW/fineweb", "sample/10BT/*.parquet"),
    "fineweb-edu-10bt": ("HuggingFaceFW/fineweb-edu", "sample/10BT/*.parquet"),
}


class Shard(BaseModel, frozen=True):
    file: str
    tokens: int
    sha256: str


class Split(BaseModel, frozen=True):
    tokens: int
    bytes: int  # of text, for bits per byte
    documents: int
    shards: list[Shard]


class Dataset(BaseModel, frozen=True):
    """`dataset.json`."""

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    source: str
    train: Split
    val: Split

    @property
    def sha256(self) -> str:
        """Of what a model sees: the tokenizer and each split's tokens, in order."""
        seen = [self.tokenizer, *([shard.sha256 for shard in split.shards] for split in (self.train, self.val))]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def dataset_file(root: Path, name: str) -> Path:
    return root / name / "dataset.json"


def read_dataset(root: Path, name: str) -> Dataset | None:
    """The description of a prepared dataset; None where there is none yet."""
    path = dataset_file(root, name)
    if not path.is_file():
        return None
    try:
        return Dataset.model_validate_json(path.read_text("utf-8"))
    except ValidationError as error:
        raise refusal("/data/dataset", f"{path} is not a dataset.json: {error}") from error


def list_datasets(root: Path) -> list[Dataset]:
    """Every prepared dataset, by name. A damaged one is left to who asks for it."""
    found = []
    for path in sorted(root.glob("[!.]*/dataset.json")):
        with suppress(SpecError):
            found.append(read_dataset(root, path.parent.name))
    return [dataset for dataset in found if dataset is not None]


def tokenizer_of(root: Path, name: str) -> Tokenizer:
    """The tokenizer of a prepared or built-in dataset. Raises SpecError where there is neither."""
    if (dataset := read_dataset(root, name)) is not None:
        return dataset.tokenizer
    if name in BUILTIN:
        return BUILTIN[name][0]
    known = {*BUILTIN, *(d.name for d in list_datasets(root))}
    way_out = f"{closest(name, known)} or make it: trainmaster prepare {name} --text FILE"
    raise refusal("/data/dataset", f"dataset {name!r} is unknown; {way_out}")


def refuse_reserved(name: str, shards: bool, pointer: str = "/dataset") -> None:
    """Raise SpecError if other text may not take the name: a built-in dataset's, or a folder's with another purpose.

    shards: from token shards that exist. FineWeb's may come that way, for example from llm.c's script.
    """
    if name in RESERVED or (name in BUILTIN and not (shards and name in FINEWEB)):
        what = "a built-in dataset" if name in BUILTIN else "a folder with another purpose in the datasets root"
        raise refusal(pointer, f"dataset {name!r} is the name of {what}; use another name")


def tokenizer_of_checkpoint(root: Path, meta: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer that a run was trained with; `meta`: the state.json of its checkpoint.

    A checkpoint of an older version does not name it. Then it is its dataset's, or, if that is gone, the only one whose
    tokens fit the vocabulary: "bytes" below GPT-2's 50257.
    """
    recorded: Tokenizer | None = meta.get("tokenizer")
    if recorded in VOCAB_SIZES:
        return recorded
    spec = meta["spec"]
    try:
        return tokenizer_of(root, spec["data"]["dataset"])
    except SpecError:
        return "bytes" if spec["model"]["vocab_size"] < VOCAB_SIZES["gpt2"] else "gpt2"


def shard_header(tokens: int) -> bytes:
    return struct.pack("<3i", MAGIC, 1, tokens).ljust(HEADER_BYTES, b"\0")


def shard_problem(path: Path) -> str | None:
    """What is wrong with a shard file, from its header and size; None when nothing is."""
    if not path.is_file():
        return f"{path} is missing; prepare the dataset again"
    size = path.stat().st_size
    if size < HEADER_BYTES:
        return f"{path} has {size} bytes, fewer than a shard's header of {HEADER_BYTES}"
    with path.open("rb") as file:
        magic, version, tokens = struct.unpack("<3i", file.read(12))
    if magic != MAGIC or version != 1:
        return f"{path} is no token shard: magic {magic}, version {version}; wanted {MAGIC}, 1"
    if size != HEADER_BYTES + TOKEN_BYTES * tokens:
        return (
            f"{path} is truncated or padded: its header says {tokens} tokens, "
            f"{HEADER_BYTES + TOKEN_BYTES * tokens} bytes; it has {size}"
        )
    return None
