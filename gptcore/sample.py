"""Text from a model in training. Exported models are sampled by stock `transformers`."""

import torch

from gptcore.model import GPT
from gptcore.tokenizer import Tokenizer

LEAST_TEMPERATURE = 1e-3  # the likeliest token each time; what logits are divided by must not overflow them


@torch.no_grad()
def sample(model: GPT, tokenizer: Tokenizer, prompt: str, max_tokens: int, temperature: float, seed: int) -> str:
    """Continue `prompt` by up to `max_tokens`; temperature 0 takes the likeliest token each time.

    Draws from a generator of its own: the training's results do not depend on sampling.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = [tokenizer.eot, *tokenizer.encode(prompt).tolist()]
    written: list[int] = []
    while len(written) < max_tokens:
        window = torch.tensor([tokens[-model.spec.block_size :]], device=device)
        logits = model.head(model.hidden(window)[0, -1])[: tokenizer.vocab_size]  # the model's may be larger
        if temperature < LEAST_TEMPERATURE:
            token = int(logits.argmax())
        else:
            chances = torch.softmax(logits / temperature, dim=-1)
            token = int(torch.multinomial(chances, 1, generator=generator))
        if token == tokenizer.eot:
            break
        tokens.append(token)
        written.append(token)
    return tokenizer.decode(written)
