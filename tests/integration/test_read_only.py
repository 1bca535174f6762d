"""Read-only connections: they see what others see, and change nothing."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import weightd
from support import checkpoints
from support.background import background
from support.daemon import Daemon, environment, eventually
from support.wire import Peer
from weightd._proto.v1 import checkpoint_pb2, daemon_pb2, handles_pb2, inspection_pb2, lease_pb2
from weightd_daemon.handles.read_only import ALLOWED

MIB = 1 << 20


@pytest.fixture
def filled(daemon: Daemon, tmp_path: Path) -> Daemon:
    """A daemon with one checkpoint, `m`, that its owner has pinned."""
    with daemon.connect() as client:
        client.load(checkpoints.write_random(tmp_path / "m.safetensors", 2, MIB), name="m", pin=True)
    return daemon


def methods() -> Iterator[str]:
    """Every method of our services."""
    for proto in (checkpoint_pb2, daemon_pb2, inspection_pb2, lease_pb2):
        for service in proto.DESCRIPTOR.services_by_name.values():
            yield from (f"/{service.full_name}/{method.name}" for method in service.methods)


def call(channel: grpc.Channel, method: str, token: str) -> Any:
    """Call a method with a request that says nothing. Returns the first answer, or the error."""
    calling = channel.unary_stream(method, request_serializer=bytes, response_deserializer=bytes)
    answers = calling(b"", metadata=(("weightd-token", token),), timeout=60)
    try:
        return next(answers, b"")
    except grpc.RpcError as error:
        return error
    finally:
        answers.cancel()


def test_every_call_is_allowed_or_refused_by_name(filled: Daemon) -> None:
    with Peer(filled.socket, read_only=True) as peer, grpc.insecure_channel(f"unix:{filled.socket}") as channel:
        for method in methods():
            answer = call(channel, method, peer.token)
            if method in ALLOWED:
                code = answer.code() if isinstance(answer, grpc.RpcError) else None
                assert code is not grpc.StatusCode.PERMISSION_DENIED, method
            else:
                assert answer.code() is grpc.StatusCode.PERMISSION_DENIED, method
                assert answer.details().startswith(f"{method.rpartition('/')[2]} is refused"), method
    with filled.connect() as client:
        assert [(c.names, c.pinned) for c in client.checkpoints()] == [(("m",), True)]


def test_every_frame_but_hello_is_refused_by_name(filled: Daemon) -> None:
    frames: list[dict[str, Any]] = [
        {"attach": handles_pb2.AttachRequest(reference="m")},
        {"attach": handles_pb2.AttachRequest(reference="m", manifest_only=True)},
        {"offer": handles_pb2.OfferRequest()},
        {"detach": handles_pb2.DetachRequest(lease=1)},
        {"reclaim": handles_pb2.ReclaimRequest(lease=1)},
    ]
    with Peer(filled.socket, read_only=True) as peer:
        for frame in frames:
            error = peer.ask(**frame).error
            assert (error.reason, error.message.split()[0]) == ("PERMISSION_DENIED", *frame)
        assert not peer.descriptors


def test_a_read_only_client(filled: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with weightd.connect(filled.socket, timeout=60, read_only=True) as client:
        refused: list[Callable[[], object]] = [
            lambda: client.load(tmp_path / "m.safetensors"),
            lambda: client.attach("m"),
            lambda: client.pin("m"),
            lambda: client.unpin("m"),
            lambda: client.remove("m"),
            lambda: client.verify("m"),
            client.drain,
            client.undrain,
        ]
        for act in refused:
            with pytest.raises(weightd.PermissionDeniedError, match="read-only"):
                act()
        (checkpoint,) = client.checkpoints()
        assert checkpoint.names == ("m",)
        (tmp_path / "m").mkdir()
        monkeypatch.chdir(tmp_path)  # where `m` is a path, too: a name it stays
        assert client.inspect("m").checkpoint == checkpoint
        assert client.leases() == []
        assert client.stats().checkpoints == 1
        filled.kill()
        filled.start()
        with pytest.raises(weightd.PermissionDeniedError, match="read-only"):
            client.pin("m")


def test_a_connection_is_what_it_said_it_is(daemon: Daemon) -> None:
    with Peer(daemon.socket, hello=False) as peer:
        reply = peer.ask(hello=handles_pb2.HelloRequest(protocol=1, read_only=True)).hello
        assert reply.read_only
    with Peer(daemon.socket, hello=False) as peer:
        assert not peer.ask(hello=handles_pb2.HelloRequest(protocol=1)).hello.read_only


def hold(daemon: Daemon, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """`weightd token`, and the first line that it prints."""
    command = subprocess.Popen(
        [sys.executable, "-m", "weightd", "token", *arguments],
        env=environment(daemon.socket), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert command.stdout is not None
    return command, command.stdout.readline().strip()


def test_the_token_of_the_command_looks_until_ctrl_c(filled: Daemon) -> None:
    command, token = hold(filled)
    with grpc.insecure_channel(f"unix:{filled.socket}") as channel:
        listed = call(channel, "/weightd.v1.CheckpointService/List", token)
        assert [one.names for one in checkpoint_pb2.ListCheckpointsResponse.FromString(listed).checkpoints] == [["m"]]
        refused = call(channel, "/weightd.v1.CheckpointService/Unpin", token)
        assert refused.code() is grpc.StatusCode.PERMISSION_DENIED
        assert command.stdout is not None
        printed = [next(command.stdout).strip() for _ in range(5)]
        assert printed[3] == f"export WEIGHTD_TOKEN={token}"
        header = "-expand-headers -H 'weightd-token: ${WEIGHTD_TOKEN}'"  # every user can read command lines
        assert printed[4].startswith(f"grpcurl -plaintext -unix {header} {filled.socket} weightd.v1.DaemonService/")
        command.send_signal(signal.SIGINT)
        _, error = command.communicate(timeout=60)
        assert (command.returncode, error) == (130, "weightd: interrupted\n")
        eventually(lambda: filled.connections() == 0, what="the end of its connection")
        assert call(channel, "/weightd.v1.CheckpointService/List", token).code() is grpc.StatusCode.PERMISSION_DENIED


def test_the_command_ends_with_its_reader_and_with_the_daemon(filled: Daemon) -> None:
    command, line = hold(filled, "--format", "json")
    assert json.loads(line).keys() == {"token", "metadata", "socket"}
    assert command.stdout is not None
    command.stdout.close()
    assert command.wait(60) == 141
    assert command.stderr is not None
    assert command.stderr.read() == ""
    command.stderr.close()
    command, _ = hold(filled)
    filled.kill()
    _, error = command.communicate(timeout=60)
    assert command.returncode == 69
    assert error.startswith(f"weightd: the weightd daemon at {filled.socket} closed the connection")
    filled.start()


def test_a_daemon_that_knows_no_read_only_connections_is_not_trusted(short_path: Path) -> None:
    """It answers hello as before, and its token could change everything."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(short_path / "w.sock.handles"))
        listener.listen()

        def answer() -> None:
            accepted, _ = listener.accept()
            with accepted:
                accepted.recv(65536)
                hello = handles_pb2.HelloReply(protocol=1, token="all", version="0.0.9")
                accepted.send(handles_pb2.HandleReply(hello=hello).SerializeToString())

        answered = background(answer)
        with pytest.raises(weightd.ProtocolMismatchError, match=r"0\.0\.9, which has no read-only connections"):
            weightd.connect(short_path / "w.sock", timeout=60, read_only=True)
        answered.result(60)
