"""How an agent reads, receives and stages blobs: what was cut off, has other bytes or does not end is never a blob."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pytest

pytest.importorskip("blake3")

from weightd.errors import DaemonBusyError, DigestMismatchError, FormatError, NotFoundError, ResourceLimitError
from weightd_fleet.agent import sources
from weightd_fleet.agent.addresses import AgentAddress
from weightd_fleet.agent.blobs import copy_checked, file_pieces
from weightd_fleet.agent.local_blobs import BlobReaders
from weightd_fleet.agent.sources import FetchSources
from weightd_fleet.agent.staging import StagingFolder, disk_errors, staging
from weightd_fleet.core.digests import blob_digest

BLOB = b"0123456789"
DIGEST = blob_digest(BLOB)
PEER = AgentAddress("node", 7411)


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    """A file of the ten bytes."""
    (tmp_path / "file").write_bytes(BLOB)
    opened = os.open(tmp_path / "file", os.O_RDONLY)
    yield opened
    os.close(opened)


def test_a_file_is_read_from_its_offset_on(descriptor: int) -> None:
    assert b"".join(map(bytes, file_pieces(descriptor, 4, 5, "the file"))) == b"45678"
    assert list(file_pieces(descriptor, 4, 0, "the file")) == []


def test_a_file_that_was_cut_off_is_told_where(descriptor: int) -> None:
    pieces = file_pieces(descriptor, 4, 20, "the file")
    assert bytes(next(pieces)) == b"456789"
    with pytest.raises(FormatError, match="the file: has no byte at 10; it was cut off"):
        next(pieces)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(FormatError, match="the file: cannot be read at byte 4"):
            next(file_pieces(folder, 4, 20, "the file"))
    finally:
        os.close(folder)


@pytest.mark.parametrize(
    "pieces", [[b"01234", b"56789", b"more"], [b"01234567890"], [b"01234"], [], [b"01234", b"56788"]]
)
def test_bytes_that_are_not_the_blob_are_refused_and_no_more_than_it_are_written(pieces: list[bytes]) -> None:
    written = bytearray()
    with pytest.raises(DigestMismatchError, match=DIGEST.hex()[:16]):
        copy_checked(map(memoryview, pieces), DIGEST, len(BLOB), written.extend)
    assert len(written) <= len(BLOB)


def test_the_blob_is_copied() -> None:
    written = bytearray()
    copy_checked(map(memoryview, [BLOB[:3], BLOB[3:]]), DIGEST, len(BLOB), written.extend)
    assert written == BLOB


def test_a_row_that_does_not_end_is_refused_and_not_kept(tmp_path: Path) -> None:
    staged = StagingFolder(tmp_path / "rows")
    with staged.receive(DIGEST, len(BLOB)) as row:
        row.write(BLOB[:9])
        with pytest.raises(FormatError, match="more bytes than the manifest says"):
            row.write(b"98")
    assert DIGEST not in staged
    assert list(staged.folder.iterdir()) == []


def test_one_fetch_of_a_checkpoint_at_a_time(tmp_path: Path) -> None:
    with (
        staging(tmp_path, "ab", 0),
        pytest.raises(DaemonBusyError, match="b3:ab: another fetch"),
        staging(tmp_path, "ab", 0),
    ):
        pass
    with staging(tmp_path, "ab", 0):
        pass


def test_an_error_that_names_its_cause_is_not_taken_for_the_disks(tmp_path: Path) -> None:
    with pytest.raises(ResourceLimitError, match="no descriptors"), disk_errors(tmp_path):
        raise ResourceLimitError("no descriptors")


def test_the_first_reader_that_has_a_blob_is_read(tmp_path: Path) -> None:
    staged = StagingFolder(tmp_path / "rows")
    with staged.receive(DIGEST, len(BLOB)) as row:
        row.write(BLOB)
        staged.enter(row)
    readers = BlobReaders([StagingFolder(tmp_path / "none"), staged])
    assert b"".join(map(bytes, readers.pieces(DIGEST))) == BLOB
    with pytest.raises(NotFoundError, match=r"0000000000000000: is not on this node"):
        readers.pieces(bytes(32))


class RowsPeer:
    """A peer that has every row; `calls` are the rows of each call. As a context, it is itself."""

    def __init__(self, content: dict[bytes, bytes]) -> None:
        self.calls: list[int] = []
        self._content = content

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def rows(self, name: str, wanted: Sequence[tuple[bytes, int]], serves_at: str) -> Iterator[tuple[int, bytes]]:
        self.calls.append(len(wanted))
        yield from ((number, self._content[digest]) for number, (digest, _) in enumerate(wanted))


@pytest.mark.parametrize(
    ("most_rows", "most_bytes", "calls"), [(2, 100, [2, 2, 1]), (10, 100, [5]), (10, 20, [2, 2, 1]), (10, 5, [1] * 5)]
)
def test_a_call_asks_for_so_much_and_the_next_for_the_rest(
    most_rows: int, most_bytes: int, calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each call another reader has its turn; a row that is longer than a call may be comes alone."""
    monkeypatch.setattr(sources, "_CALL_ROWS", most_rows)
    monkeypatch.setattr(sources, "_CALL_BYTES", most_bytes)
    content = {blob_digest(blob): blob for blob in (BLOB[:9] + bytes([number]) for number in range(5))}
    peer: Any = RowsPeer(content)
    notes: list[str] = []
    advanced: list[int] = []
    staged = StagingFolder(tmp_path / "rows")
    fetching = FetchSources([PEER], lambda _: peer, notes.append)
    assert fetching.receive("b3:0", dict.fromkeys(content, 10), staged, advanced.append) == 50
    assert peer.calls == calls
    assert advanced == [10] * 5
    assert not notes
    assert {digest: b"".join(map(bytes, staged.pieces(digest))) for digest in content} == content
