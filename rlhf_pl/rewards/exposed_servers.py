"""Warns about servers whose weights any client can replace: `vllm serve` in dev mode without a key."""

import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit

from rlhf_pl.utils.console import warn

PROBE_TIMEOUT_S = 3.0
_DEV_PATH = "/server_info"  # only served in dev mode


def warn_about_open_servers(urls: list[str]) -> None:
    """Print a warning for each dev-mode server that other hosts can reach without a key."""
    for url in urls:
        for host in _external_addresses(urlsplit(url).hostname or ""):
            if _serves_dev_path(url, host):
                warn(
                    f"the server at {url} runs in dev mode and answers on {host} without a key: any client that "
                    "reaches it can stop it and replace its weights. Start it with --host 127.0.0.1 if the trainer is "
                    "on the same host, or block other clients from its port (a firewall, a private network, or a proxy "
                    "that requires a key; vLLM's own --api-key only covers /v1)."
                )
                break


def _external_addresses(host: str) -> list[str]:
    """The addresses of a server that other hosts can reach; of this host, if the server is on it."""
    found = _addresses(host)
    if any(address.is_loopback or address.is_unspecified for address in found):
        found = [*_addresses(socket.gethostname()), *_outgoing_address()]
    return list(dict.fromkeys(str(a) for a in found if not (a.is_loopback or a.is_unspecified or a.is_link_local)))


def _addresses(host: str) -> list[Any]:
    try:
        return [ipaddress.ip_address(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except (OSError, ValueError):
        return []


def _outgoing_address() -> list[Any]:
    """The address from which this host reaches others. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return [ipaddress.ip_address(probe.getsockname()[0])]
        except OSError:
            return []


def _serves_dev_path(url: str, host: str) -> bool:
    """Whether the server returns the dev-mode path to a client without a key."""
    import httpx

    parts = urlsplit(url)
    address = f"[{host}]" if ":" in host else host
    port = f":{parts.port}" if parts.port else ""
    try:
        # no redirects, no proxies: only this address is checked
        with httpx.Client(timeout=PROBE_TIMEOUT_S, trust_env=False, verify=False) as client:
            return client.get(f"{parts.scheme}://{address}{port}{parts.path}{_DEV_PATH}").status_code == 200
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
