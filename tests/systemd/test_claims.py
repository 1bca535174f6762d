"""The library's side of a restart: it waits for the end of the daemon, and tells the next one what it holds."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.daemon import Daemon, eventually
from support.manager import Manager
from support.worker import Worker
from weightd._proto.v1 import handles_pb2
from weightd._transport.connection import DaemonConnection

StartDaemon = Callable[..., Daemon]
Spawn = Callable[[Daemon], Worker]

THREADS = "result = [t.name for t in __import__('threading').enumerate() if t.name == 'weightd-line']"


def holders(client: weightd.Client) -> list[int | None]:
    return sorted((lease.pid for lease in client.leases() if not lease.waiting), key=lambda pid: pid or 0)


def restart(daemon: Daemon) -> weightd.Client:
    daemon.kill()
    daemon.start()
    return daemon.connect()


@pytest.fixture
def served(start_daemon: StartDaemon, manager: Manager, tmp_path: Path) -> Daemon:
    """A daemon whose descriptors are kept, with the checkpoint "a"."""
    daemon = start_daemon(manager=manager)
    daemon.connect().load(checkpoints.write_random(tmp_path / "a.safetensors", 3, 100_000, "a"), name="a")
    return daemon


def test_one_thread_from_the_first_attach_on_and_it_says_all_leases(served: Daemon, spawn: Spawn) -> None:
    worker = spawn(served)
    worker.run("import weightd\nclients = [weightd.connect(timeout=60) for _ in range(3)]\nclients[0].ping()")
    assert worker.run(THREADS) == []
    worker.run("attachments = [client.attach('a') for client in clients for _ in range(2)]")
    assert worker.run(THREADS) == ["weightd-line"]
    for _ in range(2):
        client = restart(served)
        eventually(lambda: holders(client) == [worker.pid] * 6, what="six leases are claimed")  # noqa: B023  # called here
    worker.run("for attachment in attachments[::2]: attachment.close()")
    eventually(lambda: holders(client) == [worker.pid] * 3, what="each client tells of its own")
    assert worker.run(THREADS) == ["weightd-line"]


def test_it_waits_for_a_daemon_that_takes_its_time(served: Daemon, spawn: Spawn) -> None:
    worker = spawn(served)
    worker.run(
        "import weightd\nclient = weightd.connect(timeout=60)\nkept = client.attach('a')\ntensor = kept.buffer('t1')"
    )
    worker.run("kept.drop(); del kept")
    served.kill()
    failing = "try: client.ping()\nexcept weightd.DaemonUnreachableError: result = 'unreachable'"
    assert worker.run(failing) == "unreachable"  # which closes the connection that the thread waits on
    assert worker.run("import hashlib; result = hashlib.sha256(tensor).hexdigest()")
    served.start()
    client = served.connect()
    eventually(lambda: holders(client) == [worker.pid], what="the tensor's lease is claimed")
    worker.run("del tensor")
    assert holders(client) == []


def test_who_has_closed_the_client_holds_and_says_nothing(served: Daemon, spawn: Spawn) -> None:
    worker = spawn(served)
    worker.run("import weightd\nclient = weightd.connect(timeout=60)\nattachment = client.attach('a')\nclient.close()")
    client = restart(served)
    worker.run("import time; time.sleep(0.5)")
    assert holders(client) == [None]
    worker.kill()
    assert holders(client) == []


def test_a_forked_child_has_no_such_thread_and_its_parent_goes_on(served: Daemon, spawn: Spawn) -> None:
    worker = spawn(served)
    worker.run("import os, threading, weightd\nclient = weightd.connect(timeout=60)\nattachment = client.attach('a')")
    source = (
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    from weightd._transport import connection\n"
        "    alone = threading.active_count() == 1 and connection._watcher is None\n"
        "    mine = weightd.connect(timeout=60).attach('a')\n"
        "    os._exit(0 if alone and connection._watcher is not None else 1)\n"
        "result = os.waitpid(pid, 0)[1]"
    )
    assert worker.run(source) == 0
    client = restart(served)
    eventually(lambda: holders(client) == [worker.pid], what="the parent claims its lease")


def test_the_thread_lives_on_when_the_next_daemon_refuses(short_path: Path) -> None:
    """One of another protocol, say, between two that agree: the thread is there for every line of the process."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{short_path}/w.sock.handles")
    listener.listen()
    refused = handles_pb2.HandleReply()
    refused.error.reason, refused.error.message = "INVALID_REFERENCE", "this client speaks another protocol"
    agreed = handles_pb2.HandleReply(hello=handles_pb2.HelloReply(protocol=1, token="t", version="0"))
    held = handles_pb2.HandleReply(reclaim=handles_pb2.ReclaimReply(held=True))
    peers: list[socket.socket] = []

    def serve() -> None:
        for replies in ([agreed], [refused], [agreed, held]):
            peers.append(listener.accept()[0])
            for reply in replies:
                peers[-1].recv(1000)
                peers[-1].sendall(reply.SerializeToString())

    with listener:
        server = threading.Thread(target=serve, daemon=True)
        server.start()
        connection = DaemonConnection(short_path / "w.sock", 5.0)
        mapping = type("Mapping", (), {})()
        connection.hold(7, "sha256:0", "host", mapping)
        eventually(lambda: peers, what="it is connected")
        peers[0].close()
        server.join(60)
        eventually(lambda: len(peers) == 3 and connection.handles.alive(), what="it has come back")
        assert list(connection.live()) == [7]
        connection.close()
        for peer in peers:
            peer.close()


def test_a_daemon_that_does_not_know_claims_is_used_without(short_path: Path) -> None:
    """It hangs up on what it does not know; so would a connection that has to claim each time."""
    seen: list[str] = []
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{short_path}/w.sock.handles")
    listener.listen()

    def serve() -> None:
        for _ in range(3):
            peer, _ = listener.accept()
            threading.Thread(target=answer, args=(peer,), daemon=True).start()

    def answer(peer: socket.socket) -> None:
        with peer:
            while data := peer.recv(1000):
                kind = handles_pb2.HandleRequest.FromString(data).WhichOneof("body")
                seen.append(str(kind))
                if kind != "hello":
                    return
                hello = handles_pb2.HelloReply(protocol=1, token="t", version="0")
                peer.sendall(handles_pb2.HandleReply(hello=hello).SerializeToString())

    with listener:
        threading.Thread(target=serve, daemon=True).start()
        connection = DaemonConnection(short_path / "w.sock", 5.0)
        mapping = type("Mapping", (), {})()
        connection.hold(7, "sha256:0", "host", mapping)
        first = connection.handles
        first._socket.shutdown(socket.SHUT_RDWR)  # as when the daemon has ended
        eventually(
            lambda: connection.handles is not first and connection.handles.alive(),
            what="the thread has renewed it",
        )
        assert seen == ["hello", "hello", "reclaim", "hello"]
        assert connection.live() == {}
        connection.close()
