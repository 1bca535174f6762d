"""Blobs: which changes of state there are, and what they take."""

from __future__ import annotations

import itertools

import pytest

from weightd_daemon.core.arena import Extent
from weightd_daemon.core.blob import Blob, BlobKey, BlobState
from weightd_daemon.core.digest import DIGEST_BYTES, BlobIdentity, new_hasher

RESERVED, SEALED, EVICTED, ABORTED = BlobState
ALLOWED = {(RESERVED, SEALED), (RESERVED, ABORTED), (SEALED, EVICTED)}
PATHS = {RESERVED: (), SEALED: (SEALED,), EVICTED: (SEALED, EVICTED), ABORTED: (ABORTED,)}


def make(length: int = 300) -> Blob:
    return Blob(5, BlobKey("host", "all", b"d" * 16, length), 2, 7, 1024, load=1)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(BlobState, repeat=2)))
def test_only_the_moves_of_the_table_are_made(before: BlobState, after: BlobState) -> None:
    blob = make()
    for state in PATHS[before]:
        blob.move(state)
    if (before, after) in ALLOWED:
        blob.move(after)
        assert blob.state is after
    else:
        with pytest.raises(RuntimeError, match=f"cannot become {after.value}"):
            blob.move(after)
        assert blob.state is before


def test_it_takes_up_to_where_the_next_may_begin() -> None:
    assert make(300).slot == Extent(7, 1024, 512)
    assert make(256).slot == Extent(7, 1024, 256)


def test_its_identity_says_nothing_of_its_place() -> None:
    assert make().identity == BlobIdentity(b"d" * 16, 300, 2)


def test_the_real_digest_has_the_length_that_is_written_down() -> None:
    hasher = new_hasher()
    hasher.update(memoryview(b"weights"))
    assert len(hasher.digest()) == DIGEST_BYTES
