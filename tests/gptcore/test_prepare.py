import errno
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import httpx2
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

import gptcore.prepare
from gptcore import prepare_job
from gptcore.dataset import HEADER_BYTES, Dataset
from gptcore.failure import describe
from gptcore.job_process import Process
from gptcore.prepare import prepare
from gptcore.rundir import RunDir
from gptcore.sources import Document, Source, jsonl_files, local_files, parquet_files, python_stdlib, text_files
from gptcore.spec import PrepareSpec, SpecError, parse_spec
from gptcore.tokenizer import load_tokenizer
from tests.gptcore.hellaswag_items import make_items

WORDS = "every good boy does fine, naïve café 你好 "


def made_up(count: int = 60, stop_at: int | None = None) -> Source:
    """Documents of different lengths; `stop_at` breaks off there, as a killed process would."""

    def read(skip: int) -> Iterator[Document]:
        for number in range(skip, count):
            if number == stop_at:
                raise KeyboardInterrupt
            yield Document(f"doc-{number}", f"{number} " + WORDS * (number % 7 + 1))

    return Source("made up", "v1", read)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def tokens_of(root: Path, dataset: Dataset, split: str) -> np.ndarray:
    shards = getattr(dataset, split).shards
    parts = [np.fromfile(root / dataset.name / s.file, dtype="<u2", offset=HEADER_BYTES) for s in shards]
    assert [len(p) for p in parts] == [s.tokens for s in shards]
    return np.concatenate(parts)


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_every_document_is_in_one_split_whole(tmp_path: Path, tokenizer: str) -> None:
    dataset = prepare(tmp_path, "d", made_up(), tokenizer, val_fraction=0.3, shard_tokens=1024)
    eot, decode = load_tokenizer(tokenizer).eot, load_tokenizer(tokenizer).decode
    texts: dict[str, list[str]] = {}
    for split in ("train", "val"):
        tokens = tokens_of(tmp_path, dataset, split)
        starts = np.flatnonzero(tokens == eot)
        texts[split] = [decode(part[1:].tolist()) for part in np.split(tokens, starts)[1:]]
        assert len(texts[split]) == getattr(dataset, split).documents > 0
    assert sorted(texts["train"] + texts["val"]) == sorted(d.text for d in made_up().read(0))
    assert dataset.train.bytes == sum(len(t.encode()) for t in texts["train"])
    assert len(dataset.train.shards) > 1


def test_interrupted_work_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptcore.prepare.BATCH_CHARACTERS", 500)
    options = {"val_fraction": 0.3, "shard_tokens": 700}
    whole = prepare(tmp_path / "whole", "d", made_up(), "bytes", **options)  # type: ignore[arg-type]
    for stop_at in (13, 37, 38):
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "parts", "d", made_up(stop_at=stop_at), "bytes", **options)  # type: ignore[arg-type]
        assert not (tmp_path / "parts" / "d").exists()
    begun: list[int] = []
    source = made_up()
    watched = Source("made up", "v1", lambda skip: begun.append(skip) or source.read(skip))  # type: ignore[func-returns-value]
    assert prepare(tmp_path / "parts", "d", watched, "bytes", **options) == whole  # type: ignore[arg-type]
    assert begun[0] > 20


@pytest.mark.parametrize("what", ["write_atomically", "_shard"])
def test_work_cut_off_between_any_two_writes_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr("gptcore.prepare.BATCH_CHARACTERS", 500)
    options = {"val_fraction": 0.3, "shard_tokens": 700}
    whole = prepare(tmp_path / "whole", "d", made_up(), "bytes", **options)  # type: ignore[arg-type]
    really, calls = getattr(gptcore.prepare, what), 0

    def cut_off(*given: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 1 + round:
            raise OSError(errno.ENOSPC, "no space left")
        return really(*given)

    monkeypatch.setattr(gptcore.prepare, what, cut_off)
    for round in range(100):
        root, calls = tmp_path / f"{round}", 0
        try:
            made = prepare(root, "d", made_up(), "bytes", **options)  # type: ignore[arg-type]
        except OSError:
            made = prepare(root, "d", made_up(), "bytes", **options)  # type: ignore[arg-type]
        else:
            break
        assert made == whole, f"cut off at call {round} of {what}"
        assert (tokens_of(root, made, "val") == tokens_of(tmp_path / "whole", whole, "val")).all()
    assert round > 5, "it was hardly cut off"


def test_a_shard_that_lost_what_was_saved_is_not_filled_up_with_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptcore.prepare.BATCH_CHARACTERS", 500)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, "d", made_up(stop_at=30), "bytes", val_fraction=0.3)
    os.truncate(tmp_path / ".d.preparing" / "train-00000.bin", 1100)
    with pytest.raises(AssertionError, match=r"train-00000\.bin lost its end; remove .*preparing to begin anew"):
        prepare(tmp_path, "d", made_up(), "bytes", val_fraction=0.3)


def test_an_equal_dataset_is_not_made_again(tmp_path: Path) -> None:
    first = prepare(tmp_path, "d", made_up(), "bytes", val_fraction=0.3)
    stamp = (tmp_path / "d" / first.train.shards[0].file).stat().st_mtime_ns
    assert prepare(tmp_path, "d", made_up(), "bytes", val_fraction=0.3) == first
    assert (tmp_path / "d" / first.train.shards[0].file).stat().st_mtime_ns == stamp


def test_a_dataset_that_an_older_version_made_is_kept(tmp_path: Path) -> None:
    first = prepare(tmp_path, "d", made_up(), "bytes", val_fraction=0.3)
    settings = tmp_path / "d" / "settings.json"
    settings.write_text(
        json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "split_by"} | {"source": "v1"})
    )
    assert prepare(tmp_path, "d", made_up(), "bytes", val_fraction=0.3) == first


def test_a_dataset_is_never_replaced_by_another_of_its_name(tmp_path: Path) -> None:
    first = prepare(tmp_path, "d", made_up(), "bytes", val_fraction=0.3)
    with pytest.raises(ValueError, match="dataset d exists, made from other text or settings; use another name"):
        prepare(tmp_path, "d", made_up(), "bytes", val_fraction=0.5)
    assert tokens_of(tmp_path, first, "train").size == first.train.tokens


def test_a_datasets_hash_is_that_of_what_a_model_sees(tmp_path: Path) -> None:
    first = prepare(tmp_path, "d", made_up(), "bytes", val_fraction=0.3)
    assert prepare(tmp_path, "e", made_up(), "bytes", val_fraction=0.3).sha256 == first.sha256
    others = [
        prepare(tmp_path / "other", "d", made_up(), "bytes", val_fraction=0.5),
        prepare(tmp_path / "gpt2", "d", made_up(), "gpt2", val_fraction=0.3),
        prepare(tmp_path / "less", "d", made_up(59), "bytes", val_fraction=0.3),
    ]
    assert len({first.sha256, *(other.sha256 for other in others)}) == 4


def test_max_tokens_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptcore.prepare.BATCH_CHARACTERS", 500)
    dataset = prepare(tmp_path, "d", made_up(), "bytes", val_fraction=0.3, max_tokens=2000)
    assert dataset.train.tokens + dataset.val.tokens == 2000
    with monkeypatch.context() as cut, pytest.raises(KeyboardInterrupt):
        cut.setattr("gptcore.prepare._shard", interrupt)  # all tokens are there by then
        prepare(tmp_path / "cut", "d", made_up(), "bytes", val_fraction=0.3, max_tokens=2000)
    assert prepare(tmp_path / "cut", "d", made_up(), "bytes", val_fraction=0.3, max_tokens=2000) == dataset


def test_a_source_with_nothing_for_validation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokens for val"):
        prepare(tmp_path, "d", made_up(2), "bytes", val_fraction=0.0001)


def test_one_long_text_is_cut_at_line_ends_for_both_splits(tmp_path: Path) -> None:
    text = tmp_path / "my.txt"
    text.write_text("\n".join(f"line {i} {WORDS}" for i in range(5000)))
    pieces = list(text_files([text]).read(0))
    assert len(pieces) > 10
    assert "".join(p.text for p in pieces) == text.read_text()
    assert all(p.text.endswith("\n") for p in pieces[:-1])
    made = prepare(tmp_path, "d", text_files([text]), "gpt2", val_fraction=0.3)
    assert made.val.tokens > 1000
    elsewhere = tmp_path / "elsewhere" / "my.txt"
    elsewhere.parent.mkdir()
    elsewhere.write_text(text.read_text())
    assert prepare(tmp_path, "e", text_files([elsewhere]), "gpt2", val_fraction=0.3).val == made.val


def rows_as_jsonl(folder: Path) -> Source:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": i, "body": f"text {i}"}) + "\n" for i in range(50)))
    return jsonl_files([path], "body")


def rows_as_parquet(folder: Path) -> Source:
    table = pyarrow.table({"id": range(50), "body": [f"text {i}" for i in range(50)]})
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=8)
    return parquet_files([folder / "rows.parquet"], "body")


def rows_as_gzip(folder: Path) -> Source:
    rows_as_jsonl(folder)
    path = folder / "packed" / "rows.jsonl.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress((folder / "rows.jsonl").read_bytes()))
    return jsonl_files([path.parent], "body")


@pytest.mark.parametrize("make", [rows_as_jsonl, rows_as_parquet, rows_as_gzip])
def test_rows_can_be_read_from_any_one_on(tmp_path: Path, make: Callable[[Path], Source]) -> None:
    source = make(tmp_path)
    rows = list(source.read(0))
    assert [r.text for r in rows] == [f"text {i}" for i in range(50)]
    for skip in (1, 8, 13, 49, 50):
        assert list(source.read(skip)) == rows[skip:]


def test_a_row_without_the_field_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: no text in field 'text'; it has txt"):
        list(jsonl_files([path], "text").read(0))
    rows_as_parquet(tmp_path)
    with pytest.raises(ValueError, match="no column 'text'; it has id, body"):
        list(parquet_files([tmp_path / "rows.parquet"], "text").read(0))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rows.jsonl", r"rows\.jsonl cannot be read as UTF-8 text: .*invalid start byte; unpack or convert it first"),
        ("rows.jsonl.gz", r"rows\.jsonl\.gz cannot be read as UTF-8 text: Not a gzipped file"),
        ("short.jsonl.gz", r"short\.jsonl\.gz cannot be read as UTF-8 text: Compressed file ended"),
        ("rows.parquet", r"rows\.parquet is no Parquet file: "),
        ("my.text", r"my\.text cannot be read as UTF-8 text: .*invalid start byte; unpack or convert it first"),
    ],
)
def test_a_file_of_another_format_or_a_damaged_one_is_named(tmp_path: Path, name: str, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xff\xfe not what was promised")
    if name.startswith("short"):
        path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-9])
    with pytest.raises(ValueError, match=said):
        list(local_files(path.name.split(".")[1], [path], "text").read(0))


def test_wide_characters_that_pass_for_utf8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "wide.txt").write_text("Hello", encoding="utf-16-le")
    with pytest.raises(ValueError, match=r"wide\.txt holds NUL characters, as text in UTF-16 does; convert it"):
        list(text_files([tmp_path / "wide.txt"]).read(0))


def test_a_mark_in_front_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("text", encoding="utf-8-sig")
    (tmp_path / "rows.jsonl").write_text('{"text": "text"}\n\n{"text": null}\n', encoding="utf-8-sig")
    assert [document.text for document in text_files([tmp_path / "my.txt"]).read(0)] == ["text"]
    found = [(document.name, document.text) for document in jsonl_files([tmp_path / "rows.jsonl"], "text").read(0)]
    assert found == [("rows.jsonl:1", "text"), ("rows.jsonl:3", "")]


def test_lines_of_the_special_token_part_documents_of_a_text_packed_or_not(tmp_path: Path) -> None:
    text = "one <|endoftext|>\r\n<|endoftext|>\r\ntwo\n\n<|endoftext|>\nthree\n<|endoftext|>"
    (tmp_path / "my.txt").write_bytes(text.encode())
    (tmp_path / "my.txt.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("my.txt", "my.txt.gz"):
        found = [document.text for document in text_files([tmp_path / name]).read(0)]
        assert found == ["one <|endoftext|>\r\n", "two\n\n", "three\n"]
    (tmp_path / "rows.jsonl.zst").write_bytes(b"packed")
    with pytest.raises(ValueError, match=r"rows\.jsonl\.zst is packed by zstd"):
        list(jsonl_files([tmp_path / "rows.jsonl.zst"], "text").read(0))


def test_equal_documents_share_a_split_and_rows_without_text_are_left_out(tmp_path: Path) -> None:
    rows = [{"text": None}, *({"text": f"row number {i % 20}"} for i in range(100))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = prepare(tmp_path, "d", jsonl_files([tmp_path / "rows.jsonl"], "text"), "bytes", val_fraction=0.3)
    texts = {s: set(bytes(tokens_of(tmp_path, made, s).tolist()).split(b"\0")[1:]) for s in ("train", "val")}
    assert texts["train"] and texts["val"] and not texts["train"] & texts["val"] and b"" not in texts["train"]
    assert made.train.documents + made.val.documents == 100


def test_a_nul_in_a_row_and_a_tiny_split_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a\0b" * 9}) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1 holds a NUL character"):
        prepare(tmp_path, "d", jsonl_files([tmp_path / "rows.jsonl"], "text"), "bytes")
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(5)))
    with pytest.raises(ValueError, match=r"\d tokens for (val|train), of 9 needed"):
        prepare(tmp_path, "e", jsonl_files([tmp_path / "few.jsonl"], "text"), "bytes", val_fraction=0.5)


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_a_cut_for_size_puts_a_separator_only_where_the_split_changes(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "my.txt").write_text("\n".join(f"line {i} {WORDS}" for i in range(5000)))
    made = prepare(tmp_path, "d", text_files([tmp_path / "my.txt"]), tokenizer, val_fraction=0.05)
    eot = load_tokenizer(tokenizer).eot
    separators = {s: int((tokens_of(tmp_path, made, s) == eot).sum()) for s in ("train", "val")}
    assert separators == {s: getattr(made, s).documents for s in separators}
    assert 2 <= sum(separators.values()) < 40 < len(list(text_files([tmp_path / "my.txt"]).read(0)))


def test_a_long_document_is_read_in_pieces_and_stays_in_one_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptcore.sources.LARGEST_DOCUMENT_PIECE", 100)
    texts = [f"document {i} " + "x" * 200 * i for i in range(20)]
    (tmp_path / "my.txt").write_text("\n<|endoftext|>\n".join(texts))
    assert max(len(d.text) for d in text_files([tmp_path / "my.txt"]).read(0)) <= 200 + 1024
    made = prepare(tmp_path, "d", text_files([tmp_path / "my.txt"]), "bytes", val_fraction=0.3)
    whole = [bytes(tokens_of(tmp_path, made, s).tolist()).split(b"\0")[1:] for s in ("train", "val")]
    assert sorted(t.decode().rstrip("\n") for t in whole[0] + whole[1]) == sorted(texts)


def test_pieces_end_at_line_ends_and_a_packed_text_has_the_same(tmp_path: Path) -> None:
    text = "".join(f"{i} {'x' * 1500}\n" for i in range(50))
    (tmp_path / "my.txt").write_text(text)
    (tmp_path / "my.txt.gz").write_bytes(gzip.compress(text.encode()))
    plain, packed = ([d.text for d in text_files([tmp_path / n]).read(0)] for n in ("my.txt", "my.txt.gz"))
    assert plain == packed and len(plain) > 20 and "".join(plain) == text
    assert all(piece.endswith("\n") for piece in plain)


@pytest.mark.parametrize(("values", "kind"), [([b"caf\xc3"], "binary"), ([["a"]], "list"), ([1], "int64")])
def test_a_column_that_holds_no_text_is_refused(tmp_path: Path, values: list[object], kind: str) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)
    with pytest.raises(ValueError, match=f"column 'text' holds {kind}.*, not text"):
        list(parquet_files([path], "text").read(0))


def test_another_column_or_format_of_a_file_is_other_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"a": f"one {i}", "b": f"two {i}"}) + "\n" for i in range(50)))
    made = prepare(tmp_path / "d", "d", jsonl_files([path], "a"), "bytes", val_fraction=0.3)
    for other in (jsonl_files([path], "b"), text_files([path])):
        with pytest.raises(ValueError, match="dataset d exists"):
            prepare(tmp_path / "d", "d", other, "bytes", val_fraction=0.3)
    path_in_other_words = tmp_path / "d" / ".." / "rows.jsonl"
    assert prepare(tmp_path / "d", "d", jsonl_files([path_in_other_words], "a"), "bytes", val_fraction=0.3) == made


def test_files_of_one_name_in_several_folders_are_shared_out_to_both_splits(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / "books" / f"{number}" / "odd.txt").mkdir(parents=True)
        (tmp_path / "books" / f"{number}" / "text.txt").write_text(f"text {number}")
    (tmp_path / "books" / os.fsdecode(b"caf\xe9.txt")).write_text("a name that is not UTF-8")
    made = prepare(tmp_path, "d", text_files([tmp_path / "books"]), "bytes", val_fraction=0.3)
    assert made.train.documents + made.val.documents == 41 and made.val.documents > 3


def test_a_small_text_is_enough_for_both_splits(tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("\n".join(f"line {i} {WORDS}" for i in range(1500)))
    assert prepare(tmp_path, "d", text_files([tmp_path / "my.txt"]), "bytes", val_fraction=0.05).val.tokens > 1000


def test_a_text_of_blanks_alone_is_tokenized() -> None:
    tokenizer = load_tokenizer("gpt2")
    for text in (" " * 3_000_000 + "x", "a\n" + "\n" * 2_000_000):
        assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


def test_a_row_without_text_is_an_empty_document(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None, "three"]}), path)
    assert [document.text for document in parquet_files([path], "text").read(0)] == ["one", "", "three"]


def test_the_standard_library_is_real_text_in_a_fixed_order() -> None:
    documents = list(python_stdlib().read(0))
    assert sum(len(d.text) for d in documents) > 5_000_000
    assert [d.name for d in documents] == [d.name for d in python_stdlib().read(0)]
    assert not any("test" in Path(d.name).parts for d in documents)


def test_gpt2_tokens_are_the_known_ones_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.devnull)
    tokenizer = load_tokenizer("gpt2")
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.encode("<|endoftext|>").max() < 50256  # text that spells it is only text
    assert tokenizer.decode(tokenizer.encode(WORDS).tolist()) == WORDS


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server that speaks the Hub's protocol, and its folder of datasets."""
    folder = tmp_path / "hub"
    folder.mkdir()
    command = [sys.executable, "-m", "tests.gptcore.hub_server", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip(), folder
        server.terminate()


def test_a_dataset_is_read_from_the_hub_with_its_own_client(hub: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = hub
    texts = [f"{i} {WORDS}" for i in range(100)]
    for number in range(2):
        path = folder / "owner" / "name" / "sample" / "10BT" / f"00{number}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.table({"text": texts[50 * number : 50 * (number + 1)]})
        pyarrow.parquet.write_table(table, path, row_group_size=16)
    code = (
        "from gptcore.sources import hub_files; s = hub_files('owner/name', 'sample/10BT/*.parquet', 'text');"
        "import json; print(json.dumps([[d.text for d in s.read(n)] for n in (0, 70)]))"
    )
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    everything, rest = json.loads(done.stdout)
    assert everything == texts
    assert rest == texts[70:]


INTERRUPTED = """
import sys
from pathlib import Path
from gptcore.prepare import begun_commit, prepare
from gptcore.sources import hub_files
import gptcore.prepare

root, hub = map(Path, sys.argv[1:])
gptcore.prepare.BATCH_CHARACTERS = 1000

def stop(documents, tokens):
    raise KeyboardInterrupt

def run(progress):
    source = hub_files("owner/name", "*.parquet", "text", begun_commit(root, "d", "owner/name", "*.parquet"))
    return prepare(root, "d", source, "bytes", val_fraction=0.2, progress=progress), source.description

try:
    run(stop)
except KeyboardInterrupt:
    (hub / "commit").write_text("f" * 40)
seen = []
_, first = run(lambda documents, tokens: seen.append(documents))
(hub / "commit").write_text("e" * 40)
_, again = run(stop)
print(seen[0], first == again, "@0123456789" in first)
"""


def test_a_commit_to_the_hub_restarts_no_interrupted_work(hub: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = hub
    path = folder / "owner" / "name" / "rows.parquet"
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"{i} {WORDS}" for i in range(100)]}), path)
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "datasets"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    second_batch, same, from_the_first_commit = done.stdout.split()
    one_batch = -(-1000 // len(f"0 {WORDS}"))
    assert int(second_batch) > one_batch and same == from_the_first_commit == "True"


@pytest.mark.parametrize(("status", "reason"), [(503, "unavailable"), (429, "unavailable"), (404, "user_error")])
def test_a_hub_that_is_away_is_asked_again_and_one_that_refuses_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, reason: str
) -> None:
    """By another attempt, which goes on where this one stopped."""

    def refused(*_: object) -> NoReturn:
        answer = httpx2.Response(status, request=httpx2.Request("GET", "https://hub"))
        raise HfHubHTTPError(f"it answers {status}", response=answer)

    monkeypatch.setenv("TRAINMASTER_HOME", str(tmp_path))
    monkeypatch.setattr("gptcore.prepare_job.hub_files", refused)
    source = {"format": "hub", "repo": "owner/name", "path": "*.parquet"}
    spec = parse_spec({"kind": "prepare", "name": "p", "dataset": "books", "source": source})
    assert isinstance(spec, PrepareSpec)
    run = RunDir(tmp_path / "runs" / "p")
    with pytest.raises((HfHubHTTPError, SpecError)) as caught:
        prepare_job._run(Process(spec, run, run.attempt(1), lambda _: None))
    failed = describe(caught.value, 0)
    assert failed.reason == reason
    assert f"it answers {status}" in failed.message and ("/source/repo" in failed.message) == (status == 404)


def test_the_hub_that_cannot_be_reached_is_asked_again() -> None:
    for error in (httpx2.ConnectError("no route"), OfflineModeIsEnabled("offline")):
        assert describe(error, 0).reason == "unavailable"
    assert describe(ConnectionError("something else's"), 0).reason == "crash"


def test_hellaswag_is_fetched_from_the_hub_where_its_file_is_missing(hub: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = hub
    items = make_items(30, seed=0)
    path = folder / "Rowan" / "hellaswag" / "data" / "validation-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**i, "label": str(i["label"])} for i in items]), path)
    code = (
        "import sys; from pathlib import Path; from gptcore.hellaswag import load_items;"
        "print(len(load_items(Path(sys.argv[1]), sys.argv[2])))"
    )
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "cache")}

    def load(split: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, str(tmp_path), split]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    assert load("validation").stdout == "30\n"
    kept = (tmp_path / "hellaswag" / "hellaswag_val.jsonl").read_text().splitlines()
    assert [json.loads(line)["ctx"] for line in kept] == [item["ctx"] for item in items]
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    assert load("validation").stdout == "30\n"  # the file is there now
    missing = load("train").stderr
    assert "HellaSwag's train items are missing" in missing and "hellaswag_train.jsonl" in missing
