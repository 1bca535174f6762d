"""Builds messages to a loader from the daemon's state (protos/weightd/internal/loader.proto)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightd_daemon.loader._proto import loader_pb2 as wire

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightd_daemon.core.blob import Blob
    from weightd_daemon.devices.device import Device

    from .request import LoadRequest

BlobRow = tuple[int, int, int, int, bytes]
"""Number, segment, offset, length and digest of a blob."""


def load_job(request: LoadRequest, device: Device, threads: int) -> wire.ToLoader:
    """Return the job of a request on a device, which so many threads read."""
    return wire.ToLoader(
        load=wire.Load(
            kind=device.kind,
            device=device.uuid,
            threads=threads,
            # Writes to one memfd take turns, so there each thread gets segments of its own (loader/schedule.py).
            lanes=threads if device.kind == "host" else 1,
            sources=[wire.Source(component=s.component, file=s.file, is_index=s.is_index) for s in request.sources],
            group_sizes=request.groups.sizes,
            group_tensors=request.groups.tensors,
        )
    )


def verify_job(rows: Sequence[BlobRow], device: Device) -> wire.ToLoader:
    """Return the job of hashing these blobs of a device again."""
    return wire.ToLoader(
        verify=wire.Verify(
            kind=device.kind,
            device=device.uuid,
            blobs=[row[0] for row in rows],
            segments=[row[1] for row in rows],
            offsets=[row[2] for row in rows],
            lengths=[row[3] for row in rows],
            digests=b"".join(row[4] for row in rows),
        )
    )


def candidates(blobs: Sequence[Blob | None]) -> wire.Candidates:
    """Return blobs to compare with, None for a tensor that has none."""
    return wire.Candidates(
        found=[blob is not None for blob in blobs],
        blobs=[blob.number if blob else 0 for blob in blobs],
        segments=[blob.segment if blob else 0 for blob in blobs],
        offsets=[blob.offset if blob else 0 for blob in blobs],
    )


def pairs_of(pairs: Sequence[tuple[Blob, Blob]]) -> wire.Pairs:
    """Return pairs of a placed and a sealed blob that are to be compared."""
    return wire.Pairs(
        placed=[placed.number for placed, _ in pairs],
        placed_segments=[placed.segment for placed, _ in pairs],
        placed_offsets=[placed.offset for placed, _ in pairs],
        sealed=[sealed.number for _, sealed in pairs],
        sealed_segments=[sealed.segment for _, sealed in pairs],
        sealed_offsets=[sealed.offset for _, sealed in pairs],
        lengths=[placed.length for placed, _ in pairs],
    )


def places_of(share: wire.Share) -> Sequence[tuple[int | None, int]]:
    """Return segment and offset of each tensor's slot; no segment where they lie in none."""
    if not share.segments:
        return [(None, 0)] * len(share.tensors)
    return list(zip(share.segments, share.offsets, strict=True))
