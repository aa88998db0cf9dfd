"""HellaSwag's two conventions, against lm-evaluation-harness itself and against a reading of llm.c's rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore import hellaswag
from gptcore.checkpoint import list_checkpoints
from gptcore.dist import Dist
from gptcore.events import Evaluated, Failed, Scored, Stopped
from gptcore.export import export_model
from gptcore.failure import Interrupted
from gptcore.scorer import Scorer, score_ours
from gptcore.tokenizer import load_tokenizer
from tests.gptcore.conftest import FAMILIES, Trainers, randomised, tiny_model, tiny_spec, wait_for_step
from tests.gptcore.hellaswag_items import make_items, write_items, write_task

ALONE = Dist(0, 0, 1, torch.device("cpu"))
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


@pytest.fixture(scope="module")
def items_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_items(tmp_path_factory.mktemp("items") / "datasets")


@pytest.fixture(scope="module")
def harness(items_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """lm-evaluation-harness's task manager with a local hellaswag; no network."""
    tasks = tmp_path_factory.mktemp("tasks")
    write_task(tasks, items_folder)
    with pytest.MonkeyPatch.context() as patch:
        for name in OFFLINE:  # read when its libraries are imported; other tests do ask a Hub
            patch.setenv(name, "1")
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=str(tasks))


def tiny_scorer(family: str, tokenizer: str, **changes: Any) -> Scorer:
    ours = load_tokenizer(tokenizer)
    model = randomised(tiny_model(family, vocab_size=ours.vocab_size, **changes))
    return score_ours(model, ours, torch.device("cpu"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "examples"),
    [(family, 0) for family in FAMILIES]
    + [pytest.param(family, 10, marks=[] if family == "llama" else pytest.mark.slow) for family in FAMILIES],
)
def test_hellaswag_agrees_with_the_harness_item_by_item(
    tmp_path: Path, items_folder: Path, harness: Any, family: str, examples: int
) -> None:
    import lm_eval

    # long enough for some of the few-shot contexts whole, and not for others
    model = randomised(tiny_model(family, vocab_size=256, block_size=512))
    export_model(tmp_path / "export", model.spec, {k: p.detach() for k, p in model.named_parameters()}, "bytes")
    answer = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(tmp_path / "export"), "dtype": "float32"}, device="cpu",
        tasks=["hellaswag_local"], num_fewshot=examples, batch_size=16, task_manager=harness, bootstrap_iters=0,
    )  # fmt: skip
    assert answer is not None
    theirs = sorted(answer["samples"]["hellaswag_local"], key=lambda sample: int(sample["doc_id"]))
    items, pool = (hellaswag.load_items(items_folder.parent, split) for split in ("validation", "train"))
    scorer = score_ours(model, load_tokenizer("bytes"), torch.device("cpu"))
    drawn = hellaswag.draw_examples(items, pool, examples) if examples else None
    ours = hellaswag.score(hellaswag.harness_questions(items, scorer.encode, drawn), scorer, ALONE)
    logprobs = torch.tensor([[one[0] for one in sample["filtered_resps"]] for sample in theirs])
    assert (ours.logprob - logprobs).abs().max() < 1e-3  # of sums of hundreds
    assert len(theirs) == 200
    assert (ours.choices == ours.label).tolist() == [bool(sample["acc_norm"]) for sample in theirs]


@pytest.mark.parametrize("family", FAMILIES)
def test_hellaswag_contexts_shared_by_endings_change_no_score(family: str) -> None:
    scorer = tiny_scorer(family, "gpt2", block_size=20)  # some items fit, some do not
    questions = hellaswag.harness_questions(make_items(40, seed=1), scorer.encode)
    packed = hellaswag.score(questions, scorer, ALONE)
    apart = hellaswag.score(questions, Scorer(**{**vars(scorer), "packs": False}), ALONE)
    assert (packed.logprob - apart.logprob).abs().max() < 1e-4
    lengths = [len(q.context) + max(map(len, q.endings)) - 1 for q in questions]
    assert min(lengths) <= 20 < max(lengths)


def test_hellaswag_completion_takes_the_least_loss_per_token_of_raw_text() -> None:
    scorer, tokenizer = tiny_scorer("llama", "gpt2", block_size=256), load_tokenizer("gpt2")
    items = make_items(20, seed=2)
    scores = hellaswag.score(hellaswag.completion_questions(items, scorer.encode), scorer, ALONE)
    for number, item in enumerate(items):
        losses = []
        for ending in item["endings"]:
            context, tokens = tokenizer.encode(item["ctx"]).tolist(), tokenizer.encode(" " + ending).tolist()
            row = torch.tensor([context + tokens])
            targets = row[:, 1:].clone()
            targets[:, : len(context) - 1] = -100
            losses.append(scorer.loss(row[:, :-1], targets).item())
        assert scores.choices[number] == int(torch.tensor(losses).argmin())


def test_hellaswag_endings_begin_with_no_mark_that_a_tokenizer_puts_before_a_text() -> None:
    def marked(text: str) -> list[int]:
        return [0, *text.encode()]

    [question] = hellaswag.completion_questions(make_items(1, seed=2), marked)
    item = make_items(1, seed=2)[0]
    assert question.context == marked(item["ctx"])
    assert [bytes(ending).decode() for ending in question.endings] == [" " + ending for ending in item["endings"]]


def test_hellaswag_ranks_share_the_items_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = tiny_scorer("qwen3", "gpt2")
    questions = hellaswag.harness_questions(make_items(21, seed=3), scorer.encode)
    whole = hellaswag.score(questions, scorer, ALONE)
    monkeypatch.setattr(Dist, "sum", lambda self, tensor: tensor)  # each rank's own part
    parts = [hellaswag.score(questions, scorer, Dist(rank, rank, 2, torch.device("cpu"))) for rank in (0, 1)]
    assert (sum(part.logprob for part in parts) - whole.logprob).abs().max() < 1e-4
    assert all((part.logprob == 0).all(1).sum() >= 10 for part in parts)


def test_hellaswag_ranks_leave_together_when_another_one_saw_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = tiny_scorer("qwen3", "gpt2")
    questions = hellaswag.harness_questions(make_items(2, seed=3), scorer.encode)
    with pytest.raises(Interrupted):
        hellaswag.score(questions, scorer, ALONE, is_stopped=lambda: True)
    monkeypatch.setattr(Dist, "sum", lambda self, tensor: tensor + 1)  # what the other rank adds
    with pytest.raises(Interrupted):
        hellaswag.score(questions, scorer, Dist(0, 0, 2, torch.device("cpu")), is_stopped=lambda: False)


def test_hellaswag_is_scored_while_training_and_whole_at_the_end(train: Trainers, home: Path) -> None:
    write_items(home / "datasets")
    spec = tiny_spec(evaluate={"every_steps": 10, "eval_tokens": 1024, "hellaswag": {"every_steps": 8, "items": 30}})
    done = train(spec, ranks=2)
    scored = done.of_type(Scored)
    assert [(e.step, e.items) for e in scored] == [(8, 30), (16, 30), (20, 200)], done.output
    assert all(set(e.results) == {"hellaswag_acc_norm", "hellaswag_completion"} for e in scored)
    assert all(0 <= value <= 1 and e.stderr[name] > 0 for e in scored for name, value in e.results.items())
    plain = train(tiny_spec(), "plain", ranks=2)
    assert done.losses() == plain.losses()  # looking changes nothing


def test_a_score_that_a_stop_took_is_made_up_and_none_comes_twice(train: Trainers, home: Path) -> None:
    write_items(home / "datasets")
    asked = {"every_steps": 1000, "eval_tokens": 1024, "hellaswag": {"every_steps": 1, "items": 20}}
    run = train.make(tiny_spec(max_steps=100_000, evaluate=asked), "run")
    for attempt in (1, 2):
        process = train.start(run)
        wait_for_step(run, 5 * attempt, attempt)
        run.attempt(attempt).stop.write_text("pause")
        output, _ = process.communicate(timeout=60)
    first, second = (event.step for event in run.events() if isinstance(event, Stopped))
    scored = [(event.attempt, event.step) for event in run.events() if isinstance(event, Scored)]
    assert [step for _, step in scored] == list(range(1, second)), output
    assert (2, first) in scored
    assert [checkpoint.state().score_owed for checkpoint in list_checkpoints(run)] == [False, True]


def test_hellaswag_that_is_not_there_ends_the_run_before_it_starts(train: Trainers, home: Path) -> None:
    for path in (home / "datasets" / "hellaswag").glob("*"):
        path.unlink()
    done = train(tiny_spec(evaluate={"hellaswag": {}}), "missing", HF_HUB_OFFLINE="1")
    failed = list(done.run.events())[-1]
    assert isinstance(failed, Failed) and failed.reason == "user_error"
    assert "/evaluate/hellaswag" in failed.message and "hellaswag_val.jsonl" in failed.message
    assert not done.of_type(Evaluated)
