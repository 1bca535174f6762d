"""Bytes that are named by their BLAKE3: how they are read piece by piece, and checked on the way."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, Protocol

from weightd.errors import DigestMismatchError, FormatError
from weightd_fleet.core.digests import new_hasher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PIECE: Final = 2 << 20
"""Most bytes that are read or sent at once."""


class BlobReader(Protocol):
    """A place that has blobs."""

    def __contains__(self, digest: bytes, /) -> bool:
        """Whether a blob is there."""

    def pieces(self, digest: bytes, /) -> Iterator[memoryview]:
        """The bytes of a blob, in pieces of at most PIECE. They are not checked. Errors: FormatError."""


def file_pieces(descriptor: int, offset: int, length: int, what: str) -> Iterator[memoryview]:
    """The bytes of a file from `offset` on. Errors: FormatError (it is shorter, or cannot be read)."""
    buffer = memoryview(bytearray(min(PIECE, length)))
    end = offset + length
    while offset < end:
        try:
            count = os.preadv(descriptor, [buffer[: min(PIECE, end - offset)]], offset)
        except OSError as error:
            raise FormatError(f"{what}: cannot be read at byte {offset}: {error.strerror}") from error
        if not count:
            raise FormatError(f"{what}: has no byte at {offset}; it was cut off")
        yield buffer[:count]
        offset += count


def copy_checked(
    pieces: Iterator[memoryview], digest: bytes, length: int, write: Callable[[memoryview], object]
) -> None:
    """Write a blob, and compare what was written with its digest at the end.

    Errors: DigestMismatchError (what was written must not be used), and those of the pieces and of `write`.
    """
    hasher = new_hasher()
    done = 0
    for piece in pieces:
        done += len(piece)
        if done > length:
            break
        hasher.update(piece)
        write(piece)
    if done != length or hasher.digest() != digest:
        raise DigestMismatchError(
            f"blob {digest.hex()[:16]}: its bytes on this node are no longer its own; fetch again"
        )
