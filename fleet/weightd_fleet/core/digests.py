"""BLAKE3, which proves bytes between nodes. Only this module imports the package blake3."""

from __future__ import annotations

import re
from typing import Final, Protocol

from blake3 import blake3

BLOB_BYTES: Final = 32
"""Bytes of a digest."""
_NAME: Final = re.compile(r"b3:[0-9a-f]{64}")


class ProofHasher(Protocol):
    """A BLAKE3 hash of bytes that come in pieces. `update` releases the GIL for pieces of some kilobytes and more."""

    def update(self, data: bytes | memoryview, /) -> object:
        """Hash more bytes."""

    def digest(self) -> bytes:
        """The digest so far, BLOB_BYTES long."""


def new_hasher() -> ProofHasher:
    """A hash of nothing yet."""
    return blake3()


def blob_digest(data: bytes | memoryview) -> bytes:
    """The digest of some bytes."""
    return blake3(data).digest()


def fleet_name(manifest: bytes) -> str:
    """The name of a checkpoint in the fleet, `b3:` and 64 hex digits, by its encoded manifest."""
    return f"b3:{blob_digest(manifest).hex()}"


def is_fleet_name(text: str) -> bool:
    """Whether a text has the form of a checkpoint's name in the fleet."""
    return _NAME.fullmatch(text) is not None
