"""Peers that read no answer: they keep no turn, no loader and no lease, and in the end not their call either."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.daemon import Daemon, eventually
from support.http2 import Unreading
from support.launch import launcher
from support.wire import Peer
from weightd._proto.v1.checkpoint_pb2 import GetCheckpointRequest, VerifyCheckpointRequest
from weightd._proto.v1.daemon_pb2 import WatchEventsRequest
from weightd_daemon.monitoring.event_stream import MOST_READERS

StartDaemon = Callable[..., Daemon]
MIB = 1 << 20
VERIFY = "/weightd.v1.CheckpointService/Verify"
WATCH = "/weightd.v1.DaemonService/WatchEvents"
FOLLOW = WatchEventsRequest(follow=True).SerializeToString()
VICTIM = VerifyCheckpointRequest(reference="victim").SerializeToString()
ENDED = "its answer was not read in"


def loaded(daemon: Daemon, tmp_path: Path) -> weightd.Client:
    daemon.command("load", checkpoints.write_random(tmp_path / "victim.safetensors", 4, MIB), "--name=victim")
    return daemon.connect()


def test_verifications_end_without_a_reader(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Six of them, and two turns: each would have kept one for ever."""
    daemon = start_daemon(max_loads=2, max_user_loads=2)
    client = loaded(daemon, tmp_path)
    with Peer(daemon.socket) as peer, Unreading(daemon.socket) as unreading:
        for _ in range(6):
            unreading.call(VERIFY, VICTIM, peer.token)
        daemon.command("load", checkpoints.write_random(tmp_path / "other.safetensors", 1, 1000, seed="other"))
        eventually(lambda: client.leases() == [], what="the leases of all verifications end")
        client.remove("victim")


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        (VERIFY, VICTIM),
        ("/weightd.v1.CheckpointService/List", b""),
        ("/weightd.v1.DaemonService/GetStats", b""),
        (WATCH, FOLLOW),
        ("/weightd.v1.CheckpointService/Get", GetCheckpointRequest(reference="victim").SerializeToString()),
    ],
)
def test_a_call_ends_whose_answer_nobody_reads(
    start_daemon: StartDaemon, tmp_path: Path, method: str, request_: bytes
) -> None:
    daemon = start_daemon(argv=launcher(unread=0.5))
    client = loaded(daemon, tmp_path)
    with Peer(daemon.socket) as peer, Unreading(daemon.socket) as unreading:
        for _ in range(3):
            unreading.call(method, request_, peer.token)
        eventually(lambda: daemon.logged().count(ENDED) == 3, what="the deadline of each")
        client.verify("victim")
    client.verify("victim")
    assert daemon.logged().count(ENDED) == 3


def test_readers_of_events_that_read_none_make_room(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(argv=launcher(unread=2.0))
    client = loaded(daemon, tmp_path)
    with Peer(daemon.socket) as peer, Unreading(daemon.socket) as unreading:
        for _ in range(MOST_READERS):
            unreading.call(WATCH, FOLLOW, peer.token)
        eventually(lambda: not follows(client), what="nobody else may follow")
        eventually(lambda: follows(client), what="room for those who read")


def follows(client: weightd.Client) -> bool:
    """Whether events can be followed."""
    events = client.events(follow=True)
    try:
        next(events)
    except weightd.InUseError:
        return False
    finally:
        events.close()
    return True


def test_readers_that_take_their_time_between_answers_lose_nothing(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """The deadline is for an answer that waits, not for the call: a follower may wait long for the next event."""
    daemon = start_daemon(argv=launcher(unread=0.2))
    client = loaded(daemon, tmp_path)
    events = client.events(follow=True)
    seen = [next(events).kind for _ in range(3)]
    passed = threading.Event()
    threading.Timer(1.0, passed.set).start()
    while not passed.is_set():
        client.version()
    client.remove("victim")
    while seen[-1] != "evicted":
        seen.append(next(events).kind)
    assert ENDED not in daemon.logged()
