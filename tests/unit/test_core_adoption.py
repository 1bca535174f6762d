"""What an earlier daemon says of a checkpoint is checked before it is believed. Whole records: test_restore.py."""

from __future__ import annotations

import pytest

from weightd_daemon.core.adoption import BlobPlace, CheckpointDescription, StoreAdoption
from weightd_daemon.core.checkpoint import Checkpoint, CheckpointKey
from weightd_daemon.core.digest import EMPTY_DIGEST, BlobIdentity
from weightd_daemon.core.lease import LeaseTable
from weightd_daemon.core.manifest import ContentFile, ContentTensor, content_digest
from weightd_daemon.core.store import ContentStore

FILES = (ContentFile("", "f", None),)
SIZE = 4096
A, B, EMPTY = BlobIdentity(b"a" * 16, 300, 0), BlobIdentity(b"b" * 16, 300, 0), BlobIdentity(EMPTY_DIGEST, 0, 0)


class Desk:
    """A store without a checkpoint, which takes over segment 1."""

    def __init__(self) -> None:
        self.store = ContentStore(leases=LeaseTable(lambda _: True), on_event=lambda _: None)
        self.adoption = StoreAdoption(self.store, {1: SIZE})

    def add(self, *rows: tuple[BlobIdentity, BlobPlace | None]) -> Checkpoint:
        entries = [ContentTensor("", f"t{at}", "U8", (one.length,), 0, one.length) for at, (one, _) in enumerate(rows)]
        identities, places = [one for one, _ in rows], [place for _, place in rows]
        described = CheckpointDescription(FILES, entries, identities, places)
        key = CheckpointKey("host", "all", content_digest(entries, identities, FILES))
        return self.adoption.add(key, described, 1000, 1.0)


def test_a_tensor_without_bytes_needs_no_place_and_one_with_bytes_does() -> None:
    desk = Desk()
    checkpoint = desk.add((EMPTY, None), (A, BlobPlace(1, 0)))
    assert (checkpoint.tensor_count, checkpoint.total_bytes, len(checkpoint.unique)) == (2, 300, 1)
    with pytest.raises(ValueError, match="a tensor with bytes has no place"):
        desk.add((A, BlobPlace(1, 0)), (B, None))
    assert [*desk.store.checkpoints.values()] == [checkpoint]


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([(A, BlobPlace(1, SIZE - 256))], "beyond its segment"),
        ([(A, BlobPlace(2, 0))], "beyond its segment"),
        ([(A, BlobPlace(1, 8))], "cannot be"),
        ([(EMPTY, BlobPlace(1, 0))], "cannot be"),
        ([(A, BlobPlace(1, 0)), (B, BlobPlace(1, 0))], "lie in one place"),
        ([(A, BlobPlace(1, 256)), (B, BlobPlace(1, 512))], "lies on another"),
    ],
    ids=["past the end", "no such segment", "not aligned", "no bytes", "two in one place", "one over another"],
)
def test_a_checkpoint_whose_blobs_cannot_lie_there_leaves_nothing(
    rows: list[tuple[BlobIdentity, BlobPlace | None]], why: str
) -> None:
    desk = Desk()
    with pytest.raises(ValueError, match=why):
        desk.add(*rows)
    assert (desk.store.checkpoints, [*desk.store.blobs], desk.adoption.taken) == ({}, [], {})


def test_what_is_said_twice_is_entered_once() -> None:
    desk = Desk()
    checkpoint = desk.add((A, BlobPlace(1, 0)))
    with pytest.raises(ValueError, match="it is there twice"):
        desk.add((A, BlobPlace(1, 0)))
    (blob,) = checkpoint.unique.values()
    assert (blob.references, [*desk.adoption.taken[1]]) == (1, [(0, 512)])


def test_no_blob_lies_on_one_of_a_checkpoint_that_was_entered_before() -> None:
    desk = Desk()
    desk.add((A, BlobPlace(1, 512)))
    for place, why in ((BlobPlace(1, 512), "lies where another does"), (BlobPlace(1, 256), "lies on another")):
        with pytest.raises(ValueError, match=why):
            desk.add((B, place))
    assert len(desk.store.checkpoints) == 1
