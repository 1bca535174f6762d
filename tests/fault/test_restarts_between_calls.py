"""A daemon that restarts between two calls of a client: it is told so, or not even that, and never that it may not."""

from __future__ import annotations

import socket
from pathlib import Path

import grpc
import pytest

import weightd
from support import checkpoints
from support.daemon import Daemon, eventually
from support.wire import Peer
from weightd._proto.v1 import checkpoint_pb2, checkpoint_pb2_grpc, errors_pb2
from weightd._transport.handle_socket import SocketClient


def test_between_the_offer_and_the_load_nobody_notices(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = daemon.connect()
    client.version()
    path = checkpoints.write_random(tmp_path / "m.safetensors", 3, 5000, seed="m")
    offer = SocketClient.offer
    offered: list[int] = []

    def then_restart(self: SocketClient) -> tuple[int, socket.socket]:
        number, intake = offer(self)
        offered.append(number)
        if len(offered) == 1:
            daemon.kill()
            daemon.start()
        return number, intake

    monkeypatch.setattr(SocketClient, "offer", then_restart)
    assert client.load(path, name="m").names == ("m",)
    assert len(offered) == 2


def test_any_other_call_says_that_it_has_restarted(daemon: Daemon) -> None:
    client = daemon.connect()
    rpc = client._rpc()
    rpc.checkpoints()
    daemon.kill()
    daemon.start()

    def said() -> str:
        with pytest.raises(weightd.DaemonUnreachableError) as caught:
            rpc.checkpoints()
        return str(caught.value)

    # gRPC may say first that the old one hung up; the token of that one is what the new one refuses.
    eventually(lambda: f"the weightd daemon at {daemon.socket} has restarted" in said())
    assert client.checkpoints() == [], "the next call of the client connects anew"


def test_a_token_that_was_never_good_is_refused_as_before(daemon: Daemon) -> None:
    """An older client reads the code and the reason, and both are what they were."""
    with grpc.insecure_channel(f"unix:{daemon.socket}") as channel, Peer(daemon.socket) as peer:
        listed = checkpoint_pb2_grpc.CheckpointServiceStub(channel).List
        for token, refused in (("wrong", "token"), ("", "")):
            with pytest.raises(grpc.RpcError) as caught:
                listed(checkpoint_pb2.ListCheckpointsRequest(), metadata=(("weightd-token", token),), timeout=60)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED  # type: ignore[attr-defined]  # it is a call
            trailers = dict(caught.value.trailing_metadata())  # type: ignore[attr-defined]  # as above
            status = errors_pb2.Status.FromString(trailers["grpc-status-details-bin"])
            info = errors_pb2.ErrorInfo.FromString(status.details[0].value)
            assert (info.reason, info.metadata.get("refused", "")) == ("PERMISSION_DENIED", refused)
        assert listed(checkpoint_pb2.ListCheckpointsRequest(), metadata=(("weightd-token", peer.token),), timeout=60)
