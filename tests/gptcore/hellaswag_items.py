"""Items in HellaSwag's format, made of the standard library's prose: real words, no download."""

from __future__ import annotations

import json
import random
import re
import sysconfig
from pathlib import Path
from typing import Any


def make_items(count: int, seed: int) -> list[dict[str, Any]]:
    """The right ending follows the context in its file; the others come from anywhere."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = " ".join(p.read_text() for p in sorted(folder.glob("[a-f]*.py")))
    words = re.findall(r"[A-Za-z]+[,.]?", text)
    generator = random.Random(seed)

    def some(start: int, count: int) -> str:
        return " ".join(words[start : start + count])

    items = []
    for number in range(count):
        start, a, b, ending = (generator.randrange(n) for n in (len(words) - 200, 5, 4, 4))
        ctx_a, ctx_b = some(start, a + 3) + ".", some(start + a + 3, b)
        endings = [some(generator.randrange(len(words) - 200), 2 + generator.randrange(4)) + "." for _ in range(4)]
        label = generator.randrange(4)
        endings[label] = some(start + a + 3 + b, ending + 2) + "."
        ctx_b += " [title]" if number % 7 == 0 else " so  that [step]" if number % 11 == 0 else ""
        items.append(
            {
                "ind": number, "activity_label": some(start, 2), "ctx_a": ctx_a, "ctx_b": ctx_b,
                "ctx": f"{ctx_a} {ctx_b}", "endings": endings, "label": label if number % 2 else str(label),
            }
        )  # fmt: skip
    return items


def write_items(datasets: Path, val: int = 200, train: int = 60) -> Path:
    """`datasets/hellaswag/` with both files."""
    folder = datasets / "hellaswag"
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("val", val), ("train", train)):
        lines = [json.dumps({**item, "label": str(item["label"])}) for item in make_items(count, seed=len(name))]
        (folder / f"hellaswag_{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_task(folder: Path, items: Path) -> None:
    """lm-evaluation-harness's own hellaswag as a task `hellaswag_local` that reads these files."""
    import lm_eval.tasks

    theirs = Path(lm_eval.tasks.__file__).parent / "hellaswag" / "hellaswag.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hellaswag_local.yaml").write_text(
        f"include: {theirs}\ntask: hellaswag_local\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    train: {items}/hellaswag_train.jsonl\n"
        f"    validation: {items}/hellaswag_val.jsonl\n"
    )
