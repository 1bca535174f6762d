"""Groups that travel with a load: where its tensors lie, and what that must not change."""

from __future__ import annotations

import ctypes
import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.backends import HOST
from support.daemon import Daemon, eventually
from support.gated import gated_argv
from support.shared import SharedDaemons
from weightd import _groups
from weightd._proto.v1 import checkpoint_pb2
from weightd._transport.convert import source_to
from weightd.attachment import Attachment
from weightd.layouts import adjacent
from weightd.resolve import open_sources, resolve
from weightd.types import TensorKey

StartDaemon = Callable[..., Daemon]
KIB, MIB, PAGE = 1 << 10, 1 << 20, 4096


@pytest.fixture
def here(shared_daemons: SharedDaemons) -> Iterator[Daemon]:
    with shared_daemons.on(HOST) as daemon:
        yield daemon


def parts(count: int, size: int = 4 * KIB, seed: object = "p") -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {f"t{at}": ("U8", (size,), checkpoints.random_bytes((seed, at), size)) for at in range(count)}


def row(attachment: Attachment, names: Sequence[str], component: str = "") -> bytes | None:
    """The bytes of these tensors as those of one, where they lie in a row."""
    there = [attachment.tensors[component, name] for name in names]
    if not adjacent((one.segment, one.offset, one.length) for one in there):
        return None
    start = ctypes.addressof(ctypes.c_char.from_buffer(attachment.buffer(names[0], component)))
    found = attachment.span(start, sum(one.length for one in there))
    return None if found is None else bytes(found)


# -- where tensors lie -------------------------------------------------------------------------------------------------


def test_tensors_lie_as_the_load_asks(here: Daemon, tmp_path: Path) -> None:
    every = parts(9)
    for number in range(3):
        checkpoints.write(
            tmp_path / f"model-{number + 1}-of-3.safetensors", {name: every[name] for name in list(every)[number::3]}
        )
    order = ["t7", "t1", ("", "t5"), TensorKey("", "t3")]
    with weightd.connect(here.socket) as client, client.attach(tmp_path, groups=[order, ["t8", "t0"]]) as attachment:
        assert attachment.loaded is not None
        assert (attachment.loaded.order, attachment.loaded.groups, attachment.loaded.ignored_groups) == (
            "requested",
            2,
            (),
        )
        for names in (["t7", "t1", "t5", "t3"], ["t8", "t0"]):
            assert row(attachment, names) == b"".join(every[name][2] for name in names)
        assert attachment.span(1, 8) is None
        first = attachment.tensors["", "t7"]
        assert row(attachment, ["t3", "t7"]) is None, "they do not lie so"
        assert first.offset % 256 == 0


def test_an_index_says_which_of_two_tensors_is_meant(here: Daemon, tmp_path: Path) -> None:
    """Of those that two files have, one is in the checkpoint; those behind keep the numbers that the headers give."""
    every, stale = parts(6), parts(3, size=8 * KIB, seed="stale")
    checkpoints.write(tmp_path / "model-1.safetensors", stale | {"t3": every["t3"]})
    checkpoints.write(tmp_path / "model-2.safetensors", {name: every[name] for name in every if name != "t3"})
    owners = {name: f"model-{1 if name == 't3' else 2}.safetensors" for name in every}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owners}))
    order = ["t5", "t0", "t3", "t2"]
    with (
        weightd.connect(here.socket) as client,
        client.attach(tmp_path, groups=lambda stored: [order] if {t.length for t in stored} == {4 * KIB} else []) as it,
    ):
        assert it.loaded is not None
        assert (it.loaded.groups, it.loaded.ignored_groups) == (1, ())
        assert row(it, order) == b"".join(every[name][2] for name in order)


def test_groups_may_be_made_of_what_the_files_have(here: Daemon, tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "one" / "model.safetensors", parts(3, seed="one"))
    checkpoints.write(tmp_path / "two" / "model.safetensors", parts(3, seed="two") | {"empty": ("U8", (0,), b"")})
    checkpoints.describe_pipeline(tmp_path)
    checkpoints.rest(*tmp_path.rglob("*.safetensors"))
    seen: list[_groups.StoredTensor] = []

    def groups(stored: Sequence[_groups.StoredTensor]) -> list[list[tuple[str, str]]]:
        seen.extend(stored)
        return [[("two", "t2"), ("two", "t0")]]

    with weightd.connect(here.socket) as client:
        with client.attach(tmp_path, groups=groups) as attachment:
            assert row(attachment, ["t2", "t0"], "two") is not None
        assert _groups.StoredTensor("two", "t1", "U8", (4 * KIB,), 4 * KIB) in seen
        assert [(one.component, one.name) for one in seen] == list(attachment.tensors), "counted as the daemon does"
        with client.attach(tmp_path, groups=lambda _: pytest.fail("nothing has to be loaded")) as attachment:
            assert attachment.loaded is None


@pytest.mark.parametrize("groups", [[["t0", "nothing"]], [[("other", "t0"), "t1"]]])
def test_a_tensor_that_is_not_there_is_an_error(here: Daemon, groups: list[list[str]], tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path / "m.safetensors", parts(2))
    with (
        weightd.connect(here.socket) as client,
        pytest.raises(weightd.InvalidReferenceError, match=r"tensor '(nothing|t0)'"),
    ):
        client.load(path, groups=groups)


def test_a_file_without_a_header_is_the_daemons_to_refuse(here: Daemon, tmp_path: Path) -> None:
    for number, data in enumerate((b"", b"short", b"\xff" * 64, (8).to_bytes(8, "little") + b"[1, 2 ]x")):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(data)
        with weightd.connect(here.socket) as client, pytest.raises(weightd.FormatError, match=f"{number}.safetensors"):
            client.load(path, groups=[["a", "b"]])


def test_what_is_no_group_is_ignored_and_said(here: Daemon, tmp_path: Path) -> None:
    tensors = parts(4) | {"odd": ("U8", (7,), b"1234567"), "other": ("I8", (4 * KIB,), bytes(4 * KIB))}
    path = checkpoints.write(tmp_path / "m.safetensors", tensors)
    asked = [["t0", "t2"], ["t2", "t1"], ["t1", "other"], ["odd", "t1"], ["t3"]]
    with weightd.connect(here.socket) as client:
        result = client.load_report(path, groups=asked)
        assert result is not None
        assert (result.order, result.groups) == ("requested", 1)
        assert [why.partition(": ")[0] for why in result.ignored_groups] == [f"group {at}" for at in (1, 2, 3, 4)]
        with client.attach(path) as attachment:
            assert row(attachment, ["t0", "t2"]) is not None


# -- resident, or under way --------------------------------------------------------------------------------------------


def test_what_is_resident_stays_where_it_is(here: Daemon, tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path / "m.safetensors", parts(3))
    with weightd.connect(here.socket) as client:
        client.load(path, name="m")
        result = client.load_report(path, groups=[["t2", "t0"]])
        assert result is not None
        assert (result.order, result.groups) == ("resident", 0)
        copy = checkpoints.write(tmp_path / "copy.safetensors", parts(3))
        result = client.load_report(copy, groups=[["t2", "t0"]])
        assert result is not None
        assert result.order == "resident", "another file with the same tensors"
        with client.attach("m") as attachment:
            assert row(attachment, ["t2", "t0"]) is None
        for checkpoint in client.checkpoints():
            client.remove(checkpoint.content_digest)
        with client.attach(path, groups=[["t2", "t0"]]) as attachment:
            assert row(attachment, ["t2", "t0"]) is not None


def test_a_load_that_joins_another_takes_its_order_and_says_so(start_daemon: StartDaemon, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    daemon = start_daemon(argv=gated_argv(gate))
    path = checkpoints.write(tmp_path / "m.safetensors", parts(3))
    checkpoints.rest(path)
    asked = [[["t2", "t0"]], [["t2", "t0"]], [["t1", "t0"]], ()]
    found: dict[int, weightd.LoadResult | None] = {}
    waiting: set[int] = set()

    def load(at: int) -> None:
        with weightd.connect(daemon.socket) as client:
            found[at] = client.load_report(path, groups=asked[at], on_progress=lambda _: waiting.add(at))

    threads = [threading.Thread(target=load, args=(at,), daemon=True) for at in range(len(asked))]
    with daemon.connect() as client:
        threads[0].start()
        eventually(lambda: [c for c in client.checkpoints() if c.state == "loading"], what="the first load")
        for thread in threads[1:]:
            thread.start()
        eventually(lambda: len(waiting) == len(asked), what="the others have joined")
        gate.touch()
        for thread in threads:
            thread.join(20)
        assert [found[at].order for at in range(4)] == ["requested", "requested", "joined", ""]  # type: ignore[union-attr]
        assert found[2].groups == 0  # type: ignore[union-attr]
        with client.attach(path) as attachment:
            assert row(attachment, ["t2", "t0"]) is not None


# -- what groups must not change ---------------------------------------------------------------------------------------


def hostile(count: int, seed: int) -> list[list[int]]:
    """Groups that nobody would ask for in good faith."""
    chance = random.Random(seed)
    numbers = list(range(count))
    chance.shuffle(numbers)
    kinds = [
        lambda: [numbers[at::7] for at in range(7)],
        lambda: [numbers],
        lambda: [[one, other] for one, other in zip(numbers[::2], numbers[1::2], strict=False)],
        lambda: [sorted(numbers, reverse=True)[at : at + 5] for at in range(0, count, 5)],
        lambda: [[chance.randrange(2 * count) for _ in range(chance.randrange(9))] for _ in range(50)],
        lambda: [[0, 0], [], [count, count + 1], [2**32 - 1, 0], numbers, numbers],
    ]
    return kinds[seed % len(kinds)]()


@pytest.mark.parametrize("tight", [False, True])
def test_placement_changes_neither_content_nor_memory_nor_who_is_admitted(
    start_daemon: StartDaemon, tight: bool, tmp_path: Path
) -> None:
    """With as much memory as the load takes without groups, every load with some fits, and takes as much."""
    chance = random.Random(0)
    tensors: list[dict[str, tuple[str, tuple[int, ...], bytes]]] = []
    for file in range(3):
        sizes = [chance.choice([256, 4 * KIB, 70 * KIB, 65 * KIB, 300 * KIB]) for _ in range(20)]
        tensors.append({
            f"t{file}.{at}": ("U8", (size,), checkpoints.random_bytes((size, chance.randrange(8)), size))
            for at, size in enumerate(sizes)
        })  # fmt: skip
        checkpoints.write(tmp_path / "m" / f"model-{file + 1}-of-3.safetensors", tensors[-1])
    plain = start_daemon(pool=0)
    digest, used = loaded(plain, tmp_path / "m", ())
    daemon = start_daemon(pool=0, budget=used + 3 * PAGE if tight else 64 * MIB, reader_threads=3)
    for seed in range(-1, 12):
        groups = () if seed < 0 else hostile(60, seed)
        content, now = loaded(daemon, tmp_path / "m", groups)
        assert content == digest
        assert abs(now - used) <= 60 * PAGE, f"groups {seed}: at most the rest of a page for each tensor"


def loaded(daemon: Daemon, path: Path, groups: Sequence[Sequence[int]]) -> tuple[str, int]:
    """Load with groups of numbers, whatever they are, and remove it again. Returns the digest, and what was used."""
    with weightd.connect(daemon.socket) as client, open_sources(resolve(path)) as opened:
        request = checkpoint_pb2.LoadRequest()
        for group in groups:
            request.group_sizes.append(len(group))
            request.group_tensors.extend(group)
        result = client._load(opened, request, ())
        assert result is not None
        with client.attach(result.content_digest):  # takes the lease that waits for us
            used = settled(client)
        client.remove(result.content_digest)
        eventually(lambda: client.stats().devices[0].used_bytes == 0)
        return result.content_digest, used


def settled(client: weightd.Client) -> int:
    """What is used once the load has given back what it did not need."""
    eventually(lambda: client.stats().devices[0].in_flight_bytes == 0)
    eventually(lambda: client.stats().devices[0].reusable_bytes < 64 * PAGE)
    return client.stats().devices[0].used_bytes


@pytest.mark.parametrize(
    ("sizes", "numbers"), [([2], [1]), ([], [1]), ([1, 1], [0]), ([0, 0], [0]), ([2**32 - 1], [0, 1])]
)
def test_groups_that_do_not_add_up_are_refused(
    here: Daemon, sizes: list[int], numbers: list[int], tmp_path: Path
) -> None:
    path = checkpoints.write(tmp_path / "m.safetensors", parts(2))
    with weightd.connect(here.socket) as client, open_sources(resolve(path)) as opened:
        request = checkpoint_pb2.LoadRequest(group_sizes=sizes, group_tensors=numbers)
        with pytest.raises(weightd.InvalidReferenceError, match="groups of"):
            client._load(opened, request, ())
        assert client.load(path).tensors == 2, "the connection is as good as before"


def test_many_tensors_make_a_small_request(here: Daemon, tmp_path: Path) -> None:
    """The experts of 18,867 tensors, all in groups, take less than 60 KB of a request."""
    count = 18_867
    path = checkpoints.write(tmp_path / "m.safetensors", {f"t{at}": ("U8", (1,), b"x") for at in range(count)})
    with open_sources(resolve(path)) as opened:
        request = checkpoint_pb2.LoadRequest()
        groups = [[f"t{at}" for at in range(start, min(start + 200, count))] for start in range(0, count, 200)]
        _groups.add_groups(request, groups, opened)
        assert sum(request.group_sizes) == count
        assert request.ByteSize() < 60_000
        assert source_to(opened.sources[0]).ByteSize() < 100
