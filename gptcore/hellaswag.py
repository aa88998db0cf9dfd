"""HellaSwag (Zellers et al. 2019) in the two conventions in use, which give different numbers.

`hellaswag_acc_norm` is lm-evaluation-harness's: the activity before the context, cleaned text, context
and ending tokenized together, log-probability per character. `hellaswag_completion` is llm.c's: raw
text, tokenized apart, log-probability per token.
"""

import json
import math
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcore.dist import Dist
from gptcore.events import Scored
from gptcore.failure import Interrupted
from gptcore.hub_client import prepare_hub_client
from gptcore.scorer import Scorer

REPO = "Rowan/hellaswag"
FEWSHOT_SEED = 1234  # lm-evaluation-harness's default: the same examples before the same questions
ENDINGS = 4

Item = dict[str, Any]  # activity_label, ctx_a, ctx_b, ctx, endings, label


@dataclass(frozen=True)
class Question:
    """Token lists of a context and its endings; `lengths` is what log-probabilities are divided by."""

    context: list[int]
    endings: list[list[int]]
    lengths: list[int]
    label: int


@dataclass(frozen=True)
class Scores:
    """Log-probability of each ending (N, 4) float64, its length, and the right one's number (N,)."""

    logprob: Tensor
    length: Tensor
    label: Tensor

    @property
    def choices(self) -> Tensor:
        return (self.logprob / self.length).argmax(1)

    @property
    def accuracy(self) -> float:
        return (self.choices == self.label).double().mean().item()


def load_items(datasets: Path, split: str) -> list[Item]:
    """The items of "validation" or "train": `hellaswag/hellaswag_{val,train}.jsonl` in the datasets folder,
    fetched from the Hub where it is missing. Raises FileNotFoundError saying how to get it."""
    path = datasets / "hellaswag" / f"hellaswag_{'val' if split == 'validation' else split}.jsonl"
    if not path.is_file():
        _fetch(path, split)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load_items_together(datasets: Path, split: str, dist: Dist) -> list[Item]:
    """Return the items on every rank; what is missing is fetched by the first rank of each node alone.

    All ranks must call. Raises FileNotFoundError on each rank that has no items.
    """
    problem: FileNotFoundError | None = None
    if dist.local_rank == 0:
        try:
            load_items(datasets, split)
        except FileNotFoundError as error:
            problem = error
    if dist.any(problem is not None):  # the others wait here
        raise problem or FileNotFoundError(f"HellaSwag's {split} items are missing on another rank, which says why")
    return load_items(datasets, split)


def _fetch(path: Path, split: str) -> None:
    import httpx2
    import pyarrow.parquet
    from huggingface_hub import HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    from gptcore.rundir import write_atomically

    rows: list[Item] = []
    try:
        prepare_hub_client()
        hub = HfFileSystem()
        for name in sorted(map(str, hub.glob(f"datasets/{REPO}/**/{split}*.parquet"))):
            with hub.open(name, "rb") as file:
                rows += pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, ValueError, httpx2.TransportError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        raise _missing(path, split, f"the Hub does not give them: {error}") from error
    if not rows:
        raise _missing(path, split, f"{REPO} has no Parquet file of it")
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def _missing(path: Path, split: str, why: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"HellaSwag's {split} items are missing ({why}); put {path.name} from "
        f"github.com/rowanz/hellaswag into {path.parent}, or let this machine reach the Hub's {REPO}"
    )


def sample_of(items: Sequence[Item], count: int) -> list[Item]:
    """`count` items spread evenly: the file's first ones are of one source only."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def draw_examples(items: Sequence[Item], pool: Sequence[Item], count: int) -> list[list[Item]]:
    """The solved examples before each question, as lm-evaluation-harness draws them from the train split."""
    generator = random.Random(FEWSHOT_SEED)
    drawn = []
    for item in items:
        sample = [x for x in generator.sample(pool, count + 1) if x != item][:count]
        if len(sample) < count:  # the item itself, more than once
            sample = generator.sample([x for x in pool if x != item], count)
        drawn.append(sample)
    return drawn


def harness_questions(
    items: Sequence[Item], encode: Callable[[str], list[int]], fewshot: Iterable[list[Item]] | None = None
) -> list[Question]:
    questions = []
    for item, examples in zip(items, fewshot or ([] for _ in items), strict=True):
        solved = [f"{_query(x)} {_clean(x['endings'][int(x['label'])])}\n\n" for x in examples]
        context = "".join(solved) + _query(item)
        endings = [_clean(ending) for ending in item["endings"]]
        bare = context.rstrip()  # a space at the end belongs to the word that follows
        tail = context[len(bare) :]
        start = len(encode(bare))
        tokens = [encode(f"{bare}{tail} {ending}")[start:] for ending in endings]
        questions.append(Question(encode(bare), tokens, [len(e) for e in endings], int(item["label"])))
    return questions


def completion_questions(items: Sequence[Item], encode: Callable[[str], list[int]]) -> list[Question]:
    questions = []
    start = len(encode(""))  # of what some put in front of every text, and belongs to the context alone
    for item in items:
        endings = [encode(" " + ending)[start:] for ending in item["endings"]]
        questions.append(Question(encode(item["ctx"]), endings, [len(e) for e in endings], int(item["label"])))
    return questions


def _query(item: Item) -> str:
    return _clean(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")


def _clean(text: str) -> str:
    """WikiHow's leftovers removed, as the harness does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


@dataclass
class _Row:
    """A context once, behind it one ending or all: an ending sees the context and itself."""

    question: int
    tokens: list[int]
    positions: list[int]
    segments: list[int]  # 0 is the context, then 1, 2, ...
    asked: list[tuple[int, int, int]]  # column that predicts, token predicted, ending


def _rows(number: int, question: Question, block_size: int, packs: bool) -> list[_Row]:
    whole = max(len(question.context) + len(ending) - 1 for ending in question.endings) <= block_size
    numbered = list(enumerate(question.endings))
    # an ending that cuts the context needs a row of its own: the others see more of it
    groups = [numbered] if packs and whole else [[one] for one in numbered]
    return [_row(number, question.context, group, block_size) for group in groups]


def _row(number: int, context: list[int], endings: list[tuple[int, list[int]]], block_size: int) -> _Row:
    room = max(1, block_size + 1 - max(len(ending) for _, ending in endings))
    context = context[-room:]
    n = len(context)
    row = _Row(number, list(context), list(range(n)), [0] * n, [])
    for segment, (ending_number, tokens) in enumerate(endings, 1):
        ending = tokens[:block_size]
        start = len(row.tokens)
        columns = [n - 1, *range(start, start + len(ending) - 1)]
        row.asked += [(column, token, ending_number) for column, token in zip(columns, ending, strict=True)]
        row.tokens += ending[:-1]  # what the last token predicts is not asked
        row.positions += range(n, n + len(ending) - 1)
        row.segments += [segment] * (len(ending) - 1)
    return row


@torch.no_grad()
def score(
    questions: Sequence[Question], scorer: Scorer, dist: Dist, is_stopped: Callable[[], bool] = lambda: False
) -> Scores:
    """Log-probabilities of all endings, the questions shared by the ranks.

    is_stopped: asked between batches. If it is true on any rank, all raise Interrupted together.
    """
    mine = [
        row
        for number in range(dist.rank, len(questions), dist.world_size)
        for row in _rows(number, questions[number], scorer.block_size, scorer.packs)
    ]
    logprob = torch.zeros(len(questions), ENDINGS, dtype=torch.float64, device=scorer.device)
    stopped = False
    for batch in _batches(sorted(mine, key=lambda row: len(row.tokens)), scorer.most_tokens):
        stopped = is_stopped()
        if stopped:
            break
        _score_batch(batch, scorer, logprob)
    if dist.any(stopped):
        raise Interrupted
    return Scores(
        dist.sum(logprob).cpu(),
        torch.tensor([q.lengths for q in questions], dtype=torch.float64).reshape(-1, ENDINGS),
        torch.tensor([q.label for q in questions]),
    )


def _batches(rows: list[_Row], most_tokens: int) -> Iterable[list[_Row]]:
    batch: list[_Row] = []
    for row in rows:  # the longest last: it decides the width
        if batch and (len(batch) + 1) * len(row.tokens) > most_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _score_batch(batch: list[_Row], scorer: Scorer, logprob: Tensor) -> None:
    width = max(len(row.tokens) for row in batch)

    def padded(lists: list[list[int]], value: int) -> Tensor:
        return torch.tensor([x + [value] * (width - len(x)) for x in lists], device=scorer.device)

    tokens = padded([row.tokens for row in batch], 0)
    positions = padded([row.positions for row in batch], 0)
    mask = None
    if any(row.segments[-1] > 1 for row in batch):
        segments = padded([row.segments for row in batch], -1)  # (B, T)
        keys, queries = segments[:, None, None, :], segments[:, None, :, None]
        earlier = torch.ones(width, width, dtype=torch.bool, device=scorer.device).tril()
        mask = earlier & ((keys == 0) | (keys == queries))  # (B, 1, T, T)
    asked = [(i, row.question, *one) for i, row in enumerate(batch) for one in row.asked]
    rows, questions, columns, targets, endings = torch.tensor(asked, device=scorer.device).unbind(1)
    logits = scorer.logits_at(tokens, positions, mask, rows, columns)
    found = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0].double()
    logprob.index_put_((questions, endings), found, accumulate=True)


def evaluate(
    items: Sequence[Item], scorer: Scorer, dist: Dist, step: int, examples: int = 0, pool: Sequence[Item] = (),
    is_stopped: Callable[[], bool] = lambda: False,
) -> Scored:  # fmt: skip
    """Both conventions; with `examples` solved ones from `pool` before each question only the harness's."""
    began, suffix = time.perf_counter(), f"@{examples}" if examples else ""
    drawn = draw_examples(items, pool, examples) if examples else None
    scores = score(harness_questions(items, scorer.encode, drawn), scorer, dist, is_stopped)
    results = {f"hellaswag_acc_norm{suffix}": scores.accuracy}
    if not examples:
        questions = completion_questions(items, scorer.encode)
        results["hellaswag_completion"] = score(questions, scorer, dist, is_stopped).accuracy
    stderr = {name: math.sqrt(p * (1 - p) / max(1, len(items) - 1)) for name, p in results.items()}
    seconds = time.perf_counter() - began
    task = f"hellaswag{suffix}"
    return Scored(step=step, task=task, results=results, stderr=stderr, items=len(items), seconds=seconds)
