import json

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from gptcore.presets import PRESETS
from gptcore.spec import JobSpec, ModelSpec, PrepareSpec, SpecError, TrainSpec, parse_spec

MINIMAL = {
    "kind": "train", "name": "x", "model": {"preset": "llama-tiny"}, "data": {"dataset": "small"},
    "optim": {"lr": 0.001}, "max_steps": 10, "tokens_per_step": 1024,
}  # fmt: skip


def refused(body: object) -> dict[str, str]:
    with pytest.raises(SpecError) as caught:
        parse_spec(body)
    return {p.pointer: p.message for p in caught.value.problems}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_expands_into_explicit_fields_that_read_back_the_same(preset: str) -> None:
    spec = parse_spec(MINIMAL | {"model": {"preset": preset}})
    assert isinstance(spec, TrainSpec)
    dumped = json.loads(spec.model_dump_json())
    assert parse_spec(dumped) == spec
    assert all(dumped["model"][field] == value for field, value in PRESETS[preset].items())


@given(n_head=st.integers(1, 16), width=st.integers(4, 16), preset=st.sampled_from(sorted(PRESETS)))
def test_changed_widths_keep_a_shape_that_works(n_head: int, width: int, preset: str) -> None:
    model = ModelSpec.model_validate({"preset": preset, "n_head": n_head, "n_embd": n_head * width * 2})
    assert model.head_dim == width * 2
    assert model.n_head % model.n_kv_head == 0


def test_an_unknown_field_is_named_with_the_nearest_known_one() -> None:
    assert "max_steps" in refused(MINIMAL | {"max_step": 3})["/max_step"]


def test_a_width_that_heads_do_not_divide_names_heads_that_do() -> None:
    message = refused(MINIMAL | {"model": {"preset": "llama-tiny", "n_embd": 100}})["/model/n_embd"]
    assert "100" in message
    assert "n_head" in message
    assert "5" in message


def test_a_width_that_is_none_is_the_only_one_complained_of() -> None:
    assert set(refused(MINIMAL | {"model": {"preset": "llama-tiny", "n_head": 0}})) == {"/model/n_head"}


def test_a_presets_query_heads_a_key_head_stay_where_they_fit() -> None:
    def heads(**model: str | int) -> tuple[int, int]:
        spec = parse_spec(MINIMAL | {"model": model})
        assert isinstance(spec, TrainSpec)
        return spec.model.n_head, spec.model.n_kv_head

    assert heads(preset="llama-124m") == heads(preset="qwen3-124m") == (12, 6)
    assert heads(preset="gpt2-124m") == (12, 12) and heads(preset="nanochat-124m") == (6, 6)
    assert heads(preset="qwen3-124m", n_head=8) == (8, 4)
    assert heads(preset="llama-tiny", n_head=3) == (3, 3)


def test_every_problem_is_named_at_once() -> None:
    found = refused(MINIMAL | {"optim": {"lr": "high", "name": "sgd"}, "max_steps": 0})
    assert set(found) == {"/optim/lr", "/optim/name", "/max_steps"}
    assert "'sgd'" in found["/optim/name"]


def test_of_many_problems_the_first_are_named_and_the_others_counted() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(MINIMAL | {f"max_step{n}": 0 for n in range(50_000)})
    problems = caught.value.problems
    assert len(problems) == 20 and "did you mean max_steps" in problems[0].message
    assert problems[-1].message == "49,981 more problems are not listed; correct these first"
    assert len(str(caught.value)) < 5_000
    assert len(refused(MINIMAL | {f"max_step{n}": 0 for n in range(20)})) == 20


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"kind": "tune"}, "/kind"),
        ({"model": {"preset": "lama-tiny"}}, "/model/preset"),
        ({"micro_batch_size": 0}, "/micro_batch_size"),
        ({"micro_batch_size": "big"}, "/micro_batch_size"),
        ({"optim": {"lr": 0.1, "min_lr": 0.2}}, "/optim/min_lr"),
        ({"optim": {"lr": float("nan")}}, "/optim/lr"),
        ({"name": "../up"}, "/name"),
        ({"labels": {"a": 1}}, "/labels/a"),
        ({"labels": {"a": "b\x1b[2J"}}, "/labels/a"),
        ({"model": {"preset": "llama-tiny", "n_kv_head": 4}}, "/model/n_head"),
        ({"data": {"dataset": "a/b"}}, "/data/dataset"),
    ],
)
def test_a_bad_value_is_refused_at_its_pointer(change: dict[str, object], pointer: str) -> None:
    assert pointer in refused(MINIMAL | change)


PREPARE = {"kind": "prepare", "name": "p", "dataset": "d", "source": {"format": "hub", "path": "*", "repo": "a/b"}}
EVAL = {"kind": "eval", "name": "e", "source": "job-1", "tasks": ["val_loss", "hellaswag@10", "lm_eval:arc_easy@25"]}
PUBLISH = {"kind": "publish", "name": "p", "source": "job-1", "repo": "me/my-gpt_2.1"}


@pytest.mark.parametrize(
    ("body", "fine"),
    [
        *((body, True) for body in (MINIMAL, PREPARE, EVAL, PUBLISH)),
        (MINIMAL | {"max_steps": 3.0, "micro_batch_size": 4.0}, True),
        (MINIMAL | {"max_steps": 3.5}, False),
        ({name: value for name, value in MINIMAL.items() if name != "kind"}, False),
        (MINIMAL | {"model": {"n_layer": 1, "n_head": 2.0, "n_embd": 64}}, True),
        (MINIMAL | {"model": {"preset": None, "n_layer": 1, "n_head": 2, "n_embd": 64}}, True),
        (MINIMAL | {"model": {"n_layer": 1, "n_head": 2}}, False),
        (MINIMAL | {"model": {"preset": None}}, False),
        (MINIMAL | {"model": {"preset": "lama-tiny"}}, False),
        (MINIMAL | {"micro_batch_size": 0}, False),
        (MINIMAL | {"labels": {"a/b": "c"}}, True),
        (MINIMAL | {"labels": {"": "c"}}, False),
        (MINIMAL | {"labels": {"a": "größer \u200d"}}, True),
        *((MINIMAL | {"labels": {"a": f"b{control}c"}}, False) for control in "\x1b\n\x7f\x9b\u202e"),
        (MINIMAL | {"publish": {"repo": "a/b", "license": "mit\x1b"}}, False),
        (PREPARE | {"source": {"format": "text", "path": "a\x1b.txt"}}, False),
        (PREPARE | {"source": {"format": "hub", "path": "*", "repo": "a/b\x1b"}}, False),
        (PREPARE | {"source": {"format": "jsonl", "path": "a", "field": "text\x1b"}}, False),
        (EVAL | {"source": "job-1\x1b"}, False),
        (PREPARE | {"source": {"format": "hub", "path": "*"}}, False),
        (PREPARE | {"source": {"format": "text", "path": "a.txt"}}, True),
        (PREPARE | {"source": {"format": "text", "path": "a.txt", "repo": "a/b"}}, False),
        (EVAL | {"tasks": ["lm_eval:"]}, False),
        *(
            (PUBLISH | {"repo": repo}, False)
            for repo in ("gpt", "a/b--c", "a/b..c", "a/b.git", "a/b-", "a/" + "b" * 95)
        ),
    ],
)
def test_the_json_schema_takes_what_is_taken(body: dict[str, object], fine: bool) -> None:
    assert jsonschema_rs.is_valid(TypeAdapter(JobSpec).json_schema(), body) == fine
    assert fine or refused(body)
    if fine:
        parse_spec(body)


@pytest.mark.parametrize("body", [None, 3, "text", [], {}, {"kind": []}, {"kind": "train", "model": []}])
def test_anything_that_is_no_spec_is_refused_and_nothing_breaks(body: object) -> None:
    assert refused(body)


def test_a_source_path_cannot_leave_its_folder() -> None:
    body = {"kind": "prepare", "name": "p", "dataset": "d", "source": {"format": "text", "path": "../../etc/passwd"}}
    assert "leaves" in refused(body)["/source/path"]
    spec = parse_spec(body | {"source": {"format": "text", "path": "books"}})
    assert isinstance(spec, PrepareSpec)
