"""Addresses of agents, HOST:PORT, which may come from anywhere."""

from __future__ import annotations

import ipaddress
import re
from typing import Final, NamedTuple

from weightd.errors import InvalidReferenceError

_ADDRESS: Final = re.compile(r"(?:\[(?P<six>[0-9a-fA-F:.]{2,45})\]|(?P<host>[A-Za-z0-9._-]{1,253})):(?P<port>\d{1,5})")


class AgentAddress(NamedTuple):
    """Where an agent listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether it is on this machine by its form: 127.0.0.0/8, ::1 or localhost."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def is_any(self) -> bool:
        """Whether it stands for all addresses of a machine, 0.0.0.0 or ::, so that others cannot connect to it."""
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return False


def parse_address(text: str) -> AgentAddress:
    """The address that a text says. Errors: InvalidReferenceError."""
    found = _ADDRESS.fullmatch(text)
    port = int(found["port"]) if found else -1
    if found is None or not 0 <= port <= 65535:
        raise InvalidReferenceError(f"{text[:200]!r}: is no address of an agent; give HOST:PORT")
    return AgentAddress(found["six"] or found["host"], port)
