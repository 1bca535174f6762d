"""Blobs: which changes of state there are, and what they take."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given

from support.counting import operations
from weightd_daemon.core.arena import Extent
from weightd_daemon.core.blob import Blob, BlobKey, BlobState, BlobTable
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


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 3), st.integers(0, 2)), max_size=30))
def test_what_is_counted_is_what_is_there(steps: list[tuple[str, int, int]]) -> None:
    blobs = BlobTable()
    for domain, length, then in steps:
        blob = blobs.place(BlobKey("host", domain, b"d" * 16, length), 0, 1, 0, load=1)
        if then:
            blobs.seal([blob])
        if then == 2:
            there = [one for one in blobs if one.sealed]
            blobs.drop(there[len(there) // 2], EVICTED)
        elif not then and length == 1:
            blobs.drop(blob, ABORTED)
        sealed = [one for one in blobs if one.sealed]
        assert blobs.sealed == len(sealed)
        for where in "ab":
            assert blobs.lengths("host", where) == {one.length for one in blobs if one.key.domain == where}
            found = {one.length for one in sealed if one.key.domain == where}
            assert blobs.lengths("host", where, sealed=True) == found


def test_which_lengths_there_are_costs_the_same_however_many_blobs_there_are() -> None:
    blobs, costs = BlobTable(), []
    for _ in range(2):
        for number in range(1000):
            blobs.seal([blobs.place(BlobKey("host", "a", number.to_bytes(16, "little"), 8), 0, 1, 0, load=1)])
        costs.append(operations(lambda: blobs.lengths("host", "a", sealed=True)))
    assert costs[0] == costs[1]


def test_a_blob_is_sealed_once() -> None:
    blobs = BlobTable()
    blob = blobs.place(BlobKey("host", "a", b"d" * 16, 300), 0, 1, 0, load=1)
    blobs.seal([blob])
    with pytest.raises(RuntimeError, match="cannot become sealed"):
        blobs.seal([blob])
    assert (blobs.sealed, blobs.sealed_bytes("host")) == (1, 300)
