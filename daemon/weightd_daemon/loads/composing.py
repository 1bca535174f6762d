"""A load of tensors that are resident already: it gives them a checkpoint, and no byte is read or moved.

Leases keep the checkpoints that they come from until it is sealed. Their manifests say which blob a tensor is.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from weightd import _failpoints
from weightd._manifest import Manifest
from weightd.errors import InvalidReferenceError, NotFoundError
from weightd.types import TensorKey
from weightd_daemon import heap
from weightd_daemon.core.checkpoint import MANIFEST_BYTES_OF_TENSOR, CheckpointKey, books_of
from weightd_daemon.turns import LoopTurn

from .request import LoadOutcome, LoadStatus
from .tensors import LoadTensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from weightd_daemon.core.blob import Blob
    from weightd_daemon.core.checkpoint import Checkpoint, Content
    from weightd_daemon.core.loading import StoreTransaction
    from weightd_daemon.core.store import ContentStore

    from .flight import InFlightLoad
    from .quota import LoadQuota
    from .request import ComposedTensors, LoadComposition, Prepare

T = TypeVar("T")

_AT_ONCE = 250
"""Tensors that are forgotten at once."""


class LoadFromResident:
    """Executes a load of resident tensors. From the time it is made until `release`, it leases their checkpoints."""

    def __init__(
        self,
        *,
        load: InFlightLoad,
        composition: LoadComposition,
        store: ContentStore,
        quota: LoadQuota,
        open_manifest: Callable[[CheckpointKey], int],
        prepare: Prepare,
        now: Callable[[], float],
        admit: Callable[[int, int, int, str], None],
        before_seal: Callable[[str], None],
        on_sealed: Callable[[Checkpoint], None],
    ) -> None:
        """Take the leases.

        Errors: NotFoundError, DeviceError (a source was lost), CapacityError (leases), DrainingError; then it has none.
        """
        self._load = load
        self._composition = composition
        self._store = store
        self._open_manifest = open_manifest
        self._prepare = prepare
        self._now = now
        self._admit = admit
        self._before_seal = before_seal
        self._on_sealed = on_sealed
        self._tensors = LoadTensors()
        self._books = 0
        keys = {self._find(digest).key for digest in {digest for digest, _ in composition.sources}}
        quota.check_leases(load.request.who, len(keys))
        # Of no connection, for an attach of its checkpoint, or the end of the connection, would end such a lease.
        peer = replace(load.request.peer, connection=0)
        self._leases = [store.leases.begin(key, peer, now(), waiting=True) for key in keys]

    async def run(self, loading: StoreTransaction) -> tuple[Checkpoint, LoadOutcome]:
        """Find the tensors' blobs, and seal a checkpoint of them.

        Errors: InvalidReferenceError (the request), NotFoundError (a tensor), CapacityError (books, a limit of the
        user), PermissionDeniedError (name), DeviceError.
        """
        clock = asyncio.get_running_loop().time
        began = clock()
        wanted = await _on_thread(self._read)
        count, total = len(self._tensors.entries), self._tensors.total_bytes
        loading.reserve_books(self._books, total, count)
        self._admit(total, self._books, count, "")
        self._load.report(LoadStatus(total=total))
        await self._share(loading, wanted)
        _failpoints.reach("compose.shared")
        content = await _on_thread(self._describe, loading)
        draft = await self._prepare(content, self._load.request.device)
        try:
            self._books = books_of(count, draft.size)
            self._admit(total, self._books, count, content.content_digest)
            _failpoints.reach("compose.seal")
            self._before_seal(content.content_digest)
            # One step from here: before anything is awaited, the checkpoint has its name, its lease and its record.
            checkpoint = loading.seal(content, self._now(), draft, draft.size)
            self._store.changed.add(checkpoint.key)
            self._on_sealed(checkpoint)
        finally:
            draft.discard()
        return checkpoint, LoadOutcome(checkpoint.key.content_digest, count, total, 0, 0, clock() - began)

    def release(self) -> None:
        """Let go of the sources: the checkpoint is sealed, and holds its blobs itself, or there will be none."""
        while self._leases:
            self._store.leases.end(self._leases.pop().number)

    async def let_go(self, loading: StoreTransaction) -> None:
        """No other process has memory of this load open."""

    async def forget(self) -> None:
        """Let go of the list of tensors."""
        turn = LoopTurn()
        for _ in self._tensors.forget(_AT_ONCE):
            if turn.is_over:
                await turn.next()
        heap.freed(self._books)

    def _find(self, content_digest: str) -> Checkpoint:
        request = self._load.request
        key = CheckpointKey(request.device, request.who.domain, content_digest)  # law 9
        if (lost := self._store.lost.get(key)) is not None:
            raise lost.error(content_digest)
        if (checkpoint := self._store.checkpoints.get(key)) is None:
            raise NotFoundError(f"source {content_digest[:80]} is not resident on {request.device}; load it again")
        return checkpoint

    def _read(self) -> ComposedTensors:
        """What is wanted, and what it will take of the books. Runs on a thread."""
        wanted = self._composition.read()
        self._tensors = LoadTensors.of(wanted.files, wanted.entries)
        name_bytes = sum(len(entry.name.encode()) for entry in wanted.entries)
        self._books = books_of(len(wanted.entries), name_bytes + MANIFEST_BYTES_OF_TENSOR * len(wanted.entries))
        return wanted

    async def _share(self, loading: StoreTransaction, wanted: ComposedTensors) -> None:
        """Give each tensor with bytes the blob that it has in its source."""
        rows = await _on_thread(_rows_by_source, wanted, self._composition)
        turn = LoopTurn()
        for content_digest, keys in rows.items():
            checkpoint = self._find(content_digest)  # a lease keeps it resident, but not from a loss
            found = await _on_thread(_blobs_of, self._map_manifest(checkpoint), checkpoint, keys)
            for row, key in keys.items():
                blob, entry = found[key], wanted.entries[row]
                length = blob.length if blob is not None else 0
                if blob is None or length != entry.length:
                    raise InvalidReferenceError(
                        f"tensor {entry.name[:200]!r}: its type and shape take {entry.length} bytes, and "
                        f"{key.name[:200]!r} of source {content_digest[:19]} has {length}"
                    )
                # It is there: a lease keeps its checkpoint, and after a loss the call raises.
                self._tensors.blobs[row] = loading.share_resident(blob.number)
                if turn.is_over:
                    await turn.next()

    def _map_manifest(self, checkpoint: Checkpoint) -> mmap.mmap:
        """A source's manifest, mapped: nothing is left open if the thread that is to read it never runs."""
        descriptor = self._open_manifest(checkpoint.key)
        try:
            return mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)

    def _describe(self, loading: StoreTransaction) -> Content:
        """The content, with all that its seal needs. Runs on a thread: 120,000 tensors take half a second."""
        content = self._tensors.content()
        loading.prepare(content)
        return content


async def _on_thread(work: Callable[..., T], *arguments: object) -> T:
    """Run it on a thread. Where the load is cancelled meanwhile, it has its turn until the thread ends.

    For nobody can end a thread: it goes on to take memory, and one of the few that all share.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        running.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # which nobody hears
        await asyncio.wait([running])
        raise


def _rows_by_source(wanted: ComposedTensors, composition: LoadComposition) -> Mapping[str, dict[int, TensorKey]]:
    """By content digest, the rows of tensors with bytes, and what each is called in its source."""
    found: dict[str, dict[int, TensorKey]] = {}
    for row, (entry, source, name) in enumerate(zip(wanted.entries, wanted.sources, wanted.names, strict=True)):
        if entry.length:
            content_digest, component = composition.sources[source]
            found.setdefault(content_digest, {})[row] = TensorKey(component, name)
    return found


def _blobs_of(
    manifest: mmap.mmap, checkpoint: Checkpoint, keys: Mapping[int, TensorKey]
) -> dict[TensorKey, Blob | None]:
    """The blobs of these tensors of a checkpoint; None for one without bytes. Errors: NotFoundError."""
    tensors = Manifest(manifest[:])
    blobs = {(blob.segment, blob.offset): blob for blob in list(checkpoint.unique.values())}
    try:
        chosen = tensors.rows(tensors.select((), {*keys.values()}))
    except NotFoundError as error:
        raise NotFoundError(f"source {tensors.content_digest[:19]}: {error.message}") from None
    segments = checkpoint.segments
    return {
        TensorKey(one.component, one.name): blobs.get((segments[one.segment], one.offset)) if one.length else None
        for one in chosen
    }
