"""Text from an exported model, by stock transformers alone: `python -m trainmaster.sample FOLDER`.

A process of its own, so that what loads here loads anywhere: no code of ours takes part.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

PROMPT = "def "
NEW_TOKENS = 160


def sample(folder: Path) -> str:
    """Load the folder as any tool would and let it go on from a prompt."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.7)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    print(json.dumps({"sample": sample(Path(sys.argv[1]))}))  # noqa: T201 - its answer
