"""How manifests are written as bytes: numbers of 8 bytes, texts behind their length, digests of 32 bytes."""

from __future__ import annotations

import struct
from typing import Final, NoReturn

from weightd.errors import FormatError

from .digests import BLOB_BYTES

MAX_MANIFEST_BYTES: Final = 64 << 20
MAX_TEXT_BYTES: Final = 4096
MAX_NUMBER: Final = 2**63 - 1

_NUMBER: Final = struct.Struct("<Q")


class ManifestWriter:
    """Collects what is encoded."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def number(self, value: int) -> None:
        """Write a number from 0 to MAX_NUMBER."""
        self._parts.append(_NUMBER.pack(value))

    def numbers(self, *values: int) -> None:
        """Write numbers, without saying how many."""
        self._parts.append(struct.pack(f"<{len(values)}Q", *values))

    def text(self, value: str) -> None:
        """Write a text in UTF-8, behind its length."""
        encoded = value.encode()
        self._parts += (_NUMBER.pack(len(encoded)), encoded)

    def digest(self, value: bytes) -> None:
        """Write a digest."""
        self._parts.append(value)

    def content(self) -> bytes:
        """All that was written."""
        return b"".join(self._parts)


class ManifestReader:
    """Reads what a ManifestWriter wrote, from bytes that may be anything. Every method raises FormatError."""

    def __init__(self, encoded: bytes, magic: bytes) -> None:
        if len(encoded) > MAX_MANIFEST_BYTES:
            self.fail(f"has {len(encoded)} bytes, over the limit of {MAX_MANIFEST_BYTES}")
        if not encoded.startswith(magic):
            self.fail("is no manifest of this version")
        self._encoded = encoded
        self._position = len(magic)

    def fail(self, fault: str) -> NoReturn:
        """Raise the error that says what is wrong."""
        raise FormatError(f"manifest: {fault}; publish the checkpoint again, or drop the peer that sent it")

    def number(self) -> int:
        """A number from 0 to MAX_NUMBER."""
        (value,) = _NUMBER.unpack(self._take(_NUMBER.size))
        if value > MAX_NUMBER:
            self.fail("has a number of more than 63 bits")
        return int(value)

    def count(self, most: int) -> int:
        """How many entries follow, at most `most`."""
        value = self.number()
        if value > most:
            self.fail(f"has a list of {value} entries, over the limit of {most}")
        return value

    def text(self) -> str:
        """A text of at most MAX_TEXT_BYTES."""
        length = self.number()
        if length > MAX_TEXT_BYTES:
            self.fail(f"has a text of {length} bytes, over the limit of {MAX_TEXT_BYTES}")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            self.fail("has a text that is not UTF-8")

    def digest(self) -> bytes:
        """A digest."""
        return self._take(BLOB_BYTES)

    def _take(self, length: int) -> bytes:
        end = self._position + length
        if end > len(self._encoded):
            self.fail("ends too early")
        taken = self._encoded[self._position : end]
        self._position = end
        return taken
