"""Loads from the request to the seal, the daemon's side and the loader's in this process: which bytes end up where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import checkpoints
from support.threaded_loads import LoadScene, WeakHasher, on_a_desk, seeded
from weightd.errors import FormatError
from weightd_daemon import turns
from weightd_daemon.loader import job
from weightd_daemon.loads.request import LoadGroups

MIB = 1 << 20
LARGE = 100_000
"""Bytes of a tensor that is stored once, however often a checkpoint has it."""
SMALL = 5000


def alike(seeds: str, size: int) -> dict[str, bytes]:
    """Tensors that all have one weak digest."""
    return {name: b"xx" + content for name, content in seeded(*seeds, size=size - 2).items()}


def trust_files(scene: LoadScene) -> None:
    """Have the identity of each file stand for its content."""
    scene.patch.setattr("weightd_daemon.loader.source.rested", lambda *_: True)
    scene.patch.setattr("weightd_daemon.loader.source.filesystem_type", lambda _: 0x01021994)  # tmpfs


@on_a_desk()
async def test_a_checkpoint_has_the_bytes_of_its_files(scene: LoadScene) -> None:
    """Large tensors and small neighbours, one without bytes, one that comes again, in two files."""
    large, small = seeded("a", "b", size=3 * MIB), seeded(*range(300), size=SMALL)
    first = {f"l{name}": content for name, content in large.items()} | {"none": b""} | small
    second = {"again": large["t0"], "twice": small["t0"]}
    checkpoint, outcome = await scene.desk.load(scene.write("one", first), scene.write("two", second))
    assert scene.desk.bytes_of(checkpoint) == first | second
    assert (outcome.tensors, outcome.total_bytes - outcome.unique_bytes) == (len(first) + len(second), 3 * MIB)


@on_a_desk()
async def test_what_is_resident_is_shared_whichever_file_it_is_in(scene: LoadScene) -> None:
    await scene.desk.load(scene.write("one", seeded(*"abc")))
    checkpoint, outcome = await scene.desk.load(scene.write("two", seeded(*"cda")))
    assert scene.desk.bytes_of(checkpoint) == seeded(*"cda")
    assert outcome.unique_bytes == LARGE


@on_a_desk(sparse=False)
async def test_a_sample_says_whether_all_is_hashed_first_where_holes_are_not_returned(scene: LoadScene) -> None:
    """As on a GPU: what was granted for a copy that is shared in the end stays in its segment."""
    hashed: list[object] = []
    hash_first = job._LoadJob._hash_first

    def noted(self: Any, work: Any) -> Any:
        hashed.append(work)
        return hash_first(self, work)

    scene.patch.setattr(job._LoadJob, "_hash_first", noted)
    outcomes = []
    for seeds in ("abc", "xyz", "bcad"):
        path = scene.write(seeds, seeded(*seeds, size=2 * MIB))
        checkpoint, outcome = await scene.desk.load(path)
        assert scene.desk.bytes_of(checkpoint) == seeded(*seeds, size=2 * MIB)
        outcomes.append((outcome.unique_bytes, len(hashed)))
    assert outcomes == [(6 * MIB, 0), (6 * MIB, 0), (2 * MIB, 1)]


@pytest.mark.parametrize("weak", [False, True])
def test_what_matches_takes_no_memory_where_everything_is_hashed_first(
    weak: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does what comes again, unless the bytes differ after all. For the whole there would be no room."""

    @on_a_desk(budget=12 * MIB)
    async def play(scene: LoadScene) -> None:
        if weak:
            scene.threads.new_hasher = WeakHasher
        await scene.desk.load(scene.write("one", alike("abcde", MIB)))
        checkpoint, outcome = await scene.desk.load(scene.write("two", alike("efagbcdf", MIB)))
        assert scene.desk.bytes_of(checkpoint) == alike("efagbcdf", MIB)
        assert (outcome.unique_bytes, bool(scene.desk.store.collisions)) == (2 * MIB, weak)

    play(tmp_path, monkeypatch)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_contents_of_one_digest_stay_apart(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @on_a_desk()
    async def play(scene: LoadScene) -> None:
        scene.threads.new_hasher = WeakHasher
        for seeds in ("abcab", "cdbec", "abcabx"):
            checkpoint, _ = await scene.desk.load(scene.write(seeds, alike(seeds, size)))
            assert scene.desk.bytes_of(checkpoint) == alike(seeds, size)
        assert scene.desk.store.collisions > 0

    play(tmp_path, monkeypatch)


@on_a_desk()
async def test_a_file_that_is_known_is_not_read_while_its_very_blobs_are_resident(scene: LoadScene) -> None:
    trust_files(scene)
    one, two = scene.write("one", seeded(*"ab")), scene.write("two", {"u": b"u" * LARGE})
    first, _ = await scene.desk.load(one)
    checkpoint, outcome = await scene.desk.load(one, two)
    assert scene.desk.bytes_of(checkpoint) == seeded(*"ab") | {"u": b"u" * LARGE}
    assert (outcome.read_bytes, outcome.unique_bytes) == (LARGE, LARGE)
    scene.desk.store.remove(first)
    for known in scene.desk.index.known.values():
        known[0] = known[0]._replace(blob=9999)
    _, outcome = await scene.desk.load(one)
    assert (outcome.read_bytes, outcome.unique_bytes) == (LARGE, 0), "another blob is not the one that was known"


@on_a_desk(threads=3)
async def test_groups_lie_in_a_row(scene: LoadScene) -> None:
    tensors = seeded(*"abcdef", size=102_400)
    path = scene.write("one", tensors)
    checkpoint, outcome = await scene.desk.load(path, groups=LoadGroups([3, 2, 1], [4, 1, 3, 0, 5, 2]))
    assert scene.desk.bytes_of(checkpoint) == tensors
    assert (outcome.groups, len(outcome.ignored_groups)) == (2, 1)
    blobs = scene.desk.contents[checkpoint.key.content_digest].blobs
    for group in ((4, 1, 3), (0, 5)):
        row = [blob for blob in (blobs[at] for at in group) if blob is not None]
        ends = [(blob.segment, blob.offset + blob.length) for blob in row]
        assert [(blob.segment, blob.offset) for blob in row[1:]] == ends[:-1]


@on_a_desk()
async def test_an_index_says_whose_a_tensor_is(scene: LoadScene) -> None:
    one, two = scene.write("one", seeded(*"ab")), scene.write("two", seeded("c"))
    owners = {"t0": "two.safetensors", "t1": "one.safetensors"}
    checkpoint, _ = await scene.desk.load(one, two, checkpoints.index(scene.folder, owners))
    assert scene.desk.bytes_of(checkpoint) == {"t1": seeded(*"ab")["t1"], "t0": seeded("c")["t0"]}
    with pytest.raises(FormatError, match=r"^two\.safetensors: tensor 't0' is in another file too"):
        await scene.desk.load(one, two)


@on_a_desk(budget=2 * MIB)
async def test_others_have_their_turn_however_many_tensors_there_are(scene: LoadScene) -> None:
    """Here after each tensor: what is loaded, known, shared, merged and verified is the same."""
    scene.patch.setattr(turns, "TURN_SECONDS", -1.0)
    trust_files(scene)
    first = scene.write("one", seeded(*"abc"))
    await scene.desk.load(first)
    checkpoint, _ = await scene.desk.load(first, scene.write("two", {"u": b"u" * LARGE}))
    assert scene.desk.bytes_of(checkpoint) == seeded(*"abc") | {"u": b"u" * LARGE}
    many = seeded(*(at % 10 for at in range(24)))
    checkpoint, _ = await scene.desk.load(scene.write("three", many))
    assert scene.desk.bytes_of(checkpoint) == many
    assert await scene.desk.verify(checkpoint).done == []
