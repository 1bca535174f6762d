"""What lies sealed in a store."""

from __future__ import annotations

from weightd_daemon.core.blob import Blob
from weightd_daemon.core.store import ContentStore


def sealed_blobs(store: ContentStore) -> list[Blob]:
    """Every sealed blob of a store."""
    return [blob for blob in store.blobs if blob.sealed]
