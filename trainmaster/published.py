"""What a published model says of its own making: the spec in its repository."""

from typing import Any

import httpx2

from gptcore.environment import hub_token
from gptcore.hub_client import hub_endpoint, refuse_local_redirect
from trainmaster.client import TrainmasterError

ADDRESS = "hf://"


def fetch_spec(address: str) -> dict[str, Any]:
    """hf://owner/name@revision → the spec that makes the model again, without its publishing.

    Raises TrainmasterError. A private repository needs HF_TOKEN.
    """
    repo, _, revision = address.removeprefix(ADDRESS).partition("@")
    endpoint = hub_endpoint()
    try:
        token = hub_token()
    except ValueError as error:
        raise TrainmasterError(str(error), code="bad_setting") from error
    url = f"{endpoint}/{repo}/resolve/{revision or 'main'}/trainmaster.json"
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        hooks = {"request": [refuse_local_redirect]}
        with httpx2.Client(event_hooks=hooks, headers=headers, follow_redirects=True, timeout=30.0) as client:
            answer = client.get(url)
    except ValueError as error:
        raise TrainmasterError(str(error), code="hub_redirects") from error
    except httpx2.TransportError as error:
        raise TrainmasterError(f"{endpoint} cannot be reached: {error}", code="hub_unreachable") from error
    if not answer.is_success:
        why = f"{url} answers {answer.status_code}; the repository must hold trainmaster.json"
        raise TrainmasterError(f"{why}, and HF_TOKEN may read it where it is private", code="no_spec")
    try:
        spec = answer.json()
    except (ValueError, RecursionError):
        spec = None
    if not isinstance(spec, dict):
        raise TrainmasterError(f"{url} is not a JSON object, so it holds no spec", code="no_spec")
    return {**spec, "publish": None}
