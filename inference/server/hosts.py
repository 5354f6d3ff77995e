"""Which `Host` a request may name. A page whose name is made to point at this machine still says its own name."""

import ipaddress
import re
from collections.abc import Sequence

ANY = "*"

_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)(:[0-9]{1,5})?")


class Hosts:
    """The names of one server.

    The bound address; on loopback also `localhost` and every loopback address, bound to all addresses every address
    (only names can be forged) and `localhost`; the address that the connection came to; and those that are allowed.

    Args:
        bound: the address or name to which the server is bound.
        allowed: further names; `*` is all of them.
    """

    def __init__(self, bound: str, allowed: Sequence[str]) -> None:
        self._names = {name.lower() for name in (bound, *allowed)}
        address = _address(bound)
        everywhere = address is not None and address.is_unspecified
        local = bound.lower() == "localhost" or (address is not None and address.is_loopback)
        self._addresses = everywhere
        self._local = local or everywhere

    def allow(self, authority: str, reached: str | None) -> bool:
        """Whether `authority`, a host with or without a port, is one of them; `reached` is the connection's address."""
        match = _AUTHORITY.fullmatch(authority)
        if match is None:
            return False
        name = match[1].lower().removesuffix(".").strip("[]")
        if name in self._names or ANY in self._names:
            return True
        address = _address(name)
        if address is None:
            return self._local and (name == "localhost" or name.endswith(".localhost"))
        return self._addresses or name == reached or (self._local and address.is_loopback)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
