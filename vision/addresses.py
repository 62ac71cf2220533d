"""Which network addresses a picture may be fetched from.

Only globally routable ones, and those that the operator opened. Dials nothing and knows nothing of HTTP.
"""

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence

from aiohttp.abc import AbstractResolver, ResolveResult

from vision.config import IPNetwork

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
LookUp = Callable[[str], Awaitable[Sequence[str]]]  # host name → textual addresses

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_REFUSED: tuple[IPNetwork, ...] = (  # not everywhere known to `is_global`, whose list grew with Python's patch releases
    ipaddress.IPv4Network("192.0.0.0/24"),  # protocol assignments, one of them a cloud's metadata server
    ipaddress.IPv4Network("192.88.99.0/24"),  # 6to4 relays
    ipaddress.IPv4Network("168.63.129.16/32"),  # a cloud's host agent on an address that looks public
    ipaddress.IPv6Network("2001::/23"),  # protocol assignments, among them Teredo, which carries another address
    ipaddress.IPv6Network("2002::/16"),  # 6to4: carries another address
    ipaddress.IPv6Network("3fff::/20"),  # documentation
)


class BlockedAddressError(OSError):
    """None of a host's addresses may be dialled."""


class AddressPolicy:
    """Global addresses and the operator's own `allowed` networks."""

    def __init__(self, allowed: Sequence[IPNetwork] = ()) -> None:
        self._allowed = tuple(allowed)

    def permits(self, address: IPAddress) -> bool:
        address = _carried(address)
        return any(address in network for network in self._allowed) or _is_global(address)

    def check_host(self, host: str) -> None:
        """Refuses hosts that are an address in any spelling unless it is permitted; names are left to `CheckedResolver`.

        Raises BlockedAddressError. Spellings that only C libraries read (decimal, octal, hex, short) are refused whatever they mean, as
        are names for this machine (RFC 6761) whatever a resolver makes of them, unless loopback is permitted.
        """
        host = host.rstrip(".").lower()
        if host.endswith((".localhost", ".localdomain")) or host == "localhost":
            host = "127.0.0.1"
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            if _is_numeric_spelling(host):
                raise BlockedAddressError(host) from None
            return
        if not self.permits(address):
            raise BlockedAddressError(host)


class DomainPolicy:
    """The operator's list of hosts, where there is one: `example.org` is that host, `*.example.org` every host under it."""

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        """Names in lower case, as DNS has them (`xn--…`)."""
        self._hosts = frozenset(name for name in allowed if not name.startswith("*."))
        self._suffixes = tuple(name[1:] for name in allowed if name.startswith("*."))

    def permits(self, host: str) -> bool:
        host = host.rstrip(".").lower()
        return not (self._hosts or self._suffixes) or host in self._hosts or host.endswith(self._suffixes)


class CheckedResolver(AbstractResolver):
    """Gives aiohttp only addresses that the policy permits, so that a checked address is the one dialled."""

    def __init__(self, policy: AddressPolicy, look_up: LookUp) -> None:
        self._policy = policy
        self._look_up = look_up

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        """Raises BlockedAddressError where there is none, OSError where the name has no address."""
        addresses = [ipaddress.ip_address(text) for text in await self._look_up(host)]
        permitted = [address for address in addresses if self._policy.permits(address)]
        if not permitted:
            raise BlockedAddressError(host)
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in permitted
        ]

    async def close(self) -> None:
        pass


def _carried(address: IPAddress) -> IPAddress:
    """The IPv4 address that is reached through an IPv4-mapped or NAT64 one, else the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def _is_global(address: IPAddress) -> bool:
    if any(address in network for network in _REFUSED):
        return False
    if isinstance(address, ipaddress.IPv6Address):
        return address.is_global and address in _GLOBAL_UNICAST
    return address.is_global and not (address.is_multicast or address.is_reserved)


def _is_numeric_spelling(host: str) -> bool:
    try:
        socket.inet_aton(host)
    except (OSError, UnicodeEncodeError):
        return False
    return True
