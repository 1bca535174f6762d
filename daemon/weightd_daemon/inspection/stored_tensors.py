"""ListTensors: the tensors of a checkpoint in the order of its manifest, and who uses their bytes."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from weightd._proto.v1 import inspection_pb2
from weightd.errors import NotFoundError
from weightd_daemon.core.checkpoint import CheckpointKey
from weightd_daemon.handles.manifest_parts import ManifestParts
from weightd_daemon.turns import LoopTurn

from .page_users import PageUsers
from .pages import position_of, rows_of, token_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightd.types import TensorInfo
    from weightd_daemon.core.blob import Blob
    from weightd_daemon.core.catalog import Catalog
    from weightd_daemon.core.checkpoint import Checkpoint
    from weightd_daemon.core.principal import Principal
    from weightd_daemon.core.store import ContentStore
    from weightd_daemon.handles.manifests import ManifestHandles

    from .sharing_upkeep import SharingUpkeep

_CALL = "ListTensors"
_MOST_NAMED = 50_000
"""Users that the sets of a page name together."""
_KNOWN = 16
"""Manifests whose parts are known: those asked for last."""

_Row = tuple["TensorInfo", str, "Blob | None"]
"""A tensor as the manifest says, the name of its file, and its blob, if it has bytes."""


class StoredTensors:
    """Answers ListTensors."""

    def __init__(
        self, store: ContentStore, catalog: Catalog, manifests: ManifestHandles, upkeep: SharingUpkeep
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._manifests = manifests
        self._upkeep = upkeep
        self._parts: dict[tuple[CheckpointKey, int], ManifestParts] = {}
        """By checkpoint and inode of its manifest, which is another one when it is loaded again."""

    async def page(
        self, who: Principal, request: inspection_pb2.ListTensorsRequest, device: str
    ) -> inspection_pb2.ListTensorsResponse:
        """A page of a checkpoint that `who` may see, on a device given by its UUID or wherever it is.

        Errors: NotFoundError, InvalidReferenceError, DeviceError (it was lost).
        """
        most = rows_of(request.page_size)
        *place, start = position_of(request.page_token, _CALL, ("", "", "", 0))
        key, start = CheckpointKey(*map(str, place)), int(start)
        if not request.page_token:
            key = self._catalog.find(who, request.reference, device).key
        checkpoint = self._resident(who, key)
        rows, count = await self._rows(checkpoint, start, most)
        async with self._upkeep.still() as index:  # a set of users changes with what comes and goes
            self._resident(who, key, checkpoint)
            response = inspection_pb2.ListTensorsResponse(revision=self._store.revision.number)
            users, turn = PageUsers(self._catalog, response), LoopTurn()
            for tensor, file, blob in rows:
                used = index.of(blob) if blob is not None else None
                response.tensors.add(
                    component=tensor.component, name=tensor.name, dtype=tensor.dtype, shape=tensor.shape,
                    length=tensor.length, digest=tensor.digest, variant=tensor.variant, file=file,
                    users=users.index(used), segment=blob.segment if blob is not None else 0, offset=tensor.offset,
                )  # fmt: skip
                if users.named >= _MOST_NAMED:
                    break
                if turn.is_over:
                    await turn.next()
        end = start + len(response.tensors)
        if end < count:
            response.next_page_token = token_of(_CALL, (*key, end))
        return response

    def _resident(self, who: Principal, key: CheckpointKey, known: Checkpoint | None = None) -> Checkpoint:
        """The checkpoint of a key, if it is (still) there and `who` may see it. Errors: NotFoundError."""
        checkpoint = self._store.checkpoints.get(key)
        visible = checkpoint is not None and (who.admin or key.domain == who.domain)
        if checkpoint is None or not visible or known not in (None, checkpoint):
            raise NotFoundError(f"checkpoint {key.content_digest[:19]} is not resident any more; list it again")
        return checkpoint

    async def _rows(self, checkpoint: Checkpoint, start: int, most: int) -> tuple[list[_Row], int]:
        """At most so many rows from `start` on, and how many there are: read on a thread."""
        descriptor = self._manifests.open(checkpoint.key)
        try:
            file = checkpoint.key, os.fstat(descriptor).st_ino
            parts = self._parts.pop(file, None)
            if parts is None:
                parts = await asyncio.to_thread(ManifestParts, descriptor)
            self._parts[file] = parts
            for oldest in [*self._parts][:-_KNOWN]:
                del self._parts[oldest]
            return await asyncio.to_thread(_read, parts, descriptor, checkpoint, start, most), len(parts)
        finally:
            os.close(descriptor)


def _read(parts: ManifestParts, descriptor: int, checkpoint: Checkpoint, start: int, most: int) -> list[_Row]:
    stop = min(start + most, len(parts))
    if start >= stop:
        return []
    manifest, rows = parts.read(descriptor, start, stop)
    tensors = manifest.rows(rows)
    blobs = _blobs(checkpoint, tensors)
    return [(one, manifest.files[one.file].file, blob) for one, blob in zip(tensors, blobs, strict=True)]


def _blobs(checkpoint: Checkpoint, tensors: Sequence[TensorInfo]) -> list[Blob | None]:
    """The blob of each tensor, None of one without bytes: those that lie where the manifest says."""
    places = [(checkpoint.segments[one.segment], one.offset) if one.length else None for one in tensors]
    wanted = set(places)
    unique = list(checkpoint.unique.values())
    found = {place: blob for blob in unique if (place := (blob.segment, blob.offset)) in wanted}
    return [None if place is None else found.get(place) for place in places]
