"""Text from an exported model as it is written, by stock transformers: `python -m trainmaster.sample FOLDER`.

A process of its own, so that what loads here loads anywhere: no code of ours takes part.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

PROMPT, MAX_TOKENS, TEMPERATURE, SEED = "", 200, 0.8, 0  # the command line's too


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
    given = given[:, -(context - 1) :]  # the oldest tokens of a prompt too long do not count
    max_tokens = min(max_tokens, context - given.shape[1])
    torch.manual_seed(seed)
    tokens = model.generate(
        given, attention_mask=torch.ones_like(given), pad_token_id=tokenizer.eos_token_id,
        max_new_tokens=max_tokens, do_sample=temperature > 0, temperature=temperature or None,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True) if stream else None,
    )  # fmt: skip
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def main(
    model: str, prompt: str = PROMPT, max_tokens: int = MAX_TOKENS, temperature: float = TEMPERATURE, seed: int = SEED,
    as_json: Annotated[bool, typer.Option("--json", help="the whole text at the end, as JSON")] = False,
) -> None:  # fmt: skip
    """Let the model of a folder, or of owner/name on the Hub, write."""
    try:
        text = sample(model, prompt, max_tokens, temperature, seed, not as_json)
    except OSError as error:  # no such repository, or the Hub is out of reach
        sys.exit(f"{model}: {error}")
    if as_json:
        sys.stdout.write(json.dumps({"sample": text}) + "\n")


if __name__ == "__main__":
    typer.run(main)
