"""Comparisons made by an open load: which blobs of one digest and length were compared, with which result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .blob import Blob


@dataclass(slots=True, eq=False)
class DuplicateBlobs:
    """Placed blobs of equal bytes. They have been compared with the sealed blobs numbered in `known`.

    Those of them with the same variant are equal, the others differ.
    """

    known: set[int]
    blobs: list[Blob] = field(default_factory=list)


class DuplicateCandidates:
    """Blobs that a new blob may duplicate: for one key, one blob per variant, and further ones of equal bytes.

    Sealed blobs of one key are equal if and only if their variants are, so one comparison settles a variant. Made when
    the load first meets the key; what others seal after that is left to the recheck.
    """

    def __init__(self, sealed: Iterable[Blob]) -> None:
        self.numbers: set[int] = set()
        self._sealed: dict[int, list[Blob]] = {}
        self._in_use: dict[int, Blob] = {}
        """By variant, a sealed blob that the load uses, and which so stays: a face where no other is left."""
        self._twins: dict[int, DuplicateBlobs] = {}
        self._own: list[Blob] = []
        self.placed = False
        """Whether the load has placed bytes under the key."""
        for blob in sealed:
            self.numbers.add(blob.number)
            self._sealed.setdefault(blob.variant, []).append(blob)

    def faces(self) -> Iterator[Blob]:
        """One resident blob for each run of bytes that is known under the key."""
        for variant, blobs in self._sealed.items():
            while blobs and not blobs[-1].sealed:
                blobs.pop()  # evicted since
            face = blobs[-1] if blobs else self._in_use.get(variant)
            if face is not None:
                yield face
        yield from self._own

    def spare(self, variant: int, used: set[int]) -> Blob | None:
        """A sealed blob of that variant which the load does not use yet."""
        blobs = self._sealed.get(variant, [])
        while blobs:
            blob = blobs[-1]
            if blob.sealed and blob.number not in used:
                return blob
            if blob.sealed:
                self._in_use[variant] = blob
            blobs.pop()
        return None

    def twins(self, variant: int) -> DuplicateBlobs:
        """The placed blobs that equal the sealed ones of a variant."""
        return self._twins.setdefault(variant, DuplicateBlobs(set(self.numbers)))

    def add(self, blob: Blob) -> None:
        """The load has placed bytes that equal nothing known."""
        self._own.append(blob)
