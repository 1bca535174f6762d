"""Loads from the request to the seal, the daemon's side and the loader's in this process: which bytes end up where."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from support import checkpoints
from support.filled import WHO
from support.threaded_loads import PEER, LoadScene, WeakHasher, on_a_desk, seeded
from weightd.errors import CapacityError, FormatError, InvalidReferenceError, NotFoundError
from weightd_daemon import turns
from weightd_daemon.core.checkpoint import Checkpoint
from weightd_daemon.core.manifest import ContentFile, ContentTensor
from weightd_daemon.loader import job
from weightd_daemon.loads import loader_pool
from weightd_daemon.loads.request import ComposedTensors, LoadComposition, LoadGroups, LoadRequest

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
        path, groups = scene.write("two", alike("efagbcdf", MIB)), LoadGroups([2, 2], [1, 3, 0, 2])
        checkpoint, outcome = await scene.desk.load(path, groups=groups)
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
    load = scene.desk.start(one)
    first, _ = await load.done
    await scene.desk.over(load)
    assert scene.desk.loads.find_resident(load.request) is first
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


@on_a_desk(budget=6 * MIB)
async def test_a_small_tensor_that_comes_again_has_a_copy_of_its_own_also_where_it_matches(scene: LoadScene) -> None:
    """It was not reckoned with among its neighbours, of which the others take other slots then."""
    (small, new), first, second = seeded("s", "n", size=SMALL).values(), seeded(*"abc", size=MIB), seeded("a", size=MIB)
    await scene.desk.load(scene.write("one", {"s": small, **first}))
    wanted = {"n": new, "s": small, "again": small} | {f"u{at}": content for at, content in enumerate(first.values())}
    wanted |= {"v": seeded("d", size=MIB)["t0"], "w": second["t0"]}
    checkpoint, outcome = await scene.desk.load(scene.write("two", wanted))
    assert scene.desk.bytes_of(checkpoint) == wanted
    assert outcome.unique_bytes == MIB + 2 * SMALL


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("weak", [False, True])
def test_loads_side_by_side_compare_what_the_other_has_sealed(
    weak: bool, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has placed all of its tensors before either is sealed: of one content, or of one digest."""

    @on_a_desk(threads=1)
    async def play(scene: LoadScene) -> None:
        both, own = threading.Barrier(2), threading.local()

        def hasher() -> WeakHasher:
            own.tensors = getattr(own, "tensors", 0) + 1
            if own.tensors == 3:  # the two before have their blobs
                both.wait(60)
            return WeakHasher()

        monkeypatch.setattr(turns, "TURN_SECONDS", -1.0)
        scene.threads.new_hasher = hasher
        tensors = [alike("xy"[weak and at] + "bc", size) for at in range(2)]
        paths = [scene.write(f"{at}/m", wanted) for at, wanted in enumerate(tensors)]
        loaded = await asyncio.gather(*(scene.desk.load(path) for path in paths))
        assert [scene.desk.bytes_of(checkpoint) for checkpoint, _ in loaded] == tensors
        assert sorted(outcome.unique_bytes for _, outcome in loaded) == [size * weak, 3 * size]
        assert len(scene.desk.store.checkpoints) == 1 + weak

    play(tmp_path, monkeypatch)


@on_a_desk(budget=2 * MIB)
async def test_a_load_says_what_was_evicted_for_it(scene: LoadScene) -> None:
    first, _ = await scene.desk.load(scene.write("one", seeded("a", size=MIB)))
    hung, gate = scene.hang()
    other = scene.desk.start(scene.write("small", seeded("s", size=SMALL)))
    await hung.wait()
    scene.act = lambda: None
    _, outcome = await scene.desk.load(scene.write("two", seeded("b", "c", size=MIB - 4096)))
    gate.set()
    assert outcome.evicted == (first.key.content_digest,)
    assert (await other.done)[1].evicted == ()
    await scene.desk.over(other)


@on_a_desk()
async def test_what_a_user_brings_has_a_limit_and_what_is_there_already_is_free(scene: LoadScene) -> None:
    first, again = seeded(*"ab"), scene.write("again/m", seeded(*"ab"))
    await scene.desk.load(scene.write("m", first))
    scene.desk.limits.bytes = 4 * LARGE
    await scene.desk.load(again)
    await scene.desk.load(scene.write("one more", seeded("c")))
    with pytest.raises(CapacityError, match="the limit max_user_bytes is reached: uid 1000 has"):
        await scene.desk.load(scene.write("too much", seeded("d")))


@on_a_desk()
async def test_an_idle_loader_leaves_after_a_while(scene: LoadScene) -> None:
    scene.patch.setattr(loader_pool, "IDLE_SECONDS", 0.01)
    await scene.desk.load(scene.write("m", seeded("a")))
    await asyncio.wait([loader.exited for loader in scene.desk.loads._pool._alive])
    assert scene.threads.processes[0].returncode == 0
    await scene.check_serves(2)


Row = tuple[str, int, str, int]
"""A composed tensor: its name, the number of its source, its name there, and a length."""


async def composed(scene: LoadScene, sources: Sequence[Checkpoint], *rows: Row) -> Checkpoint:
    """A checkpoint of tensors of others, as if they came in m.safetensors."""
    entries = [ContentTensor("", name, "U8", (length,), 0, length) for name, _, _, length in rows]
    files, at, names = [ContentFile("", "m.safetensors", None)], [row[1] for row in rows], [row[2] for row in rows]
    wish = LoadRequest(who=WHO, peer=PEER, sources=(), device="host", name="new")
    digests = tuple((checkpoint.key.content_digest, "") for checkpoint in sources)
    wanted = ComposedTensors(files, entries, at, names)
    load, _ = scene.desk.loads.compose(wish, LoadComposition(digests, lambda: wanted))
    try:
        return (await load.done)[0]
    finally:
        await scene.desk.over(load)


@on_a_desk()
async def test_resident_tensors_make_a_checkpoint(scene: LoadScene) -> None:
    """One without bytes needs none; others have to be there, and as long as they are said to be."""
    scene.patch.setattr(turns, "TURN_SECONDS", -1.0)
    sources = [(await scene.desk.load(scene.write(seeds, seeded(*seeds))))[0] for seeds in ("ab", "cd")]

    async def compose(*rows: Row) -> dict[str, bytes]:
        return scene.desk.bytes_of(await composed(scene, sources, *rows))

    other, _ = await scene.desk.load(scene.write("other", seeded("o")))
    for checkpoint in (*sources, other):
        scene.desk.store.leases.begin(checkpoint.key, PEER, 0.0, waiting=True)
    rows = [("x", 1, "t0", LARGE), ("none", 0, "nothing", 0), ("y", 0, "t1", LARGE)]
    assert await compose(*rows) == {"x": seeded("c")["t0"], "none": b"", "y": seeded(*"ab")["t1"]}
    waiting = {lease.checkpoint for lease in scene.desk.store.leases.waiting_of(PEER.connection)}
    assert other.key in waiting
    assert waiting.isdisjoint(checkpoint.key for checkpoint in sources), "these were loaded for it alone"
    with pytest.raises(
        InvalidReferenceError, match=r"^tensor 'x': its type and shape take 7 bytes, and 't0' of source"
    ):
        await compose(("x", 1, "t0", 7))
    with pytest.raises(NotFoundError, match=r"^source sha256:\w+: "):
        await compose(("x", 1, "t9", LARGE))


@on_a_desk()
async def test_a_copy_of_what_is_resident_as_a_whole_is_nothing_new(scene: LoadScene) -> None:
    """A composition may use a small blob twice. A file of that content copies it first, and that copy goes again."""
    small = seeded("s", size=SMALL)["t0"]
    source, _ = await scene.desk.load(scene.write("source", {"s": small}))
    there = await composed(scene, [source], ("x", 0, "s", SMALL), ("y", 0, "s", SMALL))
    checkpoint, outcome = await scene.desk.load(scene.write("m", {"x": small, "y": small}))
    assert checkpoint is there
    assert (outcome.unique_bytes, scene.desk.store.live_bytes("host")) == (0, SMALL)
