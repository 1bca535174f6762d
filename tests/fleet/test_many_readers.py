"""Several fetches at once: one at a time of a checkpoint on a node, and a limited number of readers at a source."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from support import checkpoints
from support.agents import Receiver, agent, published
from support.daemon import eventually
from support.hostile_peer import HostilePeer, hostile_peer
from weightd.errors import DaemonBusyError, DaemonUnreachableError
from weightd_fleet._proto.v1 import peer_pb2, peer_pb2_grpc
from weightd_fleet.agent import serving
from weightd_fleet.agent.addresses import AgentAddress
from weightd_fleet.agent.peer import Peer
from weightd_fleet.agent.peer_errors import PeerBusyError
from weightd_fleet.agent.requests import Fetched
from weightd_fleet.agent.serving import ReadAdmission

SIZE, ROWS = 3000, 4
Pieces = Iterator[Any]


@pytest.fixture
def digest(tmp_path: Path) -> str:
    model = checkpoints.write_random(tmp_path / "m" / "model.safetensors", ROWS, SIZE)
    return published(tmp_path / "source", model)


def test_two_fetches_of_one_checkpoint_move_it_once(digest: str, tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(_: HostilePeer, pieces: Pieces) -> Pieces:
        begun.set()
        assert go_on.wait(60)
        yield from pieces

    with hostile_peer(tmp_path / "source", slow) as (address, _), ThreadPoolExecutor(2) as pool:
        fetches = [pool.submit(Receiver(tmp_path / "receiver").fetch, digest, address) for _ in range(2)]
        assert begun.wait(60)
        go_on.set()
        moved = sorted(one.result(60).moved_bytes for one in fetches)
    assert moved == [0, ROWS * SIZE]


def test_admission() -> None:
    reads = ReadAdmission(1, watchers=1)
    one, two = AgentAddress("10.0.0.1", 1), AgentAddress("10.0.0.2", 1)
    with reads.admitted("m", one), pytest.raises(PeerBusyError) as raised, reads.admitted("m", two):
        pass
    assert raised.value.sources == ()
    with reads.admitted("n", None), pytest.raises(PeerBusyError) as raised, reads.admitted("m", two):
        pass
    assert raised.value.sources == (one,)
    with pytest.raises(RuntimeError), reads.admitted("m", two):
        raise RuntimeError
    with reads.admitted("m", None), pytest.raises(PeerBusyError) as raised, reads.admitted("m", one):
        pass
    assert raised.value.sources == (), "a reader that failed, or asks itself, is named"
    with reads.admitted("o", AgentAddress("0.0.0.0", 7411)):
        pass
    with reads.admitted("o", None), pytest.raises(PeerBusyError) as raised, reads.admitted("o", two):
        pass
    assert raised.value.sources == (), "nobody can connect to that"
    with reads.watching(), pytest.raises(DaemonBusyError), reads.watching():
        pass


def test_who_has_read_is_remembered_for_so_many_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client may ask for any number of them."""
    monkeypatch.setattr(serving, "_MAX_NAMES", 2)
    reads = ReadAdmission(1)
    reader, asking = AgentAddress("10.0.0.1", 1), AgentAddress("10.0.0.2", 1)
    for name in ("a", "b", "a", "c"):
        with reads.admitted(name, reader):
            pass
    with reads.admitted("d", None):
        for name, sources in (("a", (reader,)), ("b", ()), ("c", (reader,))):
            with pytest.raises(PeerBusyError) as raised, reads.admitted(name, asking):
                pass
            assert raised.value.sources == sources, name


def test_nodes_fill_from_each_other(digest: str, tmp_path: Path) -> None:
    """The source serves one reader at a time; who has read serves those that are refused."""
    nodes = 5
    with ExitStack() as stack:
        source, service = stack.enter_context(hostile_peer(tmp_path / "source", readers=1))
        agents = [stack.enter_context(agent(tmp_path / f"n{number}")) for number in range(nodes)]

        def fetch(address: AgentAddress) -> int:
            order = peer_pb2.FetchRequest(name=digest, sources=[str(source)], sink=peer_pb2.SINK_FILES)
            with Peer(address, None) as peer:
                *_, last = peer.fetch(order, 60.0)
            return int(last.result.moved_bytes)

        first = fetch(agents[0].address)
        held = threading.Event()
        reading = threading.Event()

        def hold(_: HostilePeer, pieces: Pieces) -> Pieces:
            admitted = next(pieces)
            reading.set()
            assert held.wait(60)
            yield admitted
            yield from pieces

        service.distort = hold
        with ThreadPoolExecutor(nodes) as pool:
            blocked = pool.submit(Receiver(tmp_path / "blocked").fetch, digest, source)
            assert reading.wait(60)
            moved = list(pool.map(fetch, [one.address for one in agents[1:]]))
            held.set()
            assert blocked.result(60).moved_bytes == ROWS * SIZE
        assert [first, *moved] == [ROWS * SIZE] * nodes


def test_fetches_for_clients_leave_an_agent_able_to_answer(digest: str, tmp_path: Path) -> None:
    """A fetch may take hours, and each holds a thread of the server's while its client waits."""
    go_on, begun, refused = threading.Event(), threading.Semaphore(0), threading.Semaphore(0)

    def fetch(*_: Any) -> Fetched:
        begun.release()
        assert go_on.wait(60)
        return Fetched(digest, "m", 0, 0, 0)

    def ask(address: AgentAddress) -> bool:
        order = peer_pb2.FetchRequest(name=digest, sources=["127.0.0.1:1"], sink=peer_pb2.SINK_MEMORY)
        try:
            with Peer(address, None) as peer:
                return [event.result.digest for event in peer.fetch(order, 60.0)] == [digest]
        except DaemonBusyError:
            refused.release()
            return False

    with hostile_peer(tmp_path / "source", fetch=fetch) as (address, _), ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(ask, address) for _ in range(40)]
        try:
            assert all(begun.acquire(timeout=60) for _ in range(16))
            with Peer(address, None) as peer:
                assert [entry.name for entry in peer.inventory()] == [digest]
            assert all(refused.acquire(timeout=60) for _ in range(24))
        finally:
            go_on.set()
        assert sum(one.result(60) for one in asked) == 16


def test_a_reader_that_does_not_read_is_cut_off(tmp_path: Path) -> None:
    model = checkpoints.write_random(tmp_path / "m" / "model.safetensors", 1, 64 << 20)
    digest = published(tmp_path / "source", model)
    with hostile_peer(tmp_path / "source", readers=1) as (address, service):
        service.read_seconds = 0.5
        with Peer(address, None) as peer, grpc.insecure_channel(str(address)) as channel:
            (row,) = peer.manifest(digest).tensors
            call = peer_pb2_grpc.PeerServiceStub(channel).ReadRows(
                peer_pb2.ReadRowsRequest(name=digest, digests=[row.digest])
            )
            next(call)

            def admitted() -> bool:
                try:
                    next(peer.rows(digest, [(row.digest, row.length)], ""))
                except (DaemonBusyError, DaemonUnreachableError):
                    return False
                return True

            eventually(admitted)
            call.cancel()


def test_the_inventory_is_followed(digest: str, tmp_path: Path) -> None:
    with hostile_peer(tmp_path / "source") as (address, _), grpc.insecure_channel(str(address)) as channel:
        stub = peer_pb2_grpc.PeerServiceStub(channel)
        call = stub.WatchInventory(peer_pb2.WatchInventoryRequest(follow=True), timeout=60)
        assert [entry.name for entry in next(call).entries] == [digest]
        other = published(
            tmp_path / "source", checkpoints.write_random(tmp_path / "o" / "model.safetensors", 1, SIZE, "other")
        )
        assert {entry.name for entry in next(call).entries} == {digest, other}
        stub.Drain(peer_pb2.DrainRequest())
        assert next(call).draining
        call.cancel()
