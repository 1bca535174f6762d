"""Nonsense on either socket and descriptors of the wrong kind: that connection ends, the daemon serves on.

A FUSE file may hang every call on it (tests/fault/test_restarts.py). What keeps such files from the daemon is that it
never receives a client's descriptor (the intake's other end goes to the loader), which is tested here.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import weightd
from support import checkpoints
from support.backends import EVERY
from support.content import content
from support.daemon import Daemon, eventually
from support.launch import launcher
from support.wire import Peer, opened_as, send_with, source_of
from weightd._proto.v1 import (
    checkpoint_pb2,
    checkpoint_pb2_grpc,
    daemon_pb2,
    daemon_pb2_grpc,
    handles_pb2,
    lease_pb2,
    lease_pb2_grpc,
)
from weightd._transport.convert import source_to

StartDaemon = Callable[..., Daemon]
Request = handles_pb2.HandleRequest
HELLO = Request(hello=handles_pb2.HelloRequest(protocol=1)).SerializeToString()
OFFER = Request(offer=handles_pb2.OfferRequest()).SerializeToString()
ACK = Request(ack=handles_pb2.BatchAck()).SerializeToString()
ATTACH = Request(attach=handles_pb2.AttachRequest(reference="nope")).SerializeToString()


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> Daemon:
    """A daemon that keeps nothing that is freed, so that its descriptors can be counted."""
    return start_daemon(pool=0)


@pytest.fixture
def client(daemon: Daemon, tmp_path: Path) -> Iterator[weightd.Client]:
    """A client with a checkpoint "m". At the end the daemon still serves it, and has no descriptor more."""
    client = daemon.connect()
    client.load(checkpoints.write_random(tmp_path / "good.safetensors", 3, 5000, seed="m"), name="m")
    with client.attach("m"):
        pass
    eventually(lambda: client.leases() == [])
    before = daemon.descriptors()
    yield client
    with client.attach("m") as attachment:
        assert attachment.buffer("t2") == checkpoints.random_bytes(("m", 2), 5000)
    eventually(lambda: daemon.descriptors() <= before, what=f"{before} descriptors, as before")
    assert not client.stats().devices[0].in_flight_bytes


NONSENSE: dict[str, list[bytes]] = {
    "garbage": [b"\xff" * 100],
    "http": [b"GET / HTTP/1.1\r\nHost: weightd\r\n\r\n"],
    "no request in it": [HELLO, Request().SerializeToString() or b"\xa2\x06\x00"],
    "unknown field only": [b"\xa2\x06\x00"],
    "empty": [b""],
    "empty after hello": [HELLO, b""],
    "hello cut": [HELLO[:-1]],
    "attach cut": [HELLO, ATTACH[:-2]],
    "one byte too long": [HELLO, bytes(65537)],
    "long and well-formed": [HELLO, Request(attach={"reference": "x" * 65536}).SerializeToString()],
    "very long": [bytes(200_000)],
    "offer before hello": [OFFER],
    "attach before hello": [ATTACH],
    "detach before hello": [Request(detach=handles_pb2.DetachRequest(lease=1)).SerializeToString()],
    "second hello": [HELLO, HELLO],
    "protocol 0": [Request(hello=handles_pb2.HelloRequest()).SerializeToString()],
    "protocol 2": [Request(hello=handles_pb2.HelloRequest(protocol=2)).SerializeToString()],
    "acknowledgement for nothing": [HELLO, ACK],
    "seventeen offers": [HELLO, *[OFFER] * 17],
}


@pytest.mark.usefixtures("client")
def test_nonsense_on_the_handle_socket(daemon: Daemon) -> None:
    for case, frames in NONSENSE.items():
        with Peer(daemon.socket, hello=False) as peer:
            for number, frame in enumerate(frames, start=1):
                peer.socket.send(frame)
                if number < len(frames):
                    assert peer.receive().WhichOneof("body") in ("hello", "offer"), case
            assert peer.is_closed(), case
    lines = [line for line in daemon.logged().splitlines() if "protocol error" in line]
    first, *others = lines
    assert "protocol error pid=" in first
    assert others == [] or all("protocol error: and " in line or "pid=" in line for line in others)
    assert len(lines) <= 4, "one line at once, and then a count"


@pytest.mark.usefixtures("client")
def test_descriptors_on_the_handle_socket_are_dropped(daemon: Daemon) -> None:
    before = daemon.descriptors()
    with open("/dev/null", "rb") as null:
        for frame in (HELLO, ATTACH):
            with Peer(daemon.socket, hello=frame is not HELLO) as peer:
                send_with(peer.socket, frame, [null.fileno()] * 253)
                assert peer.is_closed()
                eventually(lambda: daemon.descriptors() <= before, what="none of the 253 is kept")


def test_errors_leave_the_connection_usable(client: weightd.Client, daemon: Daemon) -> None:
    with Peer(daemon.socket) as peer:
        for body, reason in (
            ({"reference": "nope"}, "NOT_FOUND"),
            ({}, "INVALID_REFERENCE"),
            ({"reference": "m", "components": ["nope"]}, "NOT_FOUND"),
            ({"reference": "m", "tensors": [{"name": "nope"}]}, "NOT_FOUND"),
            ({"reference": "m", "device": "GPU-0"}, "NOT_FOUND"),
            ({"reference": "\0\n" * 500}, "NOT_FOUND"),
            ({"reference": "\0\n" * 1000}, "INVALID_REFERENCE"),
            ({"sources": {"sources": []}}, "NOT_FOUND"),
        ):
            error = peer.ask(attach=handles_pb2.AttachRequest(**body)).error  # type: ignore[arg-type]  # any field
            assert error.reason == reason, body
            assert error.message, body
        assert peer.ask(detach=handles_pb2.DetachRequest(lease=2**64 - 1)).detach.ended
        assert peer.ask(attach=handles_pb2.AttachRequest(reference="m")).attach.descriptors == 2
    eventually(lambda: client.leases() == [])


@pytest.mark.backends(*EVERY, swept="cuda_ipc")
def test_another_request_while_a_batch_is_outstanding(daemon: Daemon, tmp_path: Path) -> None:
    for i in range(260):
        checkpoints.write_random(tmp_path / f"part{i}" / "m.safetensors", 1, 300, seed=i)
    client = daemon.connect()
    client.load(checkpoints.describe_pipeline(tmp_path), name="many")
    before = daemon.descriptors()
    for frame in (ATTACH, OFFER, HELLO, b"\xff"):
        with Peer(daemon.socket) as peer:
            peer.ask(attach=handles_pb2.AttachRequest(reference="many"))
            peer.socket.send(frame)
            assert peer.is_closed()
    with Peer(daemon.socket) as peer:  # hangs up instead of acknowledging
        peer.ask(attach=handles_pb2.AttachRequest(reference="many"))
    eventually(lambda: daemon.descriptors() <= before, what="unsent descriptors are closed")
    with client.attach("many") as attachment:
        assert content(attachment, "t0", "part259") == checkpoints.random_bytes((259, 0), 300)


def flood(peer: Peer) -> None:
    """Ask and ask."""
    for _ in range(100_000):
        peer.socket.send(ATTACH)


def test_a_peer_that_does_not_read_its_answers(client: weightd.Client, daemon: Daemon) -> None:
    with Peer(daemon.socket) as peer:
        peer.socket.settimeout(2)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            flood(peer)
    assert client.stats().checkpoints == 1


def test_more_connections_than_allowed(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(max_connections=20)
    peers = [Peer(daemon.socket) for _ in range(20)]
    refused = [Peer(daemon.socket, hello=False) for _ in range(30)]
    assert all(peer.is_closed() for peer in refused)
    with pytest.raises(weightd.DaemonUnreachableError):
        weightd.connect(daemon.socket)
    assert peers[0].ask(attach=handles_pb2.AttachRequest(reference="nope")).error.reason == "NOT_FOUND"
    for peer in peers + refused:
        peer.close()
    eventually(lambda: can_connect(daemon), what="there is room again")


def can_connect(daemon: Daemon) -> bool:
    try:
        weightd.connect(daemon.socket).close()
    except weightd.DaemonUnreachableError:
        return False
    return True


def test_silence_is_ended(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(argv=launcher(hello=0.4))
    with Peer(daemon.socket, hello=False) as silent, Peer(daemon.socket) as greeted:
        assert silent.is_closed()
        assert greeted.ask(attach=handles_pb2.AttachRequest(reference="nope")).error.reason == "NOT_FOUND"


# -- the control plane -------------------------------------------------------------------------------------------------


def test_garbage_on_the_control_socket(client: weightd.Client, daemon: Daemon) -> None:
    for garbage in (b"\0" * 1000, b"\xff" * 100_000, os.urandom(1000), b"GET / HTTP/1.1\r\n\r\n",
                    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(5000)):  # fmt: skip
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
            raw.settimeout(60)
            raw.connect(str(daemon.socket))
            try:
                raw.sendall(garbage)
                raw.shutdown(socket.SHUT_WR)
                while raw.recv(65536):
                    pass
            except (BrokenPipeError, ConnectionResetError):
                pass
    assert client.version().pid == daemon.pid


def test_calls_without_a_token(client: weightd.Client, daemon: Daemon) -> None:
    with grpc.insecure_channel(f"unix:{daemon.socket}") as channel, Peer(daemon.socket) as gone:
        checkpoint = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
        lease = lease_pb2_grpc.LeaseServiceStub(channel)
        books = daemon_pb2_grpc.DaemonServiceStub(channel)
        calls: list[tuple[Any, Any]] = [
            (checkpoint.List, checkpoint_pb2.ListCheckpointsRequest()),
            (checkpoint.Get, checkpoint_pb2.GetCheckpointRequest(reference="m")),
            (checkpoint.Pin, checkpoint_pb2.PinCheckpointRequest(reference="m")),
            (checkpoint.Unpin, checkpoint_pb2.UnpinCheckpointRequest(reference="m")),
            (checkpoint.Remove, checkpoint_pb2.RemoveCheckpointRequest(reference="m")),
            (checkpoint.Load, checkpoint_pb2.LoadRequest(offer_id=1)),
            (checkpoint.Verify, checkpoint_pb2.VerifyCheckpointRequest()),
            (lease.List, lease_pb2.ListLeasesRequest()),
            (books.GetStats, daemon_pb2.GetStatsRequest()),
        ]
        gone.close()
        eventually(lambda: code(books.GetStats, daemon_pb2.GetStatsRequest(), gone.token) is not None)
        for token in (None, "", "wrong", gone.token):
            for method, request in calls:
                assert code(method, request, token) is grpc.StatusCode.PERMISSION_DENIED, (method, token)
        assert books.GetVersion(daemon_pb2.GetVersionRequest(), timeout=60).pid == daemon.pid
    assert client.inspect("m").checkpoint.pinned is False


def code(method: Any, request: Any, token: str | None) -> grpc.StatusCode | None:
    """The code that a call fails with."""
    try:
        answer = method(request, metadata=() if token is None else (("weightd-token", token),), timeout=60)
        if not hasattr(answer, "DESCRIPTOR"):
            list(answer)
    except grpc.RpcError as error:
        call: Any = error
        return call.code()
    return None


# -- the intake --------------------------------------------------------------------------------------------------------


def offered(client: weightd.Client, descriptor: int, name: str = "x") -> Any:
    """Load what a descriptor stands for, whatever it is."""
    opened = opened_as(descriptor, source_of(descriptor))
    return client._load(opened, checkpoint_pb2.LoadRequest(name=name, name_is_default=True), ())


@pytest.mark.parametrize("kind", ["pipe", "socket", "directory", "O_PATH", "O_WRONLY", "zero", "null", "eventfd"])
def test_descriptors_of_the_wrong_kind(client: weightd.Client, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "good.safetensors"
    descriptors: list[int] = []
    if kind == "pipe":
        descriptors += os.pipe()
    elif kind == "socket":
        descriptors += [end.detach() for end in socket.socketpair()]
    elif kind == "eventfd":
        descriptors.append(os.eventfd(0))
    elif kind in ("zero", "null"):
        descriptors.append(os.open(f"/dev/{kind}", os.O_RDONLY))
    else:
        flags = {"directory": os.O_RDONLY, "O_PATH": os.O_PATH, "O_WRONLY": os.O_WRONLY}[kind]
        descriptors.append(os.open(tmp_path if kind == "directory" else path, flags))
    expected = "not open for reading" if kind.startswith("O_") else "not a regular file"
    try:
        with pytest.raises(weightd.InvalidReferenceError, match=f"m.safetensors.*{expected}"):
            offered(client, descriptors[0])
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_a_memfd_is_a_file_like_any_other(client: weightd.Client, tmp_path: Path) -> None:
    descriptor = os.memfd_create("checkpoint")
    try:
        os.write(descriptor, checkpoints.write_random(tmp_path / "m", 2, 5000, seed="memfd").read_bytes())
        offered(client, descriptor, "memory")
    finally:
        os.close(descriptor)
    with client.attach("memory") as attachment:
        assert attachment.buffer("t1") == checkpoints.random_bytes(("memfd", 1), 5000)
    client.remove("memory")


def test_another_file_than_announced(client: weightd.Client, tmp_path: Path) -> None:
    announced = checkpoints.write_random(tmp_path / "announced.safetensors", 1, 300, seed="announced")
    with announced.open("rb") as first, (tmp_path / "good.safetensors").open("rb") as second:
        opened = opened_as(second.fileno(), source_of(first.fileno()))
        with pytest.raises(weightd.InvalidReferenceError, match="not the file that was announced"):
            client._load(opened, checkpoint_pb2.LoadRequest(name="x", name_is_default=True), ())


Feed = Callable[[socket.socket, int], None]


def batch(first: int, count: int, sent: int | None = None) -> Feed:
    """Send one frame that says `count` descriptors from `first` on and carries `sent`."""

    def feed(intake: socket.socket, descriptor: int) -> None:
        frame = handles_pb2.IntakeBatch(first=first, descriptors=count).SerializeToString()
        send_with(intake, frame, [descriptor] * (count if sent is None else sent))

    return feed


def bare(data: bytes) -> Feed:
    """Send a frame without descriptors."""

    def feed(intake: socket.socket, _: int) -> None:
        intake.send(data)

    return feed


def half_way(intake: socket.socket, descriptor: int) -> None:
    """Send one of two files, wait until it has arrived, leave."""
    batch(0, 1)(intake, descriptor)
    assert intake.recv(100)


@pytest.mark.parametrize(
    "feed",
    [
        pytest.param(batch(1, 1), id="first index too high"),
        pytest.param(batch(0, 2, sent=1), id="fewer than said"),
        pytest.param(batch(0, 1, sent=2), id="more than said"),
        pytest.param(batch(0, 3), id="more than announced"),
        pytest.param(batch(0, 253), id="many more than announced"),
        pytest.param(bare(handles_pb2.IntakeBatch(first=0, descriptors=2).SerializeToString()), id="none"),
        pytest.param(bare(b"\xff\xff\xff"), id="garbage"),
        pytest.param(bare(bytes(100_000)), id="too long"),
        pytest.param(bare(b""), id="empty"),
        pytest.param(half_way, id="leaves half-way"),
        pytest.param(batch(0, 1), id="leaves without waiting for the acknowledgement"),
        pytest.param(lambda *_: None, id="leaves at once"),
    ],
)
def test_nonsense_in_the_intake(client: weightd.Client, tmp_path: Path, feed: Feed) -> None:
    """Two files are announced. The load fails with a clear error, and the loader is none the worse for it."""
    with (tmp_path / "good.safetensors").open("rb") as file:
        sources = [source_to(source_of(file.fileno(), name)) for name in ("a.safetensors", "b.safetensors")]
        number, intake = client._handles.offer()
        request = checkpoint_pb2.LoadRequest(offer_id=number, sources=sources)

        def on_feed() -> None:
            with intake:
                feed(intake, file.fileno())

        with pytest.raises(weightd.InvalidReferenceError, match=r"\d of 2 |descriptors were lost|no IntakeBatch"):
            client._rpc().load(request, on_feed, None)


def test_offers_of_somebody_else(client: weightd.Client, daemon: Daemon, tmp_path: Path) -> None:
    with Peer(daemon.socket) as peer, (tmp_path / "good.safetensors").open("rb") as file:
        source = source_to(source_of(file.fileno()))
        foreign = peer.ask(offer=handles_pb2.OfferRequest()).offer.offer_id
        for number in (foreign, 0, 2**64 - 1):
            request = checkpoint_pb2.LoadRequest(offer_id=number, sources=[source])
            with pytest.raises(weightd.LeaseLostError, match="an offer is not there"):  # nobody reads which
                client._rpc().load(request, lambda: None, None)
        with weightd.connect(daemon.socket, timeout=60) as other:
            own, intake = other._handles.offer()
            with intake:
                for number in (foreign, 0, 2**64 - 1):
                    assert number != own
                    request = checkpoint_pb2.LoadRequest(offer_id=number, sources=[source])
                    with pytest.raises(weightd.LeaseLostError, match=f"offer {number} is not there"):
                        other._rpc().load(request, lambda: None, None)


def test_a_load_of_nothing(client: weightd.Client) -> None:
    number, intake = client._handles.offer()
    with intake, pytest.raises(weightd.InvalidReferenceError, match="names no files"):
        client._rpc().load(checkpoint_pb2.LoadRequest(offer_id=number), lambda: None, None)


def test_refused_loads_cost_no_offer(client: weightd.Client, tmp_path: Path) -> None:
    """A connection may have sixteen offers; each is over with its load, also where the load is refused at once."""
    token = client._handles.token
    for _ in range(40):
        with pytest.raises(weightd.InvalidReferenceError, match="name"):
            client.load(tmp_path / "good.safetensors", name="no\nname")
    assert client._handles.token == token  # still the same connection
