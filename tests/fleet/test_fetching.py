"""Two nodes: what is missing is moved and nothing else, and what arrives is what was published, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

import weightd
from support import certificates, checkpoints, gguf_files
from support.agents import NO_DAEMON, Agent, Receiver, agent, published
from support.daemon import Daemon
from weightd.errors import FormatError, NotFoundError
from weightd_fleet.agent import resident
from weightd_fleet.agent.sink_memory import MemorySink
from weightd_fleet.core.manifest import FleetManifest
from weightd_fleet.publishing.state import PublishedState

SIZE = 3000


@pytest.fixture(scope="module")
def two_daemons() -> Iterator[tuple[Daemon, Daemon]]:
    daemons = Daemon(), Daemon()
    yield daemons
    for daemon in daemons:
        daemon.close(check=True)


@pytest.fixture
def daemons(two_daemons: tuple[Daemon, Daemon]) -> Iterator[tuple[Daemon, Daemon]]:
    """Two daemons that hold nothing."""
    yield two_daemons
    for daemon in two_daemons:
        with weightd.connect(daemon.socket, timeout=60.0) as client:
            for checkpoint in client.checkpoints():
                client.remove(checkpoint.content_digest)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificates of both nodes' agents."""
    return certificates.write(tmp_path_factory.mktemp("tls"), trustme.CA(), "agent")


@pytest.fixture
def source(daemons: tuple[Daemon, Daemon], tls: Path, tmp_path: Path) -> Iterator[Agent]:
    """The agent of the first daemon's node."""
    with agent(tmp_path / "source", daemons[0].socket, f"--tls-dir={tls}") as started:
        yield started


@pytest.fixture
def receiver(daemons: tuple[Daemon, Daemon], tls: Path, tmp_path: Path) -> Receiver:
    """The second daemon's node."""
    return Receiver(tmp_path / "receiver", daemons[1].socket, tls)


def pair(folder: Path) -> tuple[Path, Path]:
    """A checkpoint of two files with small files beside them, and one that has three of its ten tensors."""
    base, tuned = folder / "base", folder / "tuned"
    checkpoints.write_random(base / "model.safetensors", 3, SIZE, "base")
    tuned.mkdir()
    shared = {number: ("base", number) for number in range(3)}
    checkpoints.write_random(tuned / "model-00001-of-00002.safetensors", 6, SIZE, "tuned", shared)
    tensors = {f"u{n}": ("U8", (SIZE + n,), checkpoints.random_bytes(("u", n), SIZE + n)) for n in range(4)}
    tensors["empty"] = ("F32", (0, 3), b"")
    checkpoints.write(tuned / "model-00002-of-00002.safetensors", tensors, {"format": "pt", "author": "somebody"})
    owners = {f"t{n}": "model-00001-of-00002.safetensors" for n in range(6)}
    owners |= dict.fromkeys(tensors, "model-00002-of-00002.safetensors")
    checkpoints.index(tuned, owners)
    (tuned / "config.json").write_text('{"model_type": "toy"}')
    (tuned / "empty.txt").write_text("")
    return base, tuned


MISSING = 3 * SIZE + sum(SIZE + n for n in range(4))
WHOLE = MISSING + 3 * SIZE


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_memory_gets_the_missing_tensors_alone(
    daemons: tuple[Daemon, Daemon], source: Agent, receiver: Receiver, tmp_path: Path
) -> None:
    base, tuned = pair(tmp_path)
    digest = published(tmp_path / "source", tuned)
    with daemons[0].connect() as first, daemons[1].connect() as second:
        expected = first.load(tuned, name="tuned")
        second.load(base)
        tuned.rename(tmp_path / "elsewhere")  # so that the tensors come from memory
        receiver.part_bytes = 2 * SIZE
        fetched = receiver.fetch(digest, source.address, sink="memory", name="tuned", pin=True)
        assert (fetched.moved_bytes, fetched.local_bytes) == (MISSING, WHOLE - MISSING)
        assert fetched.content_digest == expected.content_digest
        found = {one.name: one for one in second.checkpoints()}
        assert set(found) == {str(base), "tuned"}, "parts are left behind"
        assert found["tuned"].pinned
        assert not [lease for lease in second.leases() if not lease.waiting]
        second.verify()
        with first.attach("tuned") as there, second.attach("tuned") as here:
            assert here.metadata("", "model-00002-of-00002.safetensors") == {"format": "pt", "author": "somebody"}
            for key in there.tensors:
                assert here.buffer(key.name) == there.buffer(key.name)
        again = receiver.fetch(digest, source.address, sink="memory", name="tuned")
        assert (again.moved_bytes, again.small_bytes) == (0, 0)


def test_one_part_is_held_beside_the_missing_bytes(
    daemons: tuple[Daemon, Daemon],
    source: Agent,
    receiver: Receiver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size, rows, part = 100_000, 12, 300_000
    model = checkpoints.write_random(tmp_path / "m" / "model.safetensors", rows, size)
    digest = published(tmp_path / "source", model)
    receiver.part_bytes = part
    parts: list[int] = []
    take = MemorySink.take

    def taken(self: MemorySink, batch: dict[bytes, int], blobs: Any) -> None:
        waiting = [path.stat().st_size for path in (receiver.state / "staging").glob("*/*")]
        parts.append(sum(bytes_ for bytes_ in waiting if bytes_ == size))
        take(self, batch, blobs)

    monkeypatch.setattr(MemorySink, "take", taken)
    receiver.fetch(digest, source.address, sink="memory")
    assert parts == [part] * 4
    with daemons[1].connect() as second:
        (device,) = second.stats().devices
        pages = rows * 2 * 4096
        assert device.used_bytes <= rows * size + pages, "a tensor is resident twice"


def test_equal_and_small_tensors(
    daemons: tuple[Daemon, Daemon], source: Agent, receiver: Receiver, tmp_path: Path
) -> None:
    small, large = checkpoints.random_bytes(0, 100), checkpoints.random_bytes(1, 100_000)
    tensors = {f"s{n}": ("U8", (100,), small) for n in range(5)} | {
        f"l{n}": ("U8", (100_000,), large) for n in range(3)
    }
    model = checkpoints.write(tmp_path / "m" / "model.safetensors", tensors)
    digest = published(tmp_path / "source", model)
    fetched = receiver.fetch(digest, source.address, sink="memory", name="m")
    assert (fetched.moved_bytes, fetched.local_bytes) == (100_100, 0)
    with daemons[0].connect() as first, daemons[1].connect() as second:
        assert fetched.content_digest == first.load(model).content_digest
        with second.attach("m") as attachment:
            assert {bytes(attachment.buffer(f"s{n}")) for n in range(5)} == {small}
            places = {(info.segment, info.offset) for info in attachment.tensors.values() if info.length == 100}
            assert len(places) == 5, "equal small tensors share a place"
    files = receiver.fetch(digest, source.address)
    assert (Path(files.folder) / "model.safetensors").read_bytes() == model.read_bytes()
    assert files.moved_bytes == 0


def test_other_bytes_with_the_same_content_digest_are_not_taken_for_ours(
    daemons: tuple[Daemon, Daemon], receiver: Receiver, tmp_path: Path
) -> None:
    """What was hashed counts for one instance of a checkpoint: after an eviction it is hashed again."""
    model = checkpoints.write_random(tmp_path / "m" / "model.safetensors", 2, SIZE)
    with daemons[1].connect() as second, receiver.node() as node:
        second.load(model)
        found = node.resident.find({SIZE})
        assert len(found) == 2
        second.attach(model).close()  # the load's own lease goes with it
        second.remove(model)
        second.load(model)
        hashed: list[int] = []
        original = resident.blob_digest

        def counted(data: memoryview) -> bytes:
            hashed.append(len(data))
            return original(data)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(resident, "blob_digest", counted)
            assert node.resident.find({SIZE}) == found
            assert node.resident.find({SIZE}) == found
        assert hashed == [SIZE] * 2


def test_files_come_byte_for_byte(
    daemons: tuple[Daemon, Daemon], source: Agent, receiver: Receiver, tmp_path: Path
) -> None:
    base, tuned = pair(tmp_path)
    digest = published(tmp_path / "source", tuned)
    with daemons[1].connect() as second:
        second.load(base)
        fetched = receiver.fetch(digest, source.address)
    assert (fetched.moved_bytes, fetched.local_bytes) == (MISSING, WHOLE - MISSING)
    assert contents(Path(fetched.folder)) == contents(tuned)
    assert not list((receiver.state / "staging").glob("*/*"))
    again = receiver.fetch(digest)  # needs no peer
    assert (again.moved_bytes, again.small_bytes) == (0, 0)


def test_published_files_are_not_moved_unless_they_have_changed(
    source: Agent, receiver: Receiver, tmp_path: Path
) -> None:
    base, tuned = pair(tmp_path)
    digest = published(tmp_path / "source", tuned)
    published(receiver.state, base)
    moved = receiver.fetch(digest, source.address, folder=tmp_path / "one").moved_bytes
    assert moved == MISSING
    third = Receiver(tmp_path / "third", tls=receiver.tls)
    published(third.state, base)
    checkpoints.write_random(base / "model.safetensors", 3, SIZE, "something else")
    fetched = third.fetch(digest, source.address, folder=tmp_path / "two")
    assert fetched.moved_bytes == WHOLE
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tuned)


def test_a_header_that_is_not_the_manifests(source: Agent, receiver: Receiver, tmp_path: Path) -> None:
    """A publisher can lie in the manifest itself: then the checkpoint is refused, whole."""
    digest = published(tmp_path / "source", checkpoints.write_random(tmp_path / "m" / "model.safetensors", 2, SIZE))
    state = PublishedState(tmp_path / "source")
    manifest = state.manifest(digest)
    first, second = manifest.tensors
    swapped = [first._replace(name=second.name), second._replace(name=first.name)]
    lying = FleetManifest.of(manifest.files, swapped)
    state.put(lying, [], state.sources(digest))
    with pytest.raises(FormatError, match="other tensors than the manifest"):
        receiver.fetch(lying.name, source.address, sink="memory", name="lying")
    with weightd.connect(receiver.socket, timeout=60.0) as client:
        assert [one.names for one in client.checkpoints() if one.names] == []


def test_a_receiver_serves_what_it_has_fetched(
    daemons: tuple[Daemon, Daemon], source: Agent, receiver: Receiver, tmp_path: Path
) -> None:
    _, tuned = pair(tmp_path)
    digest = published(tmp_path / "source", tuned)
    receiver.fetch(digest, source.address, sink="memory")
    with agent(receiver.state, daemons[1].socket, f"--tls-dir={receiver.tls}") as second:
        third = Receiver(tmp_path / "third", tls=receiver.tls)
        fetched = third.fetch(digest, second.address, folder=tmp_path / "files")
    assert fetched.moved_bytes == WHOLE
    assert contents(tmp_path / "files") == contents(tuned)


def test_files_below_a_relative_state_folder_are_served_from_elsewhere(
    source: Agent, receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tuned = pair(tmp_path)
    digest = published(tmp_path / "source", tuned)
    monkeypatch.chdir(tmp_path)
    Receiver(Path("second"), tls=receiver.tls).fetch(digest, source.address)
    monkeypatch.chdir("/")
    with agent(tmp_path / "second", NO_DAEMON, f"--tls-dir={receiver.tls}") as second:
        fetched = Receiver(tmp_path / "third", tls=receiver.tls).fetch(digest, second.address)
    assert fetched.moved_bytes == WHOLE


@pytest.mark.parametrize("sink", ["files", "memory"])
def test_gguf(sink: str, daemons: tuple[Daemon, Daemon], source: Agent, receiver: Receiver, tmp_path: Path) -> None:
    path = tmp_path / "m" / "model.gguf"
    path.parent.mkdir()
    tensors = {
        "blk.0.weight": (2, (4, 32), checkpoints.random_bytes(0, 72)),  # Q4_0: 18 bytes for 32 values
        "norm": (0, (40,), checkpoints.random_bytes(1, 160)),
    }
    path.write_bytes(gguf_files.whole(tensors, [gguf_files.key("general.name", 8, "toy")]))
    digest = published(tmp_path / "source", path)
    fetched = receiver.fetch(digest, source.address, sink=sink)
    if sink == "files":
        assert contents(Path(fetched.folder)) == {"model.gguf": path.read_bytes()}
    else:
        with daemons[0].connect() as first:
            assert fetched.content_digest == first.load(path).content_digest


def test_what_is_gone_is_not_offered(source: Agent, receiver: Receiver, tmp_path: Path) -> None:
    _, tuned = pair(tmp_path)
    digest = published(tmp_path / "source", tuned)
    (tuned / "model-00001-of-00002.safetensors").unlink()
    with receiver.node() as node, node.peer(source.address) as peer:
        assert peer.inventory() == []
    with pytest.raises(NotFoundError, match="not on this node any more"):
        receiver.fetch(digest, source.address)
    with pytest.raises(NotFoundError, match="not published"):
        receiver.fetch("b3:" + "0" * 64, source.address)


def test_commands(daemons: tuple[Daemon, Daemon], source: Agent, receiver: Receiver, tmp_path: Path) -> None:
    _, tuned = pair(tmp_path)
    digest = published(tmp_path / "source", tuned)
    where, tls = f"--from={source.address}", f"--tls-dir={receiver.tls}"
    listed = json.loads(daemons[1].command("fleet", "ls", where, tls, "--format=json").stdout)
    assert [one["digest"] for one in listed[0]["checkpoints"]] == [digest]
    assert digest in daemons[1].command("fleet", "ls", where, tls, "--wide").stdout
    own = (f"--state-dir={receiver.state}", tls)
    memory = ("--sink=memory", f"--socket={daemons[1].socket}")
    said = daemons[1].command("fleet", "fetch", digest, where, *own, *memory, "--name=tuned", "--format=json")
    found = json.loads(said.stdout)
    assert (found["name"], found["moved_bytes"], found["local_bytes"]) == ("tuned", WHOLE, 0)
    assert "resident" in daemons[1].command("fleet", "fetch", digest, where, *own, "--sink=memory").stdout
    refused = daemons[1].command("fleet", "fetch", "b3:0", where, *own, check=False)
    assert refused.returncode == 2
    patient = daemons[1].command("fleet", "ls", "--from=127.0.0.1:1", "--patience=inf", check=False)
    assert "127.0.0.1:1: cannot be reached" in patient.stderr
    unreachable = daemons[1].command("fleet", "ls", "--from=127.0.0.1:1", "--patience=5", check=False)
    assert unreachable.returncode == 1
    why = "cannot be reached: Failed to connect to remote host: Connection refused"
    assert unreachable.stderr == f"weightd: peer 127.0.0.1:1: {why}\n"
