"""Peers that read no answer: they keep no turn, no loader and no lease, and in the end no place among readers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import weightd
from support import checkpoints
from support.daemon import Daemon, eventually
from support.http2 import Unreading
from support.launch import launcher
from support.wire import Peer
from weightd._proto.v1.checkpoint_pb2 import VerifyCheckpointRequest
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


def test_a_peer_that_leaves_an_answer_unread_is_no_error(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """gRPC says that a write has failed before it says that the peer has gone, or after that."""
    daemon = start_daemon()
    client = loaded(daemon, tmp_path)
    for _ in range(10):
        with Peer(daemon.socket) as peer, Unreading(daemon.socket) as unreading:
            for _ in range(6):
                unreading.call(VERIFY, VICTIM, peer.token)
            eventually(lambda: client.leases() == [], what="each of them has something to read")
    client.verify("victim")
    assert "Traceback" not in daemon.logged()


def test_readers_of_events_that_read_none_make_room(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(argv=launcher(unread=0.5))
    client = loaded(daemon, tmp_path)
    with Peer(daemon.socket) as peer, Unreading(daemon.socket) as unreading:
        for _ in range(MOST_READERS):
            unreading.call(WATCH, FOLLOW, peer.token)
        eventually(lambda: daemon.logged().count(ENDED) == MOST_READERS, what="each of them had a place, and is ended")
        eventually(lambda: follows(client), what="room for those who read")


def test_a_reader_that_was_away_for_too_long_is_told_so(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(argv=launcher(unread=0.5))
    client = loaded(daemon, tmp_path)
    with Peer(daemon.socket) as peer, Unreading(daemon.socket) as unreading:
        watch = unreading.call(WATCH, FOLLOW, peer.token)
        eventually(lambda: ENDED in daemon.logged(), what="the deadline")
        status = unreading.read(watch)
        assert b"was not read in 0.5 s; call again" in status, status
    client.verify("victim")


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
