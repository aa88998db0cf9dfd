"""Whether first weights fit a spec, known from a few small files: no tensor is loaded.

The API asks at submission, the trainer asks again before its first step. No torch here.
"""

import json
import os
import time
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import httpx2

from gptcore.dataset import VOCAB_SIZES, Tokenizer
from gptcore.environment import hub_token
from gptcore.hub_client import hub_endpoint
from gptcore.native import CLASSES, config_fields
from gptcore.plan import refuse_another_shape
from gptcore.presets import shown
from gptcore.spec import HUB_PREFIX, ModelSpec, SpecError, TrainSpec, refusal

_refusal = partial(refusal, "/init_from/source")
CONFIG_BYTES = 1 << 20  # no config.json of a stock class comes near it
TOKENIZER_BYTES = 4 << 20  # GPT-2's tokenizer.json has 3.6 MB with its merges as pairs
HUB_SECONDS = 3.0  # in all, so that a Hub that is away delays a submission by no more
MAX_REDIRECTS = 3
# ids of a few words, as a tokenizer.json spells them
SPELLED: dict[Tokenizer, dict[str, int]] = {
    "bytes": {"a": 97, "Z": 90, "Ġ": 32}, "gpt2": {"a": 64, "Ġthe": 262, "Ġmodel": 2746, "def": 4299},
}  # fmt: skip
# keys of a config.json that change the function a class computes, and the values that we compute
_COMPUTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "rope_type": ("default",), "type": ("default",),
    "partial_rotary_factor": (1.0,), "use_sliding_window": (False,), "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,), "quantization_config": (),
}  # fmt: skip


def refuse_another_config(source: str, model: ModelSpec, config_json: bytes) -> None:
    """Raise SpecError if the model that `config.json` describes cannot give `model` its first weights."""
    refuse_another_shape(source, model, fields_of_config(_object(source, config_json)), may_shorten=True)


def refuse_another_tokenizer(source: str, theirs: Tokenizer, spec: TrainSpec, ours: Tokenizer) -> None:
    """Raise SpecError if the run in `source` was trained with another tokenizer than the spec's dataset has, `ours`."""
    if theirs != ours:
        raise tokenizer_refusal(source, spec, f"{theirs} there ({VOCAB_SIZES[theirs]} tokens), {ours} here", ours)


def refuse_another_vocabulary(source: str, tokenizer_json: bytes, spec: TrainSpec, ours: Tokenizer) -> None:
    """Raise SpecError if a tokenizer.json gives common words other ids than the dataset's tokenizer, `ours`.

    Only looks words up: a foreign file may hold a pattern that takes hours to match, so the API encodes nothing.
    Equal words do not make an equal tokenizer; the trainer encodes a text with both.
    """
    try:
        vocabulary = json.loads(tokenizer_json)["model"]["vocab"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise _refusal(f"tokenizer.json of {source} cannot be read: {error!r}") from error
    listed = vocabulary if isinstance(vocabulary, dict) else {}
    if other := {word: listed.get(word) for word, id in SPELLED[ours].items() if listed.get(word) != id}:
        numbers = ", ".join(f"{w!r} is {shown(id)} there, {SPELLED[ours][w]} in {ours}" for w, id in other.items())
        raise tokenizer_refusal(source, spec, numbers, ours)


def tokenizer_refusal(source: str, spec: TrainSpec, difference: str, ours: Tokenizer) -> SpecError:
    """Return what to raise for weights of another tokenizer than the dataset's, `ours`."""
    return _refusal(
        f"{source} has another tokenizer than dataset {spec.data.dataset}: {difference}; name a dataset prepared with "
        f"the tokenizer of {source}, or take weights that were trained with {ours}"
    )


def _object(source: str, config_json: bytes) -> dict[str, Any]:
    """Return the decoded config.json. Raises SpecError if it is not a JSON object."""
    if len(config_json) > CONFIG_BYTES:
        raise _refusal(f"config.json of {source} has {len(config_json)} bytes, more than {CONFIG_BYTES}")
    try:
        config = json.loads(config_json)
    except (ValueError, RecursionError) as error:
        raise _refusal(f"config.json of {source} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise _refusal(f"config.json of {source} is not a JSON object")
    return config


def fields_of_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a ModelSpec that a native class's config.json fixes. Raises SpecError."""
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else "not given"
    if architecture not in CLASSES:
        raise _refusal(f"its class is {shown(architecture)}; those that can be imported are {', '.join(CLASSES)}")
    # transformers 5 keeps rope_theta in rope_parameters; both versions keep what they do to the angles in rope_scaling
    for inner in (config.get("rope_parameters"), config.get("rope_scaling")):
        if inner is not None and not isinstance(inner, dict):
            raise _refusal(f"its rotation is {shown(inner)}, not an object")
        config = config | (inner or {})
    activation = {"swiglu": "silu", "relu2": "relu2"}.get(CLASSES[architecture]["mlp"])
    for key, computed in (_COMPUTED | {"hidden_act": (activation,)}).items():
        if config.get(key) not in (None, *computed):
            wanted = repr(computed[0]) if computed else "none"
            raise _refusal(f"its {key} is {shown(config[key])}, which no model here computes; wanted {wanted}")
    names = config_fields(architecture)
    found = {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}
    if wrong := [field for field, value in CLASSES[architecture].items() if found.get(field, value) != value]:
        raise _refusal(f"its {wrong[0]} is {shown(found[wrong[0]])}, with which no {architecture} can be held here")
    for theirs, ours in names.items():
        if ours in ("n_embd", "n_head") and not (isinstance(found.get(ours), int) and found[ours] > 0):
            raise _refusal(f"its {theirs} is {shown(found.get(ours))}; wanted a whole number above 0")
    # a field that the file leaves out has transformers' default
    absent = {"tie_embeddings": True, "n_hidden": 4 * found["n_embd"]} if architecture == "GPT2LMHeadModel" else {
        "tie_embeddings": False, "head_dim": found["n_embd"] // found["n_head"], "rope_theta": 10_000.0,
        "n_kv_head": found["n_head"], "norm_eps": 1e-6,
        "attention_bias": False, "mlp_bias": config.get("mlp_bias", False),
        "logit_softcap": config.get("final_logit_softcapping"),
    }  # fmt: skip
    return absent | CLASSES[architecture] | found


# ---- small files of the Hub, at submission


def fetch_from_hub(source: str, name: str, limit: int) -> bytes | None:
    """Return file `name` of hf://owner/name@revision; None if it is not had within HUB_SECONDS and `limit` bytes.

    None says nothing about the repository: it may be private, or the Hub out of reach from here. The trainer decides.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return None
    # in a thread, since no timeout of the client covers the look-up of a host's name
    answer: SimpleQueue[bytes | None] = SimpleQueue()
    Thread(target=_put, args=(answer, partial(_fetch, source, name, limit)), daemon=True).start()
    try:
        return answer.get(timeout=HUB_SECONDS)
    except Empty:
        return None


def _put(answer: "SimpleQueue[bytes | None]", fetch: Callable[[], bytes | None]) -> None:
    try:
        answer.put(fetch())
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError):  # not reached, or HF_ENDPOINT or HF_TOKEN unusable
        answer.put(None)


def _fetch(source: str, name: str, limit: int) -> bytes | None:
    repo, _, revision = source.removeprefix(HUB_PREFIX).partition("@")
    endpoint = httpx2.URL(hub_endpoint())
    token = hub_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = httpx2.URL(f"{endpoint}/{repo}/resolve/{(revision or 'main').replace('/', '%2F')}/{name}")
    deadline = time.monotonic() + HUB_SECONDS
    with httpx2.Client(headers=headers, timeout=HUB_SECONDS) as client:
        for _ in range(1 + MAX_REDIRECTS):
            with client.stream("GET", url) as answer:
                if answer.is_redirect:
                    url = url.join(answer.headers["Location"])
                    if (url.scheme, url.host, url.port) != (endpoint.scheme, endpoint.host, endpoint.port):
                        return None  # the API follows nobody to another host
                    continue
                return _body(answer, limit, deadline) if answer.status_code == 200 else None
    return None


def _body(answer: httpx2.Response, limit: int, deadline: float) -> bytes | None:
    data = bytearray()
    for part in answer.iter_bytes():
        data += part
        if len(data) > limit or time.monotonic() > deadline:
            return None
    return bytes(data)
