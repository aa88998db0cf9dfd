"""The environment, read in one place. The worker, the API and the command line all take `Settings`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self, cast

DEFAULT_REDIS_URL = "redis://127.0.0.1:6379/0"
DEFAULT_URL = "http://127.0.0.1:8000"
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Settings:
    home: Path  # redis/ runs/ datasets/
    redis_url: str = DEFAULT_REDIS_URL
    url: str = DEFAULT_URL  # of the server that the command line talks to
    api_key: str = field(default="", repr=False)  # that the command line and the client send
    pool: str = "default"
    node: str = ""  # this node's name; empty: made from the machine's and the home's
    address: str = ""  # by which other nodes reach this one; empty: as seen on the way to Redis
    slots: str = ""  # "0-3,4-7": ranges of CPU cores or GPUs; empty: one slot with everything
    device: Literal["auto", "cpu", "cuda"] = "auto"
    grace_seconds: float = 60.0  # from a stop's word to the kill of the whole tree
    max_attempts: int = 3  # lost in a row without a new checkpoint
    price_per_gpu_hour: float = 0.0  # in whatever currency; 0: none is shown
    hf_namespaces: tuple[str, ...] = ()  # owners on the Hub in whose name jobs may publish
    trainer: str = ""  # program run in torchrun's place with RUN_DIR --attempt N: tests of process handling

    @property
    def runs(self) -> Path:
        return self.home / "runs"

    @property
    def datasets(self) -> Path:
        return self.home / "datasets"

    def refuses_repo(self, repo: str) -> str:
        """Why nothing may be published to owner/name; "" where it may."""
        owner = repo.partition("/")[0]
        if owner in self.hf_namespaces:
            return ""
        listed = ", ".join(self.hf_namespaces) or "nobody"
        return f"repo {repo!r}: jobs may publish as {listed} here; let TRAINMASTER_HF_NAMESPACES list {owner!r}"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Raises ValueError naming the variable that cannot be used."""
        env = {k: v for k, v in (os.environ if environment is None else environment).items() if v}
        device, price = env.get("TRAINMASTER_DEVICE", "auto"), "TRAINMASTER_PRICE_PER_GPU_HOUR"
        if device not in DEVICES:
            raise ValueError(f"TRAINMASTER_DEVICE {device!r} is unknown; use one of {', '.join(DEVICES)}")
        return cls(
            home=Path(env.get("TRAINMASTER_HOME", "~/.trainmaster")).expanduser().absolute(),
            redis_url=env.get("TRAINMASTER_REDIS_URL", DEFAULT_REDIS_URL),
            url=env.get("TRAINMASTER_URL", DEFAULT_URL).rstrip("/"),
            api_key=env.get("TRAINMASTER_API_KEY", "").strip(),
            pool=env.get("TRAINMASTER_POOL", "default"),
            node=_word(env, "TRAINMASTER_NODE"),
            address=env.get("TRAINMASTER_ADDRESS", ""),
            slots=env.get("TRAINMASTER_SLOTS", ""),
            device=cast(Literal["auto", "cpu", "cuda"], device),
            grace_seconds=_number(env, "TRAINMASTER_GRACE_SECONDS", cls.grace_seconds),
            max_attempts=int(_number(env, "TRAINMASTER_MAX_ATTEMPTS", cls.max_attempts)),
            price_per_gpu_hour=_number(env, price, 0.0) if env.get(price) else 0.0,
            hf_namespaces=tuple(filter(None, re.split(r"[,\s]+", env.get("TRAINMASTER_HF_NAMESPACES", "")))),
            trainer=env.get("TRAINMASTER_TRAINER", ""),
        )

    def to_environment(self) -> dict[str, str]:
        """The variables that make a child process read these same settings, but for the API key: none needs it."""
        return {
            "TRAINMASTER_HOME": str(self.home),
            "TRAINMASTER_REDIS_URL": self.redis_url,
            "TRAINMASTER_URL": self.url,
            "TRAINMASTER_POOL": self.pool,
            "TRAINMASTER_NODE": self.node,
            "TRAINMASTER_ADDRESS": self.address,
            "TRAINMASTER_SLOTS": self.slots,
            "TRAINMASTER_DEVICE": self.device,
            "TRAINMASTER_GRACE_SECONDS": str(self.grace_seconds),
            "TRAINMASTER_MAX_ATTEMPTS": str(self.max_attempts),
            "TRAINMASTER_PRICE_PER_GPU_HOUR": str(self.price_per_gpu_hour or ""),
            "TRAINMASTER_HF_NAMESPACES": ",".join(self.hf_namespaces),
            "TRAINMASTER_TRAINER": self.trainer,
        }


def _number(env: Mapping[str, str], name: str, default: float) -> float:
    try:
        number = float(env.get(name, default))
    except ValueError:
        raise ValueError(f"{name} {env[name]!r} is no number; use one above 0") from None
    if not number > 0:
        raise ValueError(f"{name} {env[name]!r} is not above 0; use a larger one")
    return number


def _word(env: Mapping[str, str], name: str) -> str:
    word = env.get(name, "")
    if word and not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", word):
        raise ValueError(f"{name} {word!r} cannot name a node; use letters, digits, _ and -, at most 60")
    return word
