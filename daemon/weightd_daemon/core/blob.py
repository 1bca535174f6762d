"""Blobs and their states. A blob is a run of bytes in a segment, identified by its content."""

from __future__ import annotations

import enum
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from .arena import Extent, slot_bytes
from .digest import BlobIdentity

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

OWN_COPY_BELOW = 64 << 10
"""Equal tensors of one checkpoint below this size are stored once each; larger ones are mapped twice by the client."""


class BlobState(enum.Enum):
    """RESERVED while its load runs, SEALED once a checkpoint refers to it, then EVICTED; ABORTED if its load fails."""

    RESERVED = "reserved"
    SEALED = "sealed"
    EVICTED = "evicted"
    ABORTED = "aborted"


_MOVES: dict[BlobState, frozenset[BlobState]] = {
    BlobState.RESERVED: frozenset({BlobState.SEALED, BlobState.ABORTED}),
    BlobState.SEALED: frozenset({BlobState.EVICTED}),
    BlobState.EVICTED: frozenset(),
    BlobState.ABORTED: frozenset(),
}


class BlobKey(NamedTuple):
    """Key by which equal blobs are looked up: device, sharing domain, digest and length."""

    device: str
    domain: str
    digest: bytes
    length: int


class Blob:
    """One resident run of bytes, held once however many checkpoints refer to it.

    `number` is never used twice: it names this very instance, not just its content. `references` counts checkpoints,
    `holds` counts loads that rely on the bytes staying. `users` belongs to sharing.py, which imports this module.
    """

    __slots__ = ("holds", "key", "load", "number", "offset", "references", "segment", "state", "users", "variant")

    def __init__(self, number: int, key: BlobKey, variant: int, segment: int, offset: int, load: int) -> None:
        self.number = number
        self.key = key
        self.variant = variant
        self.segment = segment
        self.offset = offset
        self.load = load
        self.state = BlobState.RESERVED
        self.references = 0
        self.holds = 0
        self.users: Any = None

    def __repr__(self) -> str:
        return f"Blob({self.number}, {self.key.digest.hex()[:8]}/{self.length}/{self.variant}, {self.state.value})"

    @property
    def length(self) -> int:
        return self.key.length

    @property
    def sealed(self) -> bool:
        return self.state is BlobState.SEALED

    @property
    def identity(self) -> BlobIdentity:
        """Digest, length and variant."""
        return BlobIdentity(self.key.digest, self.key.length, self.variant)

    @property
    def slot(self) -> Extent:
        """The bytes it takes in its segment, up to where the next blob may begin."""
        return Extent(self.segment, self.offset, slot_bytes(self.length))

    def move(self, state: BlobState) -> None:
        """Change state (law 5); a move that the table does not allow is a bug."""
        if state not in _MOVES[self.state]:
            raise RuntimeError(f"{self!r} cannot become {state.value}")
        self.state = state


class BlobTable:
    """Index of all blobs, by number and by key."""

    def __init__(self) -> None:
        self._by_number: dict[int, Blob] = {}
        self._by_key: dict[BlobKey, dict[int, Blob]] = {}
        self._sealed_bytes: dict[str, int] = {}
        self._lengths: dict[tuple[str, str], Counter[int]] = {}
        self._sealed_lengths: dict[tuple[str, str], Counter[int]] = {}
        """How many blobs of each length a device has in a sharing domain: every load asks which lengths there are."""
        self.sealed = 0
        """How many are sealed."""
        self.contested: dict[int, dict[BlobKey, None]] = {}
        """By open load, the keys under which it has placed bytes while another load had some that may be equal."""
        self.unchecked: dict[int, dict[BlobKey, None]] = {}
        """By open load, those of them under which another load's bytes have been sealed since it last looked."""
        self._last = 0

    def __iter__(self) -> Iterator[Blob]:
        return iter(list(self._by_number.values()))

    def get(self, number: int) -> Blob | None:
        """The blob of that number, if it is there."""
        return self._by_number.get(number)

    def of(self, key: BlobKey) -> Collection[Blob]:
        """The blobs of a key, oldest first."""
        return self._by_key.get(key, {}).values()

    def lengths(self, device: str, domain: str, *, sealed: bool = False) -> set[int]:
        """Lengths of the blobs on a device in a sharing domain, all or the sealed ones."""
        return {*(self._sealed_lengths if sealed else self._lengths).get((device, domain), ())}

    def place(self, key: BlobKey, variant: int, segment: int, offset: int, load: int) -> Blob:
        """Enter a new blob, RESERVED by a load."""
        self._last += 1
        blob = Blob(self._last, key, variant, segment, offset, load)
        self._by_number[blob.number] = blob
        self._by_key.setdefault(key, {})[blob.number] = blob
        self._lengths.setdefault(key[:2], Counter())[key.length] += 1
        return blob

    def sealed_bytes(self, device: str) -> int:
        """Bytes of the sealed blobs on a device: kept as a sum, for it is asked often and there are many blobs."""
        return self._sealed_bytes.get(device, 0)

    def seal(self, blobs: Collection[Blob], lengths: Counter[int] | None = None) -> None:
        """A checkpoint refers to these blobs, all of one device, domain and load. `lengths` are theirs, if counted.

        Cheap: a seal is one step, however many.
        """
        if not blobs:
            return
        reserved, sealed = BlobState.RESERVED, BlobState.SEALED
        for blob in blobs:
            if blob.state is not reserved:
                blob.move(sealed)  # which refuses
            blob.state = sealed
        device, domain = next(iter(blobs)).key[:2]
        lengths = Counter([blob.key.length for blob in blobs]) if lengths is None else lengths
        self._sealed_lengths.setdefault((device, domain), Counter()).update(lengths)
        self._sealed_bytes[device] = self.sealed_bytes(device) + sum(n * count for n, count in lengths.items())
        self.sealed += len(blobs)
        load = next(iter(blobs)).load
        mine = self.contested.get(load, {})
        for other, contested in self.contested.items():
            if other != load and contested and mine:
                self.unchecked[other].update(dict.fromkeys(filter(contested.__contains__, mine)))

    def drop(self, blob: Blob, state: BlobState) -> None:
        """Strike a blob out; `state` says how it ended."""
        if blob.sealed:
            self._sealed_bytes[blob.key.device] -= blob.length
            _strike(self._sealed_lengths, blob.key)
            self.sealed -= 1
        blob.move(state)
        _strike(self._lengths, blob.key)
        del self._by_number[blob.number]
        others = self._by_key[blob.key]
        del others[blob.number]
        if not others:
            del self._by_key[blob.key]


def _strike(lengths: dict[tuple[str, str], Counter[int]], key: BlobKey) -> None:
    """Count one blob less of a key's length."""
    counted = lengths[key[:2]]
    counted[key.length] -= 1
    if not counted[key.length]:
        del counted[key.length]
    if not counted:
        del lengths[key[:2]]
