"""What the client returns, as JSON for the page: maps in columns, everything else by the names of its fields."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from weightd.inspection import BlobUsers, DeviceMap, SharedPair, StoredTensor


def encoded(value: Any) -> bytes:
    """Return JSON: datetimes as ISO 8601 in UTC, bytes in hex."""
    return json.dumps(value, default=_encode, separators=(",", ":")).encode()


def map_columns(found: DeviceMap) -> dict[str, Any]:
    """Return a map whose extents are lists: segment's index, offset, length, kind, blobs, index into `users`, load.

    `users` are pairs of indices into `checkpoints` and a number of others; the index is None but for blobs.
    """
    segments = {segment.segment: at for at, segment in enumerate(found.segments)}
    checkpoints = {digest: at for at, digest in enumerate(found.names)}
    users: dict[BlobUsers, int] = {}
    extents = [
        [
            segments[extent.segment],
            extent.offset,
            extent.length,
            extent.kind,
            extent.blobs,
            None if extent.users is None else users.setdefault(extent.users, len(users)),
            extent.load,
        ]
        for extent in found.extents
    ]
    return {
        "device": found.device,
        "segments": [[segment.segment, segment.size_bytes] for segment in found.segments],
        "extents": extents,
        "users": [[[checkpoints[digest] for digest in one.checkpoints], one.others] for one in users],
        "checkpoints": list(found.names),
        "names": dict(found.names),
    }


def pair_rows(pairs: Iterable[SharedPair]) -> list[dict[str, Any]]:
    """Return pairs with their components as lists of two parts and bytes."""
    return [asdict(pair) | {"components": [list(part) for part in pair.components]} for pair in pairs]


def tensor_rows(tensors: Iterable[StoredTensor]) -> list[list[Any]]:
    """Return of each tensor component, name, dtype, shape, length, segment, offset, and how many checkpoints use it."""
    return [
        [
            tensor.component,
            tensor.name,
            tensor.dtype,
            tensor.shape,
            tensor.length,
            tensor.segment,
            tensor.offset,
            len(tensor.users.checkpoints) + tensor.users.others,
        ]
        for tensor in tensors
    ]


def _encode(value: object) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
