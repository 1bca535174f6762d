"""What looks at a daemon return: maps, sharing, tensors, loads under way, settings. Sizes are bytes, times UTC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from .types import LoadProgress


@dataclass(frozen=True, slots=True)
class BlobUsers:
    """Which checkpoints use a blob: digests, and how many more that this user may not see."""

    checkpoints: tuple[str, ...]
    others: int = 0


class MapSegment(NamedTuple):
    """One piece of shared memory: its number, which no other segment of this daemon ever has, and its length."""

    segment: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class MapExtent:
    """A part of a segment of which everything is of one kind and has the same users.

    `kind` is "blobs", "hole" (free, with memory behind it), "hollow" (free, without), "leaving" (its memory is being
    given back), "in_flight" (granted to the load `load`), "set_aside" (a process that nobody could end may still write
    there, or the books do not know it) or "others" (of a segment whose content this user may not see). `users` is None
    but for blobs; blobs without users, which `blobs` does not count, are of checkpoints that have gone, and are freed
    soon.
    """

    segment: int
    offset: int
    length: int
    kind: str
    blobs: int = 0
    users: BlobUsers | None = None
    load: int = 0


@dataclass(frozen=True, slots=True)
class DeviceMap:
    """What lies where on a device. Extents cover each segment without a gap, in order.

    `names` are the first names of checkpoints by digest, empty for one without. `revision` is as in Stats, of the
    moment that this is a map of; None where the daemon was too busy to be caught at one moment.
    """

    device: str
    revision: int | None
    segments: tuple[MapSegment, ...]
    extents: tuple[MapExtent, ...]
    names: Mapping[str, str]


class SharedComponents(NamedTuple):
    """Bytes that a part of one checkpoint has in common with one of another; a plain checkpoint's part is empty."""

    one: str
    other: str
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class SharedPair:
    """Two resident checkpoints, by digest and first name, on one device that have bytes in common.

    `only_bytes` of them nobody else uses: they are freed when both have gone, beside the exclusive bytes of each.
    `components` is empty where neither has parts. What a part of one has in common with two of the other is in both.
    """

    device: str
    one: str
    other: str
    one_name: str
    other_name: str
    shared_bytes: int
    only_bytes: int
    components: tuple[SharedComponents, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a resident checkpoint: where it lies on its device, and which checkpoints use its bytes."""

    component: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    length: int
    digest: bytes
    variant: int
    segment: int
    offset: int
    file: str
    users: BlobUsers


@dataclass(frozen=True, slots=True)
class LoadInfo:
    """A load under way. Loads of one content by several clients are one.

    `progress` is None while it waits for its turn. `bytes_per_second` is 0 and `remaining_seconds`, of the phase at
    hand, None where they are not known. `pid` and `uid` are those of who asked first, as in LeaseInfo. `waiters` wait
    for its end; without any it is detached.
    """

    load: int
    names: tuple[str, ...]
    reference: str
    device: str
    progress: LoadProgress | None
    bytes_per_second: float
    remaining_seconds: float | None
    begun_at: datetime
    pid: int | None
    uid: int | None
    user: str
    command: str
    waiters: int


class BooksFigure(NamedTuple):
    """A figure of the daemon's books, bytes or a count, and what `source` found; None where that cannot tell.

    `device` is empty for the daemon as a whole. `what` and `source` are for people.
    """

    device: str
    what: str
    books: int
    found: int | None
    source: str
    agrees: bool
    in_bytes: bool


class SettingInfo(NamedTuple):
    """One setting in force: its value as TOML, and where it comes from, for people."""

    key: str
    value: str
    origin: str
