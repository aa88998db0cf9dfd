"""`trainmaster sample`: text from an exported model as it is written, by stock transformers.

What loads here loads anywhere: the model, its tokenizer and the sampling are stock code.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from gptcore.control_characters import escape_controls
from trainmaster.mistake import Mistake
from worker.settings import Settings


def main(
    model: Annotated[str, typer.Argument(metavar="JOB", help="a job's id, an exported folder, or hf://owner/name")],
    prompt: Annotated[str, typer.Option(help="what the text begins with")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="to write at most")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time")] = 0.8,
    seed: Annotated[int, typer.Option(help="the same one writes the same text")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print the whole text at its end, as JSON")] = False,
) -> None:
    """Let an exported model write, by stock transformers on this machine."""
    name = _exported(model)
    if Path(name).exists():
        os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from gptcore.scorer import load_model

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        net: Any = load_model(name, "auto")
    except OSError as error:  # no such repository, or the Hub is out of reach
        raise Mistake(f"{name}: {error}") from error
    context = net.config.max_position_embeddings
    given = tokenizer(prompt, return_tensors="pt")["input_ids"] if prompt else torch.tensor([[tokenizer.bos_token_id]])
    given = given[:, -(context - 1) :]  # the oldest tokens of a prompt too long do not count
    torch.manual_seed(seed)
    tokens = net.generate(
        given, attention_mask=torch.ones_like(given), pad_token_id=tokenizer.eos_token_id,
        max_new_tokens=min(max_tokens, context - given.shape[1]),
        do_sample=temperature > 0, temperature=temperature or None,
        streamer=None if as_json else _printer(tokenizer),
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps({"sample": tokenizer.decode(tokens[0], skip_special_tokens=True)}))


def _printer(tokenizer: Any) -> Any:
    """Return a streamer that prints text as it is written, without the control characters that a model can make."""
    from transformers import TextStreamer

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            typer.echo(escape_controls(text), nl=stream_end)

    return Printer(tokenizer, skip_special_tokens=True)


def _exported(model: str) -> str:
    """The folder of a job or path, or owner/name of a Hub address."""
    if model.startswith("hf://"):
        return model.removeprefix("hf://")
    folders = [Settings.from_environment().runs / model / "export", Path(model)]
    found = [folder for folder in folders if (folder / "config.json").is_file()]
    if not found:
        raise Mistake(f"{model}: no exported model in {' or '.join(map(str, folders))}; a job exports at its end")
    return str(found[0])
