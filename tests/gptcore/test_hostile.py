"""Folders and repositories made by others, damaged or worse: the job fails as its user's error and names the file."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import httpx2
import pyarrow
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import get_session
from safetensors.torch import load_file, save_file

from gptcore.failure import describe
from gptcore.hub_client import prepare_hub_client, refuse_local_redirect
from gptcore.origin import load_origin, locate
from gptcore.scorer import files_at_fault, score_folder
from gptcore.sources import parquet_files
from gptcore.spec import InitSpec, SpecError
from tests.gptcore.conftest import tiny_model
from tests.gptcore.hub_server import Handler
from tests.gptcore.test_origin import of_model, saved_by_transformers

SPEC = tiny_model("llama", vocab_size=256)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    saved_by_transformers(SPEC, folder)
    return folder


@pytest.fixture
def theirs(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "theirs"))


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def reshape_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:7].clone()
    save_file(tensors, folder / "model.safetensors")


def config(changes: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        file = folder / "config.json"
        mine = json.loads(file.read_text())
        file.write_text(json.dumps(mine | changes if isinstance(changes, dict) else changes))

    return write


def damage_the_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"vocab"', '"vocad"'))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut, r"model\.safetensors of theirs cannot be read: SafetensorError"),
        (drop_a_tensor, r"tensors of theirs are not those of its config\.json: model\.norm\.weight is missing"),
        (reshape_a_tensor, r"model\.embed_tokens\.weight has shape \[7, \d+\], not \[256, \d+\]"),
        (config([1]), r"config\.json of theirs is not a JSON object"),
        (config({"num_hidden_layers": 10**30}), "n_layer is 1000"),
        (config({"use_cache": "x"}), "transformers cannot load"),  # the tokenizer, which reads it too
        (damage_the_tokenizer, "transformers cannot load"),
    ],
)
def test_first_weights_that_cannot_be_read_are_refused(theirs: Path, harm: Callable[[Path], None], said: str) -> None:
    harm(theirs)
    with pytest.raises(SpecError, match=said) as caught:
        load_origin(of_model(SPEC), InitSpec(source="theirs"), theirs.parent, "bytes")
    assert describe(caught.value, rank=0).reason == "user_error"


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut, "transformers cannot load"),
        (config([1]), "transformers cannot load"),
        (config({"vocab_size": None}), "transformers cannot load"),
        (config({"hidden_size": 10**30}), "transformers cannot load"),
        (config({"model_type": "t5", "architectures": None}), "transformers cannot load"),
        (config({"max_position_embeddings": -1}), "max_position_embeddings in its config.json is -1; wanted a whole"),
        (damage_the_tokenizer, "transformers cannot load"),
    ],
)
def test_a_folder_that_cannot_be_scored_is_refused(theirs: Path, harm: Callable[[Path], None], said: str) -> None:
    harm(theirs)
    with pytest.raises(SpecError, match=said):
        score_folder(theirs, torch.device("cpu"))


def test_a_model_whose_tokenizer_has_more_tokens_than_it_is_refused(tmp_path: Path) -> None:
    saved_by_transformers(tiny_model("llama", vocab_size=64), tmp_path / "theirs")
    with pytest.raises(SpecError, match="holds no model of text that can be scored: IndexError"):
        score_folder(tmp_path / "theirs", torch.device("cpu"))


def test_a_panic_of_a_rust_library_is_the_files_fault_and_a_full_disk_is_not() -> None:
    panic = type("PanicException", (BaseException,), {})  # as pyo3 makes it
    with pytest.raises(SpecError, match=r"a\.json cannot be read: PanicException: index out of bounds"):
        with files_at_fault("a.json cannot be read", "/source"):
            raise panic("index out of bounds")
    for other in (OSError(28, "No space left"), torch.OutOfMemoryError("no memory"), KeyboardInterrupt()):
        with pytest.raises(type(other)):
            with files_at_fault("a.json cannot be read", "/source"):
                raise other


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"{i} and some more words" for i in range(5000)]}), path)
    data = bytearray(path.read_bytes())
    data[100:4000] = b"\xff" * 3900
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"rows\.parquet is damaged"):
        list(parquet_files([path], "text").read(0))


class Nonsense(Handler):
    """A mirror that answers everything with an empty list."""

    def do_GET(self) -> None:
        self.send_json([])


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Nonsense)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("mirror")
def test_an_answer_of_a_mirror_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="the Hub's answer about hf://owner/name cannot be used"):
        locate("hf://owner/name", tmp_path, "/source")


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:6379", "localhost", "a.localhost", "[::1]:8000", "[::ffff:127.0.0.1]", "0.0.0.0", "169.254.169.254"],
)
def test_a_mirror_that_redirects_to_this_machine_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request.url.host)
        return httpx2.Response(302, headers={"Location": f"http://{address}/keys"})

    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    prepare_hub_client()
    hooks = get_session().event_hooks  # of the client that huggingface_hub itself uses
    with httpx2.Client(transport=httpx2.MockTransport(answer), event_hooks=hooks, follow_redirects=True) as client:
        with pytest.raises(ValueError, match=r"redirects to .*, an address of this machine alone"):
            client.get("https://mirror.example/owner/name")
    assert asked == ["mirror.example"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9000")  # a mirror on this very machine may
    refuse_local_redirect(httpx2.Request("GET", f"http://{address}/keys"))
