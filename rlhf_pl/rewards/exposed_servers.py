"""Whether strangers could give a server other weights: `vllm serve` in dev mode lets whoever reaches it do so."""

import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit

from rlhf_pl.utils.console import warn

PROBE_TIMEOUT_S = 3.0
_DEV_PATH = "/server_info"  # served in dev mode only


def warn_of_open_servers(urls: list[str]) -> None:
    """Print a warning for each server that answers without a key on an address which other hosts reach."""
    for url in urls:
        for host in _outside(urlsplit(url).hostname or ""):
            if _answers(url, host):
                warn(
                    f"the server at {url} runs in dev mode and answers on {host} without a key: whoever reaches it can "
                    "stop it and replace its weights. Start it with --host 127.0.0.1 where the trainer is on the same "
                    "host, or let no others through to its port (a firewall, a private network, a proxy that asks for "
                    "a key; vLLM's own --api-key covers /v1 only)."
                )
                break


def _outside(host: str) -> list[str]:
    """The addresses of a server that are not this host's alone: its own, or for one on this host, this host's."""
    found = _addresses(host)
    if any(address.is_loopback or address.is_unspecified for address in found):
        found = [*_addresses(socket.gethostname()), *_route()]
    return list(dict.fromkeys(str(a) for a in found if not (a.is_loopback or a.is_unspecified or a.is_link_local)))


def _addresses(host: str) -> list[Any]:
    try:
        return [ipaddress.ip_address(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except (OSError, ValueError):
        return []


def _route() -> list[Any]:
    """This host's address towards others; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return [ipaddress.ip_address(probe.getsockname()[0])]
        except OSError:
            return []


def _answers(url: str, host: str) -> bool:
    """Whether the server gives strangers what only dev mode has."""
    import httpx

    parts = urlsplit(url)
    place = f"[{host}]" if ":" in host else host
    port = f":{parts.port}" if parts.port else ""
    try:
        # no redirects, no proxies: it is this address that counts
        with httpx.Client(timeout=PROBE_TIMEOUT_S, trust_env=False, verify=False) as client:
            return client.get(f"{parts.scheme}://{place}{port}{parts.path}{_DEV_PATH}").status_code == 200
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
