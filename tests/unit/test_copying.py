"""Copying: where the tensors of a group go once one of them turns out to be shared."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from weightd.types import TensorSpec
from weightd_daemon.core.digest import DigestHasher, new_hasher
from weightd_daemon.devices.device import DeviceSegment
from weightd_daemon.devices.host_io import HostSegmentIO
from weightd_daemon.loader import copying
from weightd_daemon.loader._proto import loader_pb2 as wire
from weightd_daemon.loader.copying import LoaderCopier
from weightd_daemon.loader.schedule import LoaderTensor, LoaderUnit, arranged, lanes, units
from weightd_daemon.loader.slots import LoaderSlot
from weightd_daemon.loader.source import LoaderSource

SIZE = 2 << 20


class Daemon:
    """The daemon's end of the channel, to which all bytes are known: blob 7 has them, in segment 9."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.most = 0
        """Of how many tensors a question was, at most."""

    def call(self, question: wire.ToDaemon) -> wire.ToLoader:
        body = question.WhichOneof("body")
        assert body is not None
        self.asked.append(body)
        match body:
            case "grant":
                return wire.ToLoader(grant=wire.Extent(segment=1, offset=0, length=question.grant.ends[-1]))
            case "candidate":
                return wire.ToLoader(candidate=wire.Candidates(found=[True], blobs=[7], segments=[9], offsets=[0]))
            case "settle":
                count = len(question.settle.tensors)
                self.most = max(self.most, count)
                columns = {"blobs": [7] * count, "segments": [9] * count, "offsets": [0] * count}
                return wire.ToLoader(settle=wire.Candidates(found=[True] * count, **columns))
            case "share":
                return wire.ToLoader(share=wire.Shared(uses=[wire.USE_BLOB] * len(question.share.tensors)))
        raise AssertionError(body)


def copier_of(count: int, group: list[int], matched: frozenset[int], monkeypatch: pytest.MonkeyPatch) -> LoaderCopier:
    """A copier of so many tensors in one lane, for which all bytes are equal."""
    specs = [TensorSpec(f"t{at}", "U8", (SIZE,), at * SIZE, SIZE) for at in range(count)]
    tensors = arranged([LoaderTensor(at, 0, spec) for at, spec in enumerate(specs)], [group])
    (lane,) = lanes(units(tensors), 1, [0])
    copier = LoaderCopier(Daemon(), None, [], None, lanes=[lane], matched=matched)  # type: ignore[arg-type]  # not needed here
    for asks_memory, answer in (("_resident", None), ("_equal", True)):
        monkeypatch.setattr(copier, asks_memory, lambda *_, answer=answer: answer)
    return copier


def reserve(copier: LoaderCopier, number: int, group: int | None) -> LoaderSlot:
    tensor = LoaderTensor(number, 0, TensorSpec(f"t{number}", "U8", (SIZE,), number * SIZE, SIZE), group)
    copier.reserve(LoaderUnit(0, (tensor,)))
    return copier._reserved[number]


def share(copier: LoaderCopier, number: int, slot: LoaderSlot) -> None:
    """The bytes in the slot turn out to be there already."""
    copier._settle([(LoaderTensor(number, 0, TensorSpec("", "U8", (SIZE,), 0, SIZE)), b"", slot)])


def test_a_group_of_which_one_is_shared_uses_its_place_again(monkeypatch: pytest.MonkeyPatch) -> None:
    copier = copier_of(4, [0, 1, 2, 3], frozenset(), monkeypatch)
    first, second = reserve(copier, 0, 0), reserve(copier, 1, 0)
    share(copier, 0, first)
    assert first.end == second[:2]
    assert reserve(copier, 2, 0) == first


@pytest.mark.parametrize("matched", [False, True])
def test_a_group_of_which_one_is_known_to_be_resident_is_placed_like_the_rest(
    matched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    copier = copier_of(5, [2, 3, 4], frozenset({4} if matched else ()), monkeypatch)
    first, second = reserve(copier, 0, None), reserve(copier, 1, None)
    share(copier, 0, first)
    assert (reserve(copier, 2, 2) == first) is matched
    assert (copier._reserved[2][:2] == second.end) is not matched


@pytest.mark.parametrize("differs_at", [None, 0, SIZE - 1])
def test_what_has_a_candidate_is_compared_in_its_file_and_not_hashed_again(
    differs_at: int | None, tmp_path: Path
) -> None:
    content = bytearray(os.urandom(SIZE))
    digest = hashed(content)
    resident = os.memfd_create("segment")
    os.pwrite(resident, content, 0)
    if differs_at is not None:
        content[differs_at] ^= 1
    path = tmp_path / "file"
    path.write_bytes(content)
    hashers: list[DigestHasher] = []

    def counted() -> DigestHasher:
        hashers.append(new_hasher())
        return hashers[-1]

    daemon = Daemon()
    with path.open("rb") as file:
        source = LoaderSource("file", file.fileno())
        io = HostSegmentIO({9: DeviceSegment(9, SIZE, resident)})
        tensor = LoaderTensor(0, 0, TensorSpec("t", "U8", (SIZE,), 0, SIZE))
        copier = LoaderCopier(daemon, io, [source], counted, digests={0: digest}, matched=frozenset({0}))  # type: ignore[arg-type]  # played
        assert copier._compare_first(tensor) is (differs_at is None)
    os.close(resident)
    assert daemon.asked == ["candidate"] + ["share"] * (differs_at is None)
    assert hashers == []


def test_a_piece_of_many_tensors_is_settled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon answers each question in one step."""
    monkeypatch.setattr(copying, "_SETTLED_TENSORS", 10)
    copier = copier_of(25, [0], frozenset(), monkeypatch)
    daemon: Daemon = copier._channel  # type: ignore[assignment]  # played
    found = [
        (LoaderTensor(at, 0, TensorSpec("", "U8", (1,), at, 1)), bytes(16), LoaderSlot(1, 256 * at, 256))
        for at in range(25)
    ]
    copier._settle_in_rows(None, found)
    assert (daemon.asked.count("settle"), daemon.most) == (3, 10)


def hashed(content: bytearray) -> bytes:
    hasher = new_hasher()
    hasher.update(memoryview(content))
    return hasher.digest()
