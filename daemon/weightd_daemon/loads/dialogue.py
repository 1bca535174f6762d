"""One load, on the daemon's side: answers the loader's questions from the store, and seals the loaded content."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from weightd import _failpoints
from weightd._limits import DAEMON, limit_error
from weightd.errors import InvalidReferenceError, ServerError, WeightdError
from weightd.types import FileIdentity, SourceFile
from weightd_daemon.core.checkpoint import MANIFEST_BYTES_OF_TENSOR, Checkpoint, CheckpointKey, Content, books_of
from weightd_daemon.core.digest import BlobIdentity
from weightd_daemon.core.manifest import ContentFile
from weightd_daemon.devices.device import DeviceSegment
from weightd_daemon.loader._proto import loader_pb2 as wire
from weightd_daemon.loader.channel import error_of, failure_of, split_digests
from weightd_daemon.loader.indexed import called
from weightd_daemon.turns import LoopTurn

from .instances import LoadedInstance, LoadedInstanceIndex
from .messages import candidates, pairs_of, places_of
from .request import LoadManifestDraft, LoadOutcome, LoadStatus, Prepare
from .tensors import LoadTensors

if TYPE_CHECKING:
    from weightd_daemon.core.blob import Blob
    from weightd_daemon.core.loading import StoreTransaction
    from weightd_daemon.core.store import ContentStore
    from weightd_daemon.devices.device import Device
    from weightd_daemon.devices.reclaimer import DeviceReclaimer

    from .loader_process import LoadProcess

_Answer = tuple[wire.ToLoader, list[DeviceSegment]]
_Pairs = list[tuple["Blob", "Blob"]]

_AT_ONCE = 250
"""Tensors that the core is given at once; after that others may have their turn on the loop."""


class LoadDialogue:
    """The daemon's side of one load: serves a loader's job up to the seal. `serve` raises the job's errors."""

    def __init__(
        self,
        *,
        store: ContentStore,
        device: Device,
        reclaimer: DeviceReclaimer,
        index: LoadedInstanceIndex,
        prepare: Prepare,
        loading: StoreTransaction,
        sources: tuple[SourceFile, ...],
        verify: bool,
        now: Callable[[], float],
        on_files: Callable[[], None],
        admit: Callable[[int, int, int, str], None],
        on_progress: Callable[[LoadStatus], None],
        on_sealed: Callable[[Checkpoint], None],
        make_room: Callable[[str], Awaitable[None]],
    ) -> None:
        self._store = store
        self._device = device
        self._reclaimer = reclaimer
        self._index = index
        self._prepare = prepare
        self._loading = loading
        self._sources = sources
        self._verify = verify
        self._now = now
        self._on_files = on_files
        self._admit = admit
        self._on_progress = on_progress
        self._on_sealed = on_sealed
        self._make_room = make_room
        self._trusted: list[bool] = []
        self._tensors = LoadTensors()
        self._blobs = self._tensors.blobs
        self.books = 0
        """What the checkpoint will take of the daemon's books, or about that."""
        self._read = 0
        self._unique = 0
        self._failure: WeightdError | None = None
        self._groups: tuple[int, tuple[str, ...]] = 0, ()
        self.checkpoint: Checkpoint | None = None

    @property
    def trusted(self) -> bool:
        """Whether the files' identities stand for their content from now on."""
        return all(self._trusted)

    async def serve(self, loader: LoadProcess) -> LoadOutcome:
        """Answer until the checkpoint is sealed. Errors: those of the file, CapacityError, LoadProcessDiedError."""
        started = asyncio.get_running_loop().time()
        try:
            while self.checkpoint is None:
                await self._serve(loader, await loader.receive())
        finally:
            self._failure = None  # whose traceback has frames of ours: it would keep the list of tensors
        return self._outcome(started)

    async def _serve(self, loader: LoadProcess, message: wire.ToDaemon) -> None:
        """Take one message of the loader, and answer it if it is a question."""
        if message.HasField("failed"):
            raise self._failure or error_of(message.failed)
        if (hear := _TOLD.get(message.WhichOneof("body") or "")) is not None:
            if self._failure is None:
                try:
                    hear(self, message)
                except WeightdError as error:
                    self._failure = error  # told at the loader's next call: a message without an answer cannot fail
            await asyncio.sleep(0)  # the next may be here already, and others are to have their turn on the loop
            return
        try:
            if self._failure is not None:
                raise self._failure
            answer, segments = await self._answer(message)
        except WeightdError as error:
            answer, segments = wire.ToLoader(failed=failure_of(error)), []
        except OSError as error:
            if (limit := limit_error(error, "loading", DAEMON)) is None:
                raise
            answer, segments = wire.ToLoader(failed=failure_of(limit)), []
        await loader.send(answer, segments)

    # -- the loader's messages -------------------------------------------------------------------------------------

    async def _answer(self, message: wire.ToDaemon) -> _Answer:
        match message.WhichOneof("body"):
            case "counted":
                return wire.ToLoader(counted=self._counted(message.counted)), []
            case "laid_out":
                return wire.ToLoader(laid_out=await self._laid_out(message.laid_out)), []
            case "sampled":
                return wire.ToLoader(sampled=self._sampled(message.sampled)), []
            case "hashed":
                return wire.ToLoader(hashed=await self._hashed(message.hashed)), []
            case "grant":
                return await self._grant(message.grant)
            case "candidate":
                return self._candidate(message.candidate)
            case "settle":
                return await self._settle(message.settle)
            case "share":
                return wire.ToLoader(share=await self._share(message.share)), []
            case "finish":
                return await self._finish(message.finish)
            case "full":
                await self._make_room(message.full.call)
                return wire.ToLoader(full=wire.Freed()), []
            case body:
                raise ServerError(f"the loader sent {body}, which no load answers")

    def _file(self, file: wire.File) -> None:
        source = self._sources[len(self._trusted)]
        identity = FileIdentity(file.device, file.inode, file.size, file.mtime_ns, file.ctime_ns)
        if identity != source.identity:
            name = called(source.component, source.file)
            raise InvalidReferenceError(f"{name}: is not the file that was announced; open it and load it again")
        if not source.is_index:  # indexes come last, so that a tensor's file has one number here and in the manifest
            metadata = dict(file.metadata) if file.has_metadata else None
            self._tensors.files.append(ContentFile(source.component, source.file, metadata))
        self._trusted.append(file.trusted)

    def _counted(self, count: wire.Counted) -> wire.Admitted:
        """The tensors are about to be listed; a list that there is no room for, or no right to, does not come."""
        self.books = books_of(count.tensors, count.name_bytes + MANIFEST_BYTES_OF_TENSOR * count.tensors)
        self._loading.reserve_books(self.books, count.total_bytes, count.tensors)
        self._admit(count.total_bytes, self.books, count.tensors, "")
        return wire.Admitted()

    async def _laid_out(self, laid_out: wire.LaidOut) -> wire.Known:
        self._groups = laid_out.groups, tuple(laid_out.ignored_groups)
        known = [] if self._verify else await self._share_known()
        one_pass = self._loading.admit(await asyncio.to_thread(self._tensors.missing), laid_out.lanes)
        chosen: list[int] = []
        if one_pass and not self._device.sparse:
            chosen = await asyncio.to_thread(self._tensors.sample, self._loading.resident_lengths())
        return wire.Known(known=known, hash_first=not one_pass, sample=chosen)

    async def _share_known(self) -> list[int]:
        """Tensors of files that are known not to have changed, whose very blobs are resident: nothing to read."""
        known: list[int] = []
        turn = LoopTurn()
        instances: dict[tuple[int, int, int], LoadedInstance] = {}
        if not (trusted := self._trusted_files()):
            return known  # without the index, whose folder may hang
        remembered = await self._index.get(trusted.values())
        for file, identity in trusted.items():
            for found in remembered.get(identity, ()):
                instances[file, found.offset, found.length] = found
                if turn.is_over:
                    await turn.next()
        if not instances:
            return known
        for index, entry in enumerate(self._tensors.entries):
            if turn.is_over:
                await turn.next()
            instance = instances.get((entry.file, self._tensors.offsets[index], entry.length))
            if instance is not None:
                blob = BlobIdentity(instance.digest, instance.length, instance.variant)
                self._blobs[index] = self._loading.share_known(instance.blob, blob)
                if self._blobs[index] is not None:
                    known.append(index)
        return known

    def _sampled(self, asked: wire.Digests) -> wire.Verdict:
        """Whether everything is to be hashed first, because some of the sample is resident."""
        found = (
            self._loading.candidate(digest, self._tensors.entries[index].length)
            for index, digest in zip(asked.tensors, split_digests(asked.digests), strict=True)
        )
        return wire.Verdict(hash_first=any(blob is not None for blob in found))

    async def _hashed(self, asked: wire.Hashed) -> wire.Matched:
        contents, counted = await asyncio.to_thread(self._tensors.contents, asked.digests)
        matched: set[tuple[bytes, int]] = set()
        turn = LoopTurn()
        for start in range(0, len(counted), _AT_ONCE):
            matched |= self._loading.match(counted[start : start + _AT_ONCE])
            if turn.is_over:
                await turn.next()
        while not self._loading.make_room(asked.lanes):
            await self._reclaimer.wait()

        def answer() -> wire.Matched:
            numbers = zip(asked.digests.tensors, contents, strict=True)
            return wire.Matched(matched=[number for number, content in numbers if content in matched])

        return await asyncio.to_thread(answer)

    async def _grant(self, asked: wire.Grant) -> _Answer:
        ends = list(asked.ends)
        while (extent := self._loading.grant(ends[-1], asked.need, ends)) is None:
            await self._reclaimer.wait()
        _failpoints.reach("load.grant")
        return wire.ToLoader(grant=wire.Extent(**extent._asdict())), [self._segment(extent.segment)]

    def _candidate(self, asked: wire.Candidate) -> _Answer:
        blob = self._loading.candidate(asked.digest, self._tensors.entries[asked.tensor].length)
        return wire.ToLoader(candidate=candidates([blob])), [self._segment(blob.segment)] if blob else []

    async def _settle(self, asked: wire.Settle) -> _Answer:
        found: list[Blob | None] = []
        turn = LoopTurn()
        differing = iter(asked.differing)
        for index, digest, segment, offset, differences in zip(
            asked.tensors, split_digests(asked.digests), asked.segments, asked.offsets, asked.differences, strict=True
        ):
            length = self._tensors.entries[index].length
            differs = frozenset(itertools.islice(differing, differences))
            placed, blob = self._loading.settle(digest, length, segment, offset, differs)
            if placed:
                self._blobs[index] = blob
            found.append(None if placed else blob)
            if turn.is_over:
                await turn.next()
        _failpoints.reach("load.settle")
        segments = [self._segment(number) for number in {blob.segment for blob in found if blob is not None}]
        return wire.ToLoader(settle=candidates(found)), segments

    async def _share(self, asked: wire.Share) -> wire.Shared:
        uses = []
        turn = LoopTurn()
        for index, number, (segment, offset) in zip(asked.tensors, asked.blobs, places_of(asked), strict=True):
            blob = self._loading.share(number, segment, offset)
            self._blobs[index] = blob
            if blob is None:
                uses.append(wire.USE_COPY)
            else:
                uses.append(wire.USE_SLOT if (blob.segment, blob.offset) == (segment, offset) else wire.USE_BLOB)
            if turn.is_over:
                await turn.next()
        return wire.Shared(uses=uses)

    async def _finish(self, done: wire.Finish) -> _Answer:
        self._read = done.read
        await self._merge(list(zip(done.placed, done.sealed, done.equal, strict=True)))
        if pairs := await self._to_compare():
            return self._compare(pairs)
        content = await asyncio.to_thread(self._describe)
        draft = await self._prepare(content, self._device.uuid)
        try:
            # Another load may have sealed the same bytes meanwhile; only then the content may be another by now.
            if pairs := await self._to_compare():
                return self._compare(pairs)
            self.books = books_of(len(self._tensors.entries), draft.size)
            self._admit(self._tensors.total_bytes, self.books, len(self._tensors.entries), content.content_digest)
            _failpoints.reach("seal.books")
            self._seal(content, draft)
            _failpoints.reach("seal.sealed")
        finally:
            draft.discard()
        await self._remember()
        return wire.ToLoader(finish=wire.Pairs()), []

    async def _to_compare(self) -> _Pairs:
        """Pairs that the loader has to compare. If there are none, the load can be sealed in this very step."""
        while not self._loading.rechecked:
            if pairs := self._loading.rechecks():
                return pairs
            await asyncio.sleep(0)
        return []

    def _compare(self, pairs: _Pairs) -> _Answer:
        segments = {blob.segment for pair in pairs for blob in pair}
        return wire.ToLoader(finish=pairs_of(pairs)), [self._segment(segment) for segment in segments]

    def _seal(self, content: Content, draft: LoadManifestDraft) -> None:
        """One step: before anything is awaited after it, the checkpoint must be leased, and be in the root record."""
        if CheckpointKey(*self._loading.place, content.content_digest) in self._store.checkpoints:
            self._unique = 0  # what it has placed, such as copies of small tensors, goes with it
        self.checkpoint = self._loading.seal(content, self._now(), draft, draft.size)
        self.checkpoint.origin = self.checkpoint.origin or tuple(s for s in self._sources if not s.is_index)
        if self.trusted:
            self._store.changed.update(self._store.index.claim(self.checkpoint, self._sources))
        self._store.changed.add(self.checkpoint.key)
        self._on_sealed(self.checkpoint)

    async def _merge(self, outcomes: list[tuple[int, int, bool]]) -> None:
        """Enter what the loader's comparisons brought."""
        replaced: dict[int, Blob] = {}
        turn = LoopTurn()
        for number, other, equal in outcomes:
            replaced |= self._loading.recheck(number, other, equal=equal)
            if turn.is_over:
                await turn.next()
        if replaced:
            await asyncio.to_thread(self._tensors.replace, replaced)

    def _describe(self) -> Content:
        """The content, with all that its seal needs. Runs on a thread: 120,000 tensors take half a second."""
        content = self._tensors.content()
        self._loading.prepare(content)
        own = (blob for blob in content.tally.unique.values() if blob.load == self._loading.number)
        self._unique = sum(blob.length for blob in own)
        return content

    async def forget(self) -> None:
        """Let go of what the job was about, little by little: to free the list of many tensors takes long."""
        turn = LoopTurn()
        for _ in self._tensors.forget(_AT_ONCE):
            if turn.is_over:
                await turn.next()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _segment(self, segment: int) -> DeviceSegment:
        size = self._store.memories[self._device.uuid].size(segment)
        return DeviceSegment(segment, size, self._device.writable(segment))

    async def _remember(self) -> None:
        if trusted := self._trusted_files():
            instances = await asyncio.to_thread(self._tensors.instances)
            await self._index.put({identity: instances[file] for file, identity in trusted.items()})

    def _trusted_files(self) -> dict[int, FileIdentity]:
        """The identities of the files of tensors that stand for their content, by number."""
        files = enumerate(self._trusted[: len(self._tensors.files)])
        return {file: self._sources[file].identity for file, trusted in files if trusted}

    def _outcome(self, started: float) -> LoadOutcome:
        assert self.checkpoint is not None  # the caller has just seen it
        checkpoint = self.checkpoint
        return LoadOutcome(
            checkpoint.key.content_digest,
            checkpoint.tensor_count,
            checkpoint.total_bytes,
            self._unique,
            self._read,
            asyncio.get_running_loop().time() - started,
            *self._groups,
        )


_TOLD: dict[str, Callable[[LoadDialogue, wire.ToDaemon], None]] = {
    "received": lambda dialogue, _: dialogue._on_files(),
    "file": lambda dialogue, message: dialogue._file(message.file),
    "tensors": lambda dialogue, message: dialogue._tensors.add(message.tensors),
    "progress": lambda dialogue, message: dialogue._on_progress(
        LoadStatus(message.progress.phase, message.progress.done, message.progress.total)
    ),
}
"""Messages that have no answer, of those that belong to a load, and how a dialogue takes them."""
