"""The manifest of a checkpoint: its tensors by name, and the digest that identifies its content."""

from __future__ import annotations

import hashlib
import itertools
import struct
from typing import TYPE_CHECKING, NamedTuple

from weightd.layouts import Group, adjacent, groups

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .blob import Blob
    from .digest import BlobIdentity


_SORTED_AT_ONCE = 4096


class ContentFile(NamedTuple):
    """Source file as a checkpoint's content records it, with its own metadata (None where it has none)."""

    component: str
    file: str
    metadata: dict[str, str] | None


class ContentTensor(NamedTuple):
    """Tensor as a checkpoint's content records it: `file` indexes the content's files, `length` is bytes."""

    component: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    length: int


def fused_views(entries: Sequence[ContentTensor], blobs: Sequence[Blob | None]) -> tuple[Group, ...]:
    """The groups of tensors, by their rows, whose blobs lie one behind the other, for whatever reason they do."""
    places = [(blob.segment, blob.offset, blob.length) if blob is not None else None for blob in blobs]
    return tuple(group for group in groups(entries) if adjacent(places[row] for row in group.members))


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _in_order(entries: Sequence[ContentTensor]) -> Iterator[int]:
    """The rows of tensors in the order of component and name, of which no two have the same."""
    components: dict[str, dict[str, int]] = {}
    for row, entry in enumerate(entries):
        components.setdefault(entry.component, {})[entry.name] = row
    for _, rows in sorted(components.items()):
        for name in _sorted(list(rows)):
            yield rows[name]


def _sorted(names: list[str]) -> list[str]:
    """Sort in parts, which are merged two by two.

    To sort 100,000 at once takes 50 ms, in which no other thread runs, the loop's neither. To merge takes a tenth.
    """
    parts = [sorted(names[start : start + _SORTED_AT_ONCE]) for start in range(0, len(names), _SORTED_AT_ONCE)]
    while len(parts) > 1:
        parts = [sorted(itertools.chain.from_iterable(parts[at : at + 2])) for at in range(0, len(parts), 2)]
    return parts[0]


def content_digest(
    entries: Sequence[ContentTensor], identities: Sequence[BlobIdentity], files: Iterable[ContentFile]
) -> str:
    """SHA-256 over what the checkpoint *is*: names, dtypes, shapes, blob identities and file metadata.

    Every part is length-prefixed and sorted, so the digest depends neither on placement, paths, file boundaries nor
    order. Returns "sha256:" and 64 hex digits.
    """
    digest = hashlib.sha256(b"weightd-content-v1\0")
    digest.update(struct.pack("<Q", len(entries)))
    for row in _in_order(entries):
        entry, blob = entries[row], identities[row]
        digest.update(
            b"".join(
                (
                    _text(entry.component),
                    _text(entry.name),
                    _text(entry.dtype),
                    struct.pack(f"<Q{len(entry.shape)}Q", len(entry.shape), *entry.shape),
                    blob.digest,
                    struct.pack("<QQ", blob.length, blob.variant),
                )
            )
        )
    metadata = {(file.component, tuple(sorted(file.metadata.items()))) for file in files if file.metadata is not None}
    for component, items in sorted(metadata):
        digest.update(_text(component) + struct.pack("<Q", len(items)))
        for key, value in items:
            digest.update(_text(key) + _text(value))
    return f"sha256:{digest.hexdigest()}"
