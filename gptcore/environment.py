"""Environment variables that are sent or used exactly as they stand, checked before they are."""

import os
from collections.abc import Mapping

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # the Hub's client takes the second if the first is not set
HUB_VARIABLES = (*TOKENS, "HF_ENDPOINT")


def hub_token(environment: Mapping[str, str] | None = None) -> str | None:
    """Return the token for the Hub; None if there is none. Raises ValueError as `check_hub_variables` does."""
    env = os.environ if environment is None else environment
    check_hub_variables(env)
    return next((token for name in TOKENS if (token := env.get(name, "").strip())), None)


def check_hub_variables(environment: Mapping[str, str] | None = None) -> None:
    """Raise ValueError if a variable that the Hub's client reads cannot be meant. No message holds a token."""
    env = os.environ if environment is None else environment
    for name in HUB_VARIABLES:
        refuse_quotes(name, env.get(name, ""))
    for name in TOKENS:
        token = env.get(name, "").strip()
        for place, character in enumerate(token, 1):
            if not "!" <= character <= "~":  # no header could carry it
                way_out = "copy the token again from https://huggingface.co/settings/tokens"
                raise ValueError(f"{name}: character {place} of {len(token)} is {character!r}; {way_out}")


def refuse_quotes(name: str, value: str) -> None:
    """Raise ValueError if a variable's value stands in quotes, which would count as a part of it."""
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        raise ValueError(f"{name} has quotes around its value; remove them (docker's --env-file keeps quotes)")
