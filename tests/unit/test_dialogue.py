"""A load on the daemon's side, whose loader is played by the test: what it does while others load, too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from support.prompt_memory import PromptMemory
from weightd.types import FileIdentity, SourceFile
from weightd_daemon.core.checkpoint import Content
from weightd_daemon.core.lease import LeaseTable
from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.core.manifest import ContentFile, ContentTensor
from weightd_daemon.core.store import ContentStore
from weightd_daemon.loader._proto import loader_pb2 as wire
from weightd_daemon.loads.dialogue import LoadDialogue

PAGE = 4096
LENGTH = 1 << 16
SOURCE = SourceFile("", "f", FileIdentity(1, 2, 3, 4, 5))


class Desk:
    """A store in which loads place tensors of LENGTH bytes, whose digests are numbers."""

    def __init__(self) -> None:
        self.store = ContentStore(leases=LeaseTable(lambda _: False), on_event=lambda _: None)
        self.segments = 0
        self.memory = self.store.memories["host"] = PromptMemory(
            budget=1 << 30, page=PAGE, sparse=True, pool_limit=0, create=self.create
        )
        self.drafts: list[Draft] = []
        self.prepared: Callable[[], None] = lambda: None

    def create(self, _: int) -> int:
        self.segments += 1
        return self.segments

    def place(self, load: StoreTransaction, *numbers: int) -> Content:
        blobs = []
        for number in numbers:
            extent = load.grant(LENGTH, LENGTH)
            assert extent is not None
            placed, blob = load.settle(digest(number), LENGTH, extent.segment, extent.offset)
            assert placed
            blobs.append(blob)
        entries = tuple(ContentTensor("", f"t{number}", "U8", (LENGTH,), 0, LENGTH) for number in numbers)
        return Content(f"{numbers}", (ContentFile("", "f", None),), entries, tuple(blobs))

    def open(self) -> StoreTransaction:
        return StoreTransaction(self.store, "host", "all", 1000)

    async def prepare(self, content: Content, _: str) -> Draft:
        await asyncio.sleep(0)
        self.drafts.append(Draft())
        self.prepared()
        return self.drafts[-1]

    def dialogue(self, load: StoreTransaction) -> LoadDialogue:
        device: Any = SimpleNamespace(uuid="host", sparse=True, writable=lambda segment: segment)
        unused = cast("Any", None)
        return LoadDialogue(
            store=self.store, device=device, reclaimer=unused, index=unused, prepare=self.prepare, loading=load,
            sources=(SOURCE,), verify=False, now=lambda: 1.0, on_files=lambda: None, admit=lambda *_: None,
            on_progress=lambda _: None, on_sealed=lambda _: None, make_room=unused,
        )  # fmt: skip


class Draft:
    size = 100
    discarded = 0

    def discard(self) -> None:
        self.discarded += 1


class Loader:
    """Says what the test says, and keeps the answers."""

    def __init__(self) -> None:
        self.answers: list[wire.ToLoader] = []

    async def send(self, answer: wire.ToLoader, _: object) -> None:
        assert not answer.HasField("failed"), answer
        self.answers.append(answer)


def digest(number: int) -> bytes:
    return number.to_bytes(16, "little")


async def tell(dialogue: LoadDialogue, loader: Loader, **body: Any) -> None:
    await dialogue._serve(cast("Any", loader), wire.ToDaemon(**body))


async def bring(desk: Desk, load: StoreTransaction, *numbers: int) -> tuple[LoadDialogue, Loader]:
    """Play a load up to its end, with one file of these tensors."""
    dialogue, loader, count = desk.dialogue(load), Loader(), len(numbers)
    device, inode, size, mtime, ctime = SOURCE.identity
    await tell(dialogue, loader, file=wire.File(device=device, inode=inode, size=size, mtime_ns=mtime, ctime_ns=ctime))
    tensors = wire.Tensors(
        file=0, names=[f"t{number}" for number in numbers], dtypes=["U8"] * count, ranks=[1] * count,
        dimensions=[LENGTH] * count, offsets=[LENGTH * at for at in range(count)], lengths=[LENGTH] * count,
    )  # fmt: skip
    await tell(dialogue, loader, tensors=tensors)
    extents = [load.grant(LENGTH, LENGTH) for _ in numbers]
    settle = wire.Settle(
        tensors=range(count), digests=b"".join(map(digest, numbers)), segments=[e.segment for e in extents if e],
        offsets=[e.offset for e in extents if e], differences=[0] * count,
    )  # fmt: skip
    await tell(dialogue, loader, settle=settle)
    return dialogue, loader


def test_what_others_seal_does_not_make_a_load_begin_its_end_again() -> None:
    """Else a large load, whose description takes long, starves while small ones are sealed all the time."""

    async def run() -> None:
        desk = Desk()
        mine, alike = desk.open(), desk.open()
        desk.place(alike, 1)
        dialogue, loader = await bring(desk, mine, 1, 2)

        def seal_another() -> None:
            assert len(desk.drafts) < 10, "it starves"
            other = desk.open()
            other.seal(desk.place(other, 100 + len(desk.drafts)), 1.0)
            other.end()

        desk.prepared = seal_another
        await tell(dialogue, loader, finish=wire.Finish(read=7))
        assert dialogue.checkpoint is not None
        assert [draft.discarded for draft in desk.drafts] == [1]

    asyncio.run(run())


def test_what_another_seals_of_the_same_keys_is_compared_before_the_seal() -> None:
    async def run() -> None:
        desk = Desk()
        mine, alike = desk.open(), desk.open()
        content = desk.place(alike, 1, 3)
        dialogue, loader = await bring(desk, mine, 1, 2)

        def seal_alike() -> None:
            if len(desk.drafts) == 1:
                alike.seal(content, 1.0)

        desk.prepared = seal_alike
        await tell(dialogue, loader, finish=wire.Finish(read=7))
        assert dialogue.checkpoint is None
        pairs = loader.answers[-1].finish
        sealed = content.blobs[0]
        assert sealed is not None
        assert list(pairs.sealed) == [sealed.number]
        finish = wire.Finish(read=7, placed=pairs.placed, sealed=pairs.sealed, equal=[True])
        await tell(dialogue, loader, finish=finish)
        assert dialogue.checkpoint is not None
        assert sealed.number in dialogue.checkpoint.unique, "it gave way"
        assert [draft.discarded for draft in desk.drafts] == [1, 1]

    asyncio.run(run())


def test_files_that_are_not_trusted_are_not_looked_up() -> None:
    """The folder of the digest index may hang, and then only loads that it is of use to wait for it."""

    async def run() -> None:
        desk = Desk()
        dialogue, loader = await bring(desk, desk.open(), 1)
        assert dialogue._index is None, "whatever it is asked fails"
        await tell(dialogue, loader, laid_out=wire.LaidOut(lanes=1))
        assert list(loader.answers[-1].laid_out.known) == []

    asyncio.run(run())


def test_a_message_that_no_load_answers_is_an_answer_of_its_own() -> None:
    refused: list[str] = []

    async def send(answer: wire.ToLoader, _: object) -> None:
        refused.append(answer.failed.message)

    async def run() -> None:
        desk = Desk()
        dialogue, loader = desk.dialogue(desk.open()), cast("Any", SimpleNamespace(send=send))
        for message in (wire.ToDaemon(verified=wire.Verified()), wire.ToDaemon()):
            await dialogue._serve(loader, message)

    asyncio.run(run())
    assert refused == [f"the loader sent {body}, which no load answers" for body in ("verified", None)]
