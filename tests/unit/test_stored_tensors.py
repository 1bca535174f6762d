"""Pages of a checkpoint's tensors, made in this process from books that are full."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from support.filled import DEVICES, WHO, Filled
from weightd._proto.v1 import inspection_pb2
from weightd.errors import InvalidReferenceError, NotFoundError
from weightd_daemon.core.checkpoint import Checkpoint, Content
from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.core.manifest import ContentFile, ContentTensor
from weightd_daemon.core.principal import Principal
from weightd_daemon.handles import manifest_file
from weightd_daemon.handles.manifest_file import encode_manifest, make_manifest
from weightd_daemon.handles.manifests import ManifestHandles
from weightd_daemon.inspection import stored_tensors as stored_tensors_module
from weightd_daemon.inspection.pages import token_of
from weightd_daemon.inspection.stored_tensors import StoredTensors
from weightd_daemon.turns import LoopTurn

DEVICE = DEVICES[0]
PAGE = 4096
TENSORS = 11
STRANGER = Principal(2000, admin=False, domain="uid:2000")


class Books(Filled):
    """Two checkpoints with manifests: "one" of eleven tensors, one without bytes, and "two" of the first three."""

    def __init__(self) -> None:
        super().__init__(0, held=False)
        self.manifests = ManifestHandles()
        self.one = self.bring("one", [PAGE if at != 4 else 0 for at in range(TENSORS)])
        self.two = self.bring("two", [PAGE] * 3)
        self.tensors = StoredTensors(self.store, self.catalog, self.manifests, self.sharing)

    def bring(self, name: str, lengths: list[int]) -> Checkpoint:
        load = StoreTransaction(self.store, DEVICE, "", 1000)
        extent = load.grant(len(lengths) * PAGE, PAGE)
        assert extent is not None
        blobs: list[Any] = []
        for at, length in enumerate(lengths):
            digest = f"{at}".encode().ljust(16)
            there = load.candidate(digest, length) if length else None
            if there is not None:
                blobs.append(load.share(there.number, None, 0))
            else:
                place = extent.segment, extent.offset + at * PAGE
                blobs.append(load.settle(digest, length, *place)[1] if length else None)
        files = (ContentFile("unet", "u", None), ContentFile("vae", "v", None))
        entries = tuple(
            ContentTensor(files[at % 2].component, f"t{at}", "U8", (length,), at % 2, length)
            for at, length in enumerate(lengths)
        )
        content = Content(f"sha256:{name.encode().hex():0>64}", files, entries, tuple(blobs))
        checkpoint = load.seal(content, 0.0)
        load.end()
        encoded = encode_manifest(content, DEVICE, "cuda", self.store.memories[DEVICE].size)
        self.manifests.add(checkpoint.key, make_manifest(encoded))
        self.catalog.set(WHO, name, content.content_digest)
        return checkpoint

    def page(
        self, reference: str = "one", size: int = 0, token: str = "", who: Principal = WHO
    ) -> inspection_pb2.ListTensorsResponse:
        request = inspection_pb2.ListTensorsRequest(reference=reference, page_size=size, page_token=token)
        return asyncio.run(self.tensors.page(who, request, ""))

    def remove(self, name: str) -> None:
        checkpoint = self.catalog.find(WHO, name)
        self.catalog.remove(WHO, name)
        self.manifests.remove(checkpoint.key)


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> Iterator[Books]:
    monkeypatch.setattr(manifest_file, "_ENCODED_AT_ONCE", 4)
    books = Books()
    yield books
    books.manifests.close()


def users(page: inspection_pb2.ListTensorsResponse) -> list[list[str]]:
    return [[page.checkpoints[at].name for at in page.users[tensor.users].checkpoints] for tensor in page.tensors]


def test_the_tensors_in_the_order_of_the_manifest(books: Books) -> None:
    page = books.page()
    assert page.revision == books.store.revision.number
    assert [tensor.name for tensor in page.tensors] == [f"t{at}" for at in range(TENSORS)]
    assert [(tensor.component, tensor.file) for tensor in page.tensors[:2]] == [("unet", "u"), ("vae", "v")]
    assert users(page) == [["one", "two"]] * 3 + [["one"]] + [[]] + [["one"]] * 6
    blobs = list(books.one.unique.values())
    there = [(tensor.segment, tensor.offset) for tensor in page.tensors if tensor.length]
    assert there == [(blob.segment, blob.offset) for blob in blobs]
    assert (page.tensors[4].segment, page.tensors[4].length) == (0, 0)
    assert [tuple(tensor.shape) for tensor in page.tensors[3:5]] == [(PAGE,), (0,)]
    assert page.next_page_token == ""


@pytest.mark.parametrize("size", [1, 3, 4, 10])
def test_pages_together_are_the_list(books: Books, size: int) -> None:
    whole, found, token = books.page(), [], ""
    while True:
        page = books.page(size=size, token=token)
        assert len(page.tensors) <= size
        found += list(zip((tensor.name for tensor in page.tensors), users(page), strict=True))
        token = page.next_page_token
        if not token:
            break
    assert found == list(zip((tensor.name for tensor in whole.tensors), users(whole), strict=True))


def test_a_page_ends_where_its_users_are_many(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_tensors_module, "_MOST_NAMED", 2)
    page = books.page()
    assert [tensor.name for tensor in page.tensors] == ["t0"]
    assert [tensor.name for tensor in books.page(token=page.next_page_token).tensors] == ["t1"]


def test_a_token_is_of_one_content(books: Books) -> None:
    token = books.page(size=2).next_page_token
    books.catalog.set(WHO, "one", books.two.key.content_digest)
    assert [tensor.name for tensor in books.page(size=2, token=token).tensors] == ["t2", "t3"]
    books.store.remove(books.one)
    with pytest.raises(NotFoundError, match="not resident any more"):
        books.page(size=2, token=token)
    assert users(books.page("two")) == [["one"]] * 3, "by the first of its names"


def test_what_goes_while_its_manifest_is_read_is_not_found(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    read = stored_tensors_module._read

    def removed(*arguments: Any) -> Any:
        books.store.remove(books.one)
        return read(*arguments)

    monkeypatch.setattr(stored_tensors_module, "_read", removed)
    with pytest.raises(NotFoundError):
        books.page()


def test_users_are_those_of_one_moment(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a page is made, a checkpoint with all of its tensors comes, and the index catches up when it may."""
    whole, changes = books.page(), [lambda: books.bring("three", [PAGE] * TENSORS)]

    async def change(_: LoopTurn) -> None:
        if changes:
            changes.pop()()
            tasks.append(asyncio.ensure_future(books.sharing.caught_up()))
        await asyncio.sleep(0)

    tasks: list[Any] = []
    monkeypatch.setattr(LoopTurn, "is_over", property(lambda _: True))
    monkeypatch.setattr(LoopTurn, "next", change)
    page = books.page()
    assert page.revision == whole.revision < books.store.revision.number
    assert users(page) == users(whole)


def test_a_stranger_finds_nothing_by_name_digest_or_token(books: Books) -> None:
    token = token_of("ListTensors", (*books.one.key, 0))
    assert len(books.page(token=token).tensors) == TENSORS
    for reference, asked in (("one", ""), (books.one.key.content_digest, ""), ("one", token)):
        with pytest.raises(NotFoundError):
            books.page(reference, token=asked, who=STRANGER)


def test_a_made_up_token_is_an_error_or_an_end(books: Books) -> None:
    assert list(books.page(token=token_of("ListTensors", (*books.one.key, 1 << 40))).tensors) == []
    for token in ("?", token_of("GetMap", (1, 2)), token_of("ListTensors", (1, 2, 3, 4))):
        with pytest.raises(InvalidReferenceError):
            books.page(token=token)


def test_to_look_changes_nothing(books: Books) -> None:
    def state() -> Any:
        store = books.store
        return [one.used for one in store.index.by_use()], len(list(store.leases)), store.revision.number, store.uses

    before = state()
    books.page()
    assert state() == before
