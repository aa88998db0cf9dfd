"""Text from an exported model as it is written, by stock transformers: `python -m trainmaster.sample FOLDER`.

A process of its own, so that what loads here loads anywhere: no code of ours takes part.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def sample(model_name: str, prompt: str, max_tokens: int, temperature: float, seed: int, stream: bool) -> str:
    """Load a folder, or a Hub repository, as any tool would and let it go on from the prompt."""
    if Path(model_name).exists():
        os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer: Any = AutoTokenizer.from_pretrained(model_name)
    model: Any = AutoModelForCausalLM.from_pretrained(model_name)
    context = model.config.max_position_embeddings
    given = tokenizer(prompt, return_tensors="pt")["input_ids"] if prompt else torch.tensor([[tokenizer.bos_token_id]])
    max_tokens = min(max_tokens, context - 1)
    given = given[:, -(context - max_tokens) :]  # the oldest tokens of a long prompt do not count
    torch.manual_seed(seed)
    tokens = model.generate(
        given, attention_mask=torch.ones_like(given), pad_token_id=tokenizer.eos_token_id,
        max_new_tokens=max_tokens, do_sample=temperature > 0, temperature=temperature or None,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True) if stream else None,
    )  # fmt: skip
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trainmaster.sample", description=__doc__)
    parser.add_argument("model", help="a folder, or owner/name on the Hub")
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="the whole text at the end, as JSON")
    asked = parser.parse_args()
    text = sample(asked.model, asked.prompt, asked.max_tokens, asked.temperature, asked.seed, not asked.json)
    if asked.json:
        sys.stdout.write(json.dumps({"sample": text}) + "\n")


if __name__ == "__main__":
    main()
