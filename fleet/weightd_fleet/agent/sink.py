"""Where a fetch puts a checkpoint: what every sink can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .blobs import BlobReader


class Sink(Protocol):
    """Takes a checkpoint batch by batch, so that only one batch is staged at a time."""

    @property
    def wanted(self) -> dict[bytes, int]:
        """Digest and length of every tensor that has bytes and must come to this node."""

    def batches(self) -> Iterator[dict[bytes, int]]:
        """Digests and lengths of the tensors that the sink takes next. The caller calls `take` before it goes on."""

    def take(self, batch: dict[bytes, int], blobs: BlobReader) -> None:
        """Take a batch, all of which can be read now. Errors: DigestMismatchError, CapacityError, and others."""

    def finish(self, blobs: BlobReader) -> None:
        """Make the checkpoint available. `blobs` has its frames and small files."""

    def sources(self) -> list[dict[str, Any]]:
        """Where the tensors lie in files now, as the state folder lists it."""
