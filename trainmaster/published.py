"""What a published model says of its own making: the spec in its repository."""

import os
from typing import Any

import httpx2

from gptcore.environment import hub_token
from trainmaster.client import TrainmasterError

ADDRESS = "hf://"


def fetch_spec(address: str) -> dict[str, Any]:
    """hf://owner/name@revision → the spec that makes the model again, without its publishing.

    Raises TrainmasterError. A private repository needs HF_TOKEN.
    """
    repo, _, revision = address.removeprefix(ADDRESS).partition("@")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    try:
        token = hub_token()
    except ValueError as error:
        raise TrainmasterError(str(error), code="bad_setting") from error
    url = f"{endpoint}/{repo}/resolve/{revision or 'main'}/trainmaster.json"
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = httpx2.get(url, headers=headers, follow_redirects=True, timeout=30.0)
    except httpx2.TransportError as error:
        raise TrainmasterError(f"{endpoint} cannot be reached: {error}", code="hub_unreachable") from error
    if not answer.is_success:
        why = f"{url} answers {answer.status_code}; the repository must hold trainmaster.json"
        raise TrainmasterError(f"{why}, and HF_TOKEN may read it where it is private", code="no_spec")
    spec: dict[str, Any] = answer.json()
    return {**spec, "publish": None}
