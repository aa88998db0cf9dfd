"""Text to tokens and back: bytes, or GPT-2's BPE. No network; the ranks are in the package."""

import base64
import hashlib
from functools import cache
from pathlib import Path

import numpy as np

GPT2_RANKS = Path(__file__).parent / "assets" / "gpt2.tiktoken"
# the hash tiktoken itself demands of these ranks
GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_EOT = 50256
# code, numbers, blanks, accents, scripts, an emoji, CRLF: tokenizers that agree on it are taken for equal
PROBE = "def f(x):\n\treturn 'naïve' * 12345 + x  # it's 你好 😀\r\n\n\n    I'LL pay £3.50\n"
# how GPT-2 parts a text before it merges bytes (Radford et al. 2019)
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class ByteTokenizer:
    """A token a byte. Documents are parted by byte 0, which text does not hold."""

    name = "bytes"
    vocab_size = 256
    eot = 0  # stands before every document

    def encode(self, text: str) -> np.ndarray:
        """Tokens (n,) uint16 of a document, without its `eot`."""
        return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.uint16)

    def decode(self, tokens: list[int]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""
        return bytes(tokens).decode("utf-8", "replace")

    def token_bytes(self) -> np.ndarray:
        """Bytes of text of each token (vocab_size,) int64; `eot` has none."""
        return np.array([0] + [1] * 255)


class GPT2Tokenizer:
    """The same of GPT-2's BPE, through tiktoken; text that spells a special token is only text."""

    name = "gpt2"
    vocab_size = 50257
    eot = GPT2_EOT

    def __init__(self) -> None:
        import tiktoken

        self._encoding = tiktoken.Encoding(
            "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=gpt2_ranks(), special_tokens={"<|endoftext|>": GPT2_EOT}
        )

    def encode(self, text: str) -> np.ndarray:
        # a lone surrogate has no UTF-8 form: it becomes "?"
        text = text.encode("utf-8", "replace").decode("utf-8")
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except ValueError:  # a million blanks in a row are too many for the pattern's matcher
            half = len(text) // 2
            return np.concatenate((self.encode(text[:half]), self.encode(text[half:])))

    def decode(self, tokens: list[int]) -> str:
        return self._encoding.decode(tokens)

    def token_bytes(self) -> np.ndarray:
        by_rank = sorted((rank, len(token)) for token, rank in gpt2_ranks().items())
        return np.array([length for _, length in by_rank] + [0])


Tokenizer = ByteTokenizer | GPT2Tokenizer


def gpt2_ranks() -> dict[bytes, int]:
    """GPT-2's 50,256 byte sequences by rank. Raises ValueError where the file was changed."""
    data = GPT2_RANKS.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != GPT2_RANKS_SHA256:
        raise ValueError(f"{GPT2_RANKS} is damaged: sha256 {found}, wanted {GPT2_RANKS_SHA256}; reinstall")
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, data.splitlines())}


@cache
def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called "bytes" or "gpt2"."""
    return ByteTokenizer() if name == "bytes" else GPT2Tokenizer()


def tokenizer_difference(theirs: list[int], name: str) -> str:
    """Return how the tokens `theirs` of PROBE differ from those of tokenizer `name`; empty if they are equal."""
    ours = load_tokenizer(name).encode(PROBE).tolist()
    if theirs == ours:
        return ""
    at = next((i for i, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]), None)
    first = "" if at is None else f", the first other one at {at}: {theirs[at]} instead of {ours[at]}"
    return f"a probe text is {len(theirs)} tokens there, {len(ours)} with {name}{first}"
