"""Addresses by which hosts reach each other."""

import ipaddress
import socket
from collections.abc import Sequence


def resolve(name: str) -> str:
    """Resolve a name to a number on this host; the name itself if that fails."""
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return name


def seen_from_others(addresses: Sequence[str]) -> str:
    """Choose rank 0's address from those that the ranks resolve it to.

    A host may resolve its own name to a loopback address, where no other host reaches it. The last ranks are on other
    hosts.
    """
    return next((address for address in reversed(addresses) if not _is_loopback(address)), addresses[0])


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
