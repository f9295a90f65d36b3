"""Which address of a host the others know."""

import ipaddress
import socket
from collections.abc import Sequence


def resolve(name: str) -> str:
    """The number that this host knows a name by; the name itself where it knows none."""
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return name


def seen_from_others(addresses: Sequence[str]) -> str:
    """Rank 0's address, of those that the ranks know it by.

    A host may know itself by a loopback address, at which no other host reaches it; the last ranks are on other hosts.
    """
    return next((address for address in reversed(addresses) if not _is_loopback(address)), addresses[0])


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
