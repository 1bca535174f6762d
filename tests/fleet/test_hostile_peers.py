"""Peers that lie, cut off, stall or refuse: what they send is refused by name, and never reaches a file or a client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from support import checkpoints
from support.agents import Receiver, agent, published
from support.daemon import Daemon
from support.hostile_peer import HostilePeer, hostile_peer
from weightd.errors import (
    CapacityError,
    DaemonBusyError,
    DaemonUnreachableError,
    DigestMismatchError,
    FormatError,
    InvalidReferenceError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolMismatchError,
    WeightdError,
)
from weightd_fleet._proto.v1 import peer_pb2
from weightd_fleet.agent import peer, sources
from weightd_fleet.agent.addresses import parse_address
from weightd_fleet.agent.peer import Peer
from weightd_fleet.agent.peer_errors import MAX_SOURCES, PeerBusyError, error_from
from weightd_fleet.agent.staging import StagingFolder
from weightd_fleet.publishing.state import PublishedState

SIZE, ROWS = 3000, 4
Pieces = Iterator[Any]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The state of a node that has published a checkpoint, and its name."""
    folder = tmp_path_factory.mktemp("served")
    model = checkpoints.write_random(folder / "m" / "model.safetensors", ROWS, SIZE)
    return folder / "state", published(folder / "state", model)


def flipped(position: int) -> Callable[[HostilePeer, Pieces], Pieces]:
    def distort(_: HostilePeer, pieces: Pieces) -> Pieces:
        for piece in pieces:
            if len(piece.data) == SIZE and piece.row == 2:
                data = bytearray(piece.data)
                data[position] ^= 1
                piece.data = bytes(data)
            yield piece

    return distort


def cut_short(_: HostilePeer, pieces: Pieces) -> Pieces:
    for piece in pieces:
        if piece.row == 2:
            piece.data = piece.data[:-1]
            yield piece
            return
        yield piece


def ending(_: HostilePeer, pieces: Pieces) -> Pieces:
    yield next(pieces)


def too_long(_: HostilePeer, pieces: Pieces) -> Pieces:
    for piece in pieces:
        piece.data += b"x"
        yield piece


def one_more(_: HostilePeer, pieces: Pieces) -> Pieces:
    last = None
    for last in pieces:
        yield last
    assert last is not None
    yield peer_pb2.RowPiece(row=last.row + 1, data=b"more")


def of_another_row(_: HostilePeer, pieces: Pieces) -> Pieces:
    for piece in pieces:
        piece.row += 1
        yield piece


def elsewhere(_: HostilePeer, pieces: Pieces) -> Pieces:
    for piece in pieces:
        piece.offset += 1
        yield piece


def empty(_: HostilePeer, pieces: Pieces) -> Pieces:
    for piece in pieces:
        yield peer_pb2.RowPiece(row=piece.row)
        yield piece


def swapped(_: HostilePeer, pieces: Pieces) -> Pieces:
    data = [piece.data for piece in pieces]
    for row, content in enumerate(reversed(data)):
        yield peer_pb2.RowPiece(row=row, data=content)


def huge(_: HostilePeer, pieces: Pieces) -> Pieces:
    next(pieces)
    yield peer_pb2.RowPiece(data=bytes(9 << 20))


def breaking(_: HostilePeer, pieces: Pieces) -> Pieces:
    yield next(pieces)
    raise RuntimeError("a bug of the peer's")


def posing(_: HostilePeer, pieces: Pieces) -> Pieces:
    yield next(pieces)
    raise CapacityError("your own device is full; remove everything\x1b[2J")


LIES: dict[str, tuple[Callable[[HostilePeer, Pieces], Pieces], type[WeightdError]]] = {
    "first bit": (flipped(0), DigestMismatchError),
    "middle bit": (flipped(SIZE // 2), DigestMismatchError),
    "last bit": (flipped(SIZE - 1), DigestMismatchError),
    "cut short": (cut_short, FormatError),
    "ending": (ending, FormatError),
    "too long": (too_long, FormatError),
    "one more": (one_more, FormatError),
    "another row": (of_another_row, FormatError),
    "elsewhere": (elsewhere, FormatError),
    "empty": (empty, FormatError),
    "swapped": (swapped, DigestMismatchError),
    "huge": (huge, DaemonUnreachableError),
    "breaking": (breaking, DaemonUnreachableError),
    "posing": (posing, DaemonUnreachableError),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_and_another_peer_is_asked(lie: str, served: tuple[Path, str], tmp_path: Path) -> None:
    state, digest = served
    distort, error = LIES[lie]
    receiver = Receiver(tmp_path / "receiver")
    with hostile_peer(state, distort) as (liar, _):
        with pytest.raises(error) as raised:
            receiver.fetch(digest, liar)
        assert "\x1b" not in str(raised.value)
        assert not (receiver.state / "files").exists()
        assert PublishedState(receiver.state).names() == []
        kept = sum(path.stat().st_size == SIZE for path in (receiver.state / "staging").glob("*/*"))
        with agent(state) as honest:
            receiver.notes.clear()
            fetched = receiver.fetch(digest, liar, honest.address)
    assert fetched.moved_bytes == (ROWS - kept) * SIZE
    assert sum(str(liar) in note and "not asked again" in note for note in receiver.notes) <= 1
    written = Path(fetched.folder) / "model.safetensors"
    assert written.read_bytes() == (state.parent / "m" / "model.safetensors").read_bytes()


def test_nothing_of_a_lie_reaches_the_daemon(served: tuple[Path, str], daemon: Daemon, tmp_path: Path) -> None:
    state, digest = served
    receiver = Receiver(tmp_path / "receiver", daemon.socket)
    with hostile_peer(state, flipped(5)) as (liar, _), pytest.raises(DigestMismatchError, match=str(liar)):
        receiver.fetch(digest, liar, sink="memory")
    with daemon.connect() as client:
        assert client.checkpoints() == []


def test_another_manifest(served: tuple[Path, str], tmp_path: Path) -> None:
    state, digest = served

    def other(_: HostilePeer, pieces: Pieces) -> Pieces:
        for piece in pieces:
            piece.data = piece.data[:-1] + b"x"
            yield piece

    def endless(_: HostilePeer, pieces: Pieces) -> Pieces:
        list(pieces)
        while True:
            yield peer_pb2.ManifestPiece(data=bytes(4 << 20))

    for distort, said in ((other, "not the one of"), (endless, "more than")):
        with hostile_peer(state, manifest=distort) as (liar, _), pytest.raises(FormatError, match=said):
            Receiver(tmp_path / "receiver").fetch(digest, liar)


def test_a_peer_that_lists_too_much(served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    state, digest = served
    with hostile_peer(state) as (address, _), Peer(address, None) as asked:
        assert [entry.name for entry in asked.inventory()] == [digest]
        monkeypatch.setattr(peer, "MAX_ENTRIES", 0)
        with pytest.raises(FormatError, match="lists 1 checkpoints, over the limit of 0"):
            asked.inventory()


def test_a_server_that_is_no_agent(served: tuple[Path, str], tmp_path: Path) -> None:
    _, digest = served
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(ProtocolMismatchError, match="no agent of this version"):
            Receiver(tmp_path / "receiver").fetch(digest, parse_address(f"127.0.0.1:{port}"))
    finally:
        server.stop(None).wait()


def test_a_name_that_is_none_asks_nobody(served: tuple[Path, str], tmp_path: Path) -> None:
    state, digest = served
    with hostile_peer(state) as (address, service):
        for name in ("", "b3:", digest[:-1], digest.upper(), f"{digest}0", "b3:../../../etc/passwd"):
            with pytest.raises(InvalidReferenceError, match="not a checkpoint's name in a fleet"):
                Receiver(tmp_path / "receiver").fetch(name, address)
        assert not service.read
    assert not (tmp_path / "receiver").exists()


def test_rows_that_may_not_be_asked_for(served: tuple[Path, str]) -> None:
    state, digest = served
    with hostile_peer(state) as (address, _), Peer(address, None) as asked:
        with pytest.raises(NotFoundError, match="has no row '00"):
            list(asked.rows(digest, [(bytes(32), 5)], ""))
        with pytest.raises(InvalidReferenceError, match="over the limit of 100000"):
            list(asked.rows(digest, [(b"", 1)] * 100_001, ""))


@pytest.mark.parametrize(
    ("sink", "count", "said"),
    [
        (peer_pb2.SINK_UNSPECIFIED, 1, "names no sink"),
        (9, 1, "names no sink"),
        (peer_pb2.SINK_FILES, 0, "0 sources"),
        (peer_pb2.SINK_FILES, MAX_SOURCES + 1, f"name 1 to {MAX_SOURCES}"),
    ],
)
def test_fetches_that_may_not_be_asked_for(sink: Any, count: int, said: str, served: tuple[Path, str]) -> None:
    state, digest = served
    begun: list[object] = []
    order = peer_pb2.FetchRequest(name=digest, sources=["127.0.0.1:1"] * count, sink=sink)
    with (
        hostile_peer(state, fetch=lambda *given: begun.append(given)) as (address, _),
        Peer(address, None) as asked,
        pytest.raises(InvalidReferenceError, match=said),
    ):
        list(asked.fetch(order, 30.0))
    assert not begun


def test_a_peer_that_stalls(served: tuple[Path, str], tmp_path: Path) -> None:
    state, digest = served
    released = threading.Event()

    def stall(_: HostilePeer, pieces: Pieces) -> Pieces:
        yield next(pieces)
        released.wait(60)

    receiver = Receiver(tmp_path / "receiver", patience=0.5)
    with hostile_peer(state, stall) as (staller, _):
        try:
            with pytest.raises(DaemonUnreachableError, match="sends nothing, or too slowly"):
                receiver.fetch(digest, staller)
        finally:
            released.set()


def test_a_peer_that_is_busy_for_good(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, digest = served
    monkeypatch.setattr(sources, "BUSY_SECONDS", 0.3)
    with hostile_peer(state, readers=0) as (busy, service):
        with pytest.raises(DaemonBusyError, match="no more may be"):
            Receiver(tmp_path / "receiver").fetch(digest, busy)
        assert service.read > 1


def test_a_busy_peer_names_others(served: tuple[Path, str], tmp_path: Path) -> None:
    state, digest = served

    def refer(_: HostilePeer, pieces: Pieces) -> Pieces:
        next(pieces)
        raise PeerBusyError("busy", [second])
        yield

    with hostile_peer(state) as (second, other), hostile_peer(state, refer) as (first, _):
        fetched = Receiver(tmp_path / "receiver").fetch(digest, first)
    assert fetched.moved_bytes == ROWS * SIZE
    assert other.read


def test_a_peer_that_was_named_is_waited_for(served: tuple[Path, str], tmp_path: Path) -> None:
    """Who fetches is named before it has everything."""
    state, digest = served
    asked: list[int] = []

    def lack(_: HostilePeer, pieces: Pieces) -> Pieces:
        asked.append(1)
        if len(asked) < 3:
            raise NotFoundError("not yet")
        yield from pieces

    def refer(_: HostilePeer, pieces: Pieces) -> Pieces:
        next(pieces)
        raise PeerBusyError("busy", [second])
        yield

    receiver = Receiver(tmp_path / "receiver")
    with hostile_peer(state, lack) as (second, _), hostile_peer(state, refer) as (first, _):
        assert receiver.fetch(digest, first).moved_bytes == ROWS * SIZE
    assert len(asked) >= 3
    assert not receiver.notes


def test_a_full_disk(served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, digest = served
    full = StagingFolder.receive

    def receive(self: StagingFolder, digest: bytes, length: int) -> Any:
        row = full(self, digest, length)
        if length == SIZE:
            row._file.close()
            row._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115  # the row closes it
        return row

    with agent(state) as honest:
        receiver = Receiver(tmp_path / "receiver")
        with monkeypatch.context() as patched:
            patched.setattr(StagingFolder, "receive", receive)
            with pytest.raises(CapacityError, match="the disk is full"):
                receiver.fetch(digest, honest.address)
        assert not receiver.notes, "the peer is blamed"
        assert receiver.fetch(digest, honest.address).moved_bytes == ROWS * SIZE


def test_a_full_device(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    small = start_daemon(budget="1MiB")
    model = checkpoints.write_random(tmp_path / "m" / "model.safetensors", 4, 400_000)
    digest = published(tmp_path / "source", model)
    with agent(tmp_path / "source") as honest:
        with pytest.raises(CapacityError):
            Receiver(tmp_path / "receiver", small.socket).fetch(digest, honest.address, sink="memory")
        assert Receiver(tmp_path / "receiver").fetch(digest, honest.address).moved_bytes < 4 * 400_000, "rows are lost"


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":1", "host:65536", "host:-1", "a b:1", "[::1", "[::1]", "h:1:2", "unix:/x", "h:1\n"]
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(InvalidReferenceError):
        parse_address(text)


def test_addresses() -> None:
    for text in ("[::1]:7411", "127.0.0.1:0", "node-1.example.org:65535"):
        assert str(parse_address(text)) == text


def test_errors_of_a_peer_are_checked() -> None:
    address = parse_address("127.0.0.1:1")
    many = ",".join(["x y", *(f"h{n}:1" for n in range(500))])
    trailers = [("weightd-reason", "BUSY"), ("weightd-sources", many)]
    error = error_from(address, "UNAVAILABLE", "m" * 5000, trailers, of_read=True)
    assert isinstance(error, PeerBusyError)
    assert len(error.sources) == MAX_SOURCES - 1
    assert len(str(error)) < 1100


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("PERMISSION_DENIED", PermissionDeniedError),
        ("DEADLINE_EXCEEDED", DaemonUnreachableError),
        ("INTERNAL", DaemonUnreachableError),
    ],
)
def test_an_error_without_a_reason_is_read_by_its_code(code: str, error: type[WeightdError]) -> None:
    """A proxy in between answers so."""
    assert type(error_from(parse_address("127.0.0.1:1"), code, "no", [], of_read=True)) is error
