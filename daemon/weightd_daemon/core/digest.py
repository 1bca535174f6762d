"""Digests and the identity of blobs.

xxh3_128 is fast, not collision-resistant: a digest only ever makes a *candidate*, whose bytes are then compared.
Bytes that differ under one digest and length are told apart by their *variant*.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import xxhash

DIGEST_BYTES = 16


class DigestHasher(Protocol):
    """Interface of the hash objects that blob digests are made with: hashlib's and xxhash's.

    `update` releases the GIL, the one-shot functions do not.
    """

    def update(self, data: memoryview, /) -> None:
        """Hash more bytes."""

    def digest(self) -> bytes:
        """The digest so far, DIGEST_BYTES long."""


NewHasher = Callable[[], DigestHasher]

new_hasher: NewHasher = xxhash.xxh3_128

EMPTY_DIGEST: bytes = xxhash.xxh3_128(b"").digest()


class BlobIdentity(NamedTuple):
    """Content address of a blob: digest, length in bytes, and variant."""

    digest: bytes
    length: int
    variant: int
