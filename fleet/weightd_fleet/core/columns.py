"""The blobs of a fleet in columns: 32 bytes of digest, 8 of length and 12 of index each, found by their digests.

Objects in a dict would take ten times as much, and a fleet has hundreds of thousands of blobs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from weightd.errors import FormatError

from .digests import BLOB_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .atoms import Bytes, Ids


class BlobColumns:
    """Numbers blobs by digest, from 0 on, and keeps their lengths."""

    def __init__(self) -> None:
        self._digests = np.zeros((0, BLOB_BYTES), np.uint8)
        self._lengths = np.zeros(0, np.int64)
        self._count = 0
        # The first eight bytes of each digest in ascending order, and whose they are. Digests may begin alike.
        self._prefixes = np.zeros(0, np.uint64)
        self._order = np.zeros(0, np.int32)

    def __len__(self) -> int:
        return self._count

    @property
    def lengths(self) -> Bytes:
        """The length of each blob in bytes, by number."""
        return self._lengths[: self._count]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        columns = (self._digests, self._lengths, self._prefixes, self._order)
        return sum(column.nbytes for column in columns)

    def number(self, blobs: Sequence[tuple[bytes, int]]) -> Ids:
        """The numbers of blobs, given by digest and length, in ascending order, each once. New ones are entered.

        Errors: FormatError (a digest of another size, a negative length, or two lengths for one digest); then nothing
        is entered.
        """
        lengths = dict(blobs)
        if any(len(digest) != BLOB_BYTES for digest in lengths):
            raise FormatError(f"a blob's digest must have {BLOB_BYTES} bytes")
        if any(length < 0 or lengths[digest] != length for digest, length in blobs):
            raise FormatError("a blob has a negative length, or two lengths; whoever made this manifest is not trusted")
        wanted = np.frombuffer(b"".join(lengths), np.uint8).reshape(-1, BLOB_BYTES)
        wanted_lengths = np.fromiter(lengths.values(), np.int64, len(lengths))
        found = self._find(wanted)
        known = found >= 0
        if (self._lengths[found[known]] != wanted_lengths[known]).any():
            raise FormatError("a blob has another length than in a manifest before; one of the two is not trusted")
        found[~known] = self._enter(wanted[~known], wanted_lengths[~known])
        return np.sort(found)

    def _find(self, wanted: np.ndarray) -> Ids:
        """The number of each digest, -1 where there is none."""
        prefixes = _prefixes(wanted)
        begin = np.searchsorted(self._prefixes, prefixes, "left")
        alike = np.searchsorted(self._prefixes, prefixes, "right") - begin
        found = np.full(len(wanted), -1, np.int32)
        for step in range(int(alike.max(initial=0))):
            rows = np.flatnonzero(step < alike)
            candidates = self._order[begin[rows] + step]
            equal = (self._digests[candidates] == wanted[rows]).all(axis=1)
            found[rows[equal]] = candidates[equal]
        return found

    def _enter(self, digests: np.ndarray, lengths: Bytes) -> Ids:
        """Enter blobs that are not there; returns their numbers."""
        end = self._count + len(digests)
        if end > len(self._lengths):
            room = max(end, len(self._lengths) * 5 // 4)
            self._digests = _grown(self._digests, room)
            self._lengths = _grown(self._lengths, room)
        numbers = np.arange(self._count, end, dtype=np.int32)
        self._digests[numbers], self._lengths[numbers] = digests, lengths
        self._count = end
        prefixes = _prefixes(digests)
        order = np.argsort(prefixes, kind="stable")
        places = np.searchsorted(self._prefixes, prefixes[order])
        self._prefixes = np.insert(self._prefixes, places, prefixes[order])
        self._order = np.insert(self._order, places, numbers[order])
        return numbers


def _prefixes(digests: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(digests[:, :8]).view(">u8").ravel().astype(np.uint64)


def _grown(column: np.ndarray, room: int) -> np.ndarray:
    grown = np.zeros((room, *column.shape[1:]), column.dtype)
    grown[: len(column)] = column
    return grown
