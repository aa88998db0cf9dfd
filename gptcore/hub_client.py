"""The Hub's client, kept from services that only this machine should reach."""

import ipaddress
import os
from functools import cache

import httpx2

from gptcore.environment import check_hub_variables

HUB = "https://huggingface.co"


def prepare_hub_client() -> None:
    """Call before using huggingface_hub. Raises ValueError as `check_hub_variables` does."""
    check_hub_variables()
    _install()


@cache
def _install() -> None:
    from huggingface_hub import set_client_factory

    set_client_factory(_guarded_client)


def _guarded_client() -> httpx2.Client:
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()
    client.event_hooks["request"].append(refuse_local_redirect)
    return client


def hub_endpoint() -> str:
    """Return the address of the Hub or its mirror, without a slash at its end."""
    return os.environ.get("HF_ENDPOINT", HUB).rstrip("/")


def refuse_local_redirect(request: httpx2.Request) -> None:
    """Raise ValueError if a request goes to this machine, but the Hub's own address does not.

    A mirror could otherwise redirect a download to a service behind the firewall, whose answer the job would store.
    Called before every request, those of redirects too. Names that only resolve to such an address are not seen.
    """
    host = request.url.host
    if _is_local(host) and not _is_local(httpx2.URL(hub_endpoint()).host):
        raise ValueError(f"the Hub at {hub_endpoint()} redirects to {host}, an address of this machine alone")


def _is_local(host: str) -> bool:
    """Return whether a host can only be this machine, or the network's own services (link-local addresses)."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_link_local or address.is_unspecified
