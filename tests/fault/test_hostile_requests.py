"""Requests that ask too much, or that a daemon gets at a bad moment: answered, and nothing is held afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import weightd
from support import checkpoints
from support.daemon import Daemon, eventually
from support.limits import room_for
from support.wire import Peer
from weightd._proto.v1 import checkpoint_pb2, checkpoint_pb2_grpc, handles_pb2

StartDaemon = Callable[..., Daemon]
MIB = 1 << 20


def source(file: str, component: str = "", *, is_index: bool = False) -> checkpoint_pb2.SourceFile:
    identity = checkpoint_pb2.FileIdentity(inode=1)
    return checkpoint_pb2.SourceFile(component=component, file=file, identity=identity, is_index=is_index)


def an_index(file: str, component: str = "") -> checkpoint_pb2.SourceFile:
    return source(file, component, is_index=True)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        pytest.param([source(f"{n}") for n in range(10_001)], "names 10001 files", id="too many"),
        pytest.param([source("")], "file name ''", id="no name"),
        pytest.param([source("x" * 1025)], "1 to 1024 bytes", id="long name"),
        pytest.param([source("x", "\u20ac" * 342)], "component name", id="long component"),
        pytest.param([source("a\nb")], r"file name 'a\\nb'", id="line feed"),
        pytest.param([source("a\x7fb")], "no control", id="DEL"),
        pytest.param([source("a", "\x9b2J")], "no control", id="C1"),
        pytest.param([source("a", "b"), source("a"), source("a", "b")], "'b/a' is named twice", id="twice"),
        pytest.param([an_index("i"), source("a")], "a file comes after an index", id="index first"),
        pytest.param([source("a"), an_index("i"), an_index("j")], "has two indexes", id="two indexes"),
        pytest.param([source("a"), an_index("i", "b")], "component 'b' has an index and no other", id="only an index"),
    ],
)
def test_sources_that_cannot_be(daemon: Daemon, sources: list[checkpoint_pb2.SourceFile], message: str) -> None:
    client = daemon.connect()
    number, intake = client._handles.offer()
    with intake, pytest.raises(weightd.InvalidReferenceError, match=message) as caught:
        client._rpc().load(checkpoint_pb2.LoadRequest(offer_id=number, sources=sources), lambda: None, None)
    assert str(caught.value).isprintable()
    if len(sources) < 1000:  # more do not fit into a frame
        request = handles_pb2.AttachRequest(sources=handles_pb2.SourceSet(sources=sources))
        with Peer(daemon.socket) as peer:
            error = peer.ask(attach=request).error
        assert (error.reason, error.message) == ("INVALID_REFERENCE", caught.value.message)


def test_out_of_descriptors_while_it_attaches(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """However far it gets, the client hears why, the connection stays, and nothing is held."""
    daemon = start_daemon(pool=0)
    for i in range(260):
        checkpoints.write_random(tmp_path / f"part{i}" / "m.safetensors", 1, 300, seed=i)
    checkpoints.describe_pipeline(tmp_path)
    with weightd.connect(daemon.socket, timeout=20) as gone:
        gone.load(tmp_path, name="many")
    client = daemon.connect()
    eventually(lambda: client.leases() == [])  # the one that waited for `gone` to attach
    attach = handles_pb2.AttachRequest(reference="many")
    with Peer(daemon.socket) as peer:
        before = daemon.descriptors()
        for room in (0, 1, 4):
            with room_for(daemon.pid, room):
                error = peer.ask(attach=attach).error
            assert error.reason == "RESOURCE_LIMIT", room
            assert error.metadata["limit"] == "RLIMIT_NOFILE"
            assert "the weightd daemon has all the descriptors that it may have" in error.message
            assert "ulimit -n" in error.message
            # An empty lease file goes a second after its last lease.
            eventually(lambda: daemon.descriptors() <= before, what="nothing to be held")
            assert client.leases() == []
        with room_for(daemon.pid, 1):
            assert peer.ask(offer=handles_pb2.OfferRequest()).error.metadata["limit"] == "RLIMIT_NOFILE"
        assert peer.ask(attach=attach).attach.descriptors == 253
    eventually(lambda: client.leases() == [])


def test_health_says_when_the_daemon_stops(daemon: Daemon) -> None:
    with grpc.insecure_channel(f"unix:{daemon.socket}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        os.kill(daemon.pid, signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
    assert daemon.process is not None
    assert daemon.process.wait(60) == 0


def test_a_verify_that_is_cancelled_gives_back_its_leases_and_its_turn(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(max_loads=1)
    path = checkpoints.write_random(tmp_path / "m.safetensors", 64, 2 * MIB)
    with weightd.connect(daemon.socket, timeout=20) as gone:
        gone.load(path, name="m")
    client = daemon.connect()
    with grpc.insecure_channel(f"unix:{daemon.socket}") as channel, Peer(daemon.socket) as peer:
        stub = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
        for _ in range(3):
            request = checkpoint_pb2.VerifyCheckpointRequest(reference="m")
            events = stub.Verify(request, metadata=(("weightd-token", peer.token),), timeout=60)
            next(events)
            events.cancel()
            eventually(lambda: client.leases() == [], what="its waiting lease is gone")
    client.verify("m")  # there is one turn, and it is free
