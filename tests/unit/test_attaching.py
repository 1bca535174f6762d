"""The handle socket over real books, in this process: what attaches, detaches and claims bring, and what they leave."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from support.attaching import ATTACH, Client, Counter, Request, at_the_counter
from support.descriptors import open_descriptors
from support.kept_books import PEER
from weightd._proto.v1 import checkpoint_pb2, handles_pb2
from weightd.errors import InvalidReferenceError
from weightd_daemon.core.lease import LeasePeer
from weightd_daemon.core.principal import Principal
from weightd_daemon.handles import handle_server
from weightd_daemon.handles.attach import sources_from


@pytest.fixture
def counter() -> Iterator[Counter]:
    """A server over books that hold "a"; no lease is left at the end."""
    made = Counter()
    yield made
    for client in made.clients:
        client.close()
    assert made.held() == []
    made.books.end()


@at_the_counter
async def test_a_lease_is_held_while_its_descriptor_is_open(counter: Counter) -> None:
    client, other = await counter.come(), await counter.come()
    attached = await client.attach()
    assert (attached.lease_file, attached.descriptors, len(client.descriptors)) == (True, 3, 3)
    assert counter.attaches == ["OK"]
    detach = handles_pb2.DetachRequest(lease=attached.lease)
    assert not (await client.ask(detach=detach)).detach.ended
    client.let_go()
    assert not (await other.ask(detach=detach)).detach.ended, "that is not for others to ask"
    assert (await client.ask(detach=detach)).detach.ended
    assert (await client.ask(detach=detach)).detach.ended


@at_the_counter
async def test_what_was_finished_for_a_client_waits_no_more_when_it_attaches_or_leaves(counter: Counter) -> None:
    client = await counter.come()
    (connection,) = counter.connections._by_token.values()
    for _ in range(2):
        counter.store.leases.begin(counter.checkpoint.key, connection.peer, 1.0, waiting=True)
    await client.attach(handles_pb2.AttachRequest(reference="a", manifest_only=True))
    assert len(counter.store.leases.waiting_of(connection.number)) == 2, "to look changes nothing"
    await client.attach()
    assert counter.store.leases.waiting_of(connection.number) == []
    counter.store.leases.begin(counter.checkpoint.key, connection.peer, 1.0, waiting=True)
    client.close()
    while len(counter.connections):  # noqa: ASYNC110  # nobody tells
        await asyncio.sleep(0)
    assert counter.held() == []


@at_the_counter
async def test_a_client_claims_a_lease_that_an_earlier_daemon_gave(counter: Counter) -> None:
    """And nothing else: not one that waits or has ended, of another content, or of somebody else."""
    client = await counter.come()
    attached = await client.attach()
    key, leases = counter.checkpoint.key, counter.store.leases
    waiting = leases.begin(key, PEER, 1.0, waiting=True)
    alien = leases.begin(key._replace(domain="uid-7"), PEER, 1.0)

    async def claim(lease: int, device: str = "host", content_digest: str = key.content_digest) -> bool:
        request = handles_pb2.ReclaimRequest(lease=lease, device=device, content_digest=content_digest)
        return (await client.ask(reclaim=request)).reclaim.held

    assert await claim(attached.lease)
    assert not await claim(999)
    assert not await claim(waiting.number)
    assert not await claim(attached.lease, device="GPU-0")
    assert not await claim(attached.lease, content_digest="sha256:0")
    assert not await claim(alien.number), "its lock is on no manifest that is there"
    leases.attribute(attached.lease, LeasePeer(9, 9, 12345, "somebody"))
    assert not await claim(attached.lease)
    leases.end(waiting.number)
    client.let_go()
    leases.attribute(attached.lease, LeasePeer(9, 9, os.geteuid(), "we, before"))
    assert not await claim(attached.lease), "it has ended"


@at_the_counter
async def test_files_are_attached_where_a_load_of_them_would_go(counter: Counter) -> None:
    client = await counter.come()
    there = handles_pb2.AttachRequest(sources={"sources": [{"file": "f.safetensors"}]})
    anywhere = handles_pb2.AttachRequest(sources=there.sources, manifest_only=True)
    assert await client.refused(attach=there) == "NOT_FOUND"
    counter.resident["host"] = counter.checkpoint
    await client.attach(there)
    await client.attach(anywhere)
    counter.resident = {"GPU-0": counter.checkpoint}
    assert await client.refused(attach=there) == "NOT_FOUND"
    await client.attach(anywhere)
    counter.attacher._default_device = ""
    counter.resident["host"] = counter.checkpoint
    assert await client.refused(attach=anywhere) == "INVALID_REFERENCE", "who asks has to say which"
    await client.attach(ATTACH)
    assert await client.refused(attach=handles_pb2.AttachRequest()) == "INVALID_REFERENCE"


@pytest.mark.parametrize(
    ("sources", "why"),
    [
        ([("", "f", False)] * 2, "file 'f' is named twice"),
        ([("c", "f", False)] * 2, "file 'c/f' is named twice"),
        ([("", "", False)], "file name '': must have 1 to"),
        ([("c\n", "f", False)], r"component name 'c\\n': must have 0 to"),
        ([("", str(at), False) for at in range(10_001)], "the request names 10001 files"),
        ([("", "i", True), ("", "f", False)], "a file comes after an index"),
        ([("", "f", False), ("", "i", True), ("", "j", True)], "a component has two indexes"),
        ([("", "f", False), ("c", "i", True)], "component 'c' has an index and no other file"),
    ],
)
def test_files_that_cannot_be(sources: list[tuple[str, str, bool]], why: str) -> None:
    messages = [checkpoint_pb2.SourceFile(component=c, file=f, is_index=i) for c, f, i in sources]
    with pytest.raises(InvalidReferenceError, match=why):
        sources_from(messages)


@pytest.mark.parametrize(
    ("failure", "reason", "code"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "RESOURCE_LIMIT", "RESOURCE_EXHAUSTED"),
        (OSError(errno.EIO, "Input/output error"), "INTERNAL", "INTERNAL"),
        (ZeroDivisionError(), "INTERNAL", "INTERNAL"),
        (ConnectionResetError(), "", "CANCELLED"),
    ],
)
@pytest.mark.parametrize("where", ["lock", "send"])
def test_an_attach_that_fails_leaves_no_lease(
    where: str, failure: Exception, reason: str, code: str, counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the books nor in the kernel; the connection goes on, unless it is what failed."""

    def fail(*_: object) -> Any:
        raise failure

    @at_the_counter
    async def play(counter: Counter) -> None:
        client = await counter.come()
        send = handle_server._Conversation._send
        with monkeypatch.context() as patch:
            if where == "lock":
                patch.setattr(counter.books.locks, "lock", fail)
            else:
                patch.setattr(
                    handle_server._Conversation, "_send",
                    lambda peer, reply, descriptors=(): fail() if descriptors else send(peer, reply),
                )  # fmt: skip
            if reason:
                assert await client.refused(attach=ATTACH) == reason
            else:
                client.socket.send(Request(attach=ATTACH).SerializeToString())
                await client.closed()
        assert counter.attaches == [code]
        if where == "send" or isinstance(failure, OSError):  # a bug leaves that to the sweep
            assert len(counter.store.leases) == 0
        assert counter.held() == []
        if reason:
            await client.attach()

    play(counter)


def test_what_was_finished_for_a_client_waits_on_when_its_attach_does_not_go_out(
    counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another load could evict it before the client, which is told to try again, does so."""
    send = handle_server._Conversation._send

    def fail(peer: Any, reply: handles_pb2.HandleReply, descriptors: Sequence[int] = ()) -> None:
        if descriptors:
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        send(peer, reply)

    @at_the_counter
    async def play(counter: Counter) -> None:
        client = await counter.come()
        (connection,) = counter.connections._by_token.values()
        waiting = counter.store.leases.begin(counter.checkpoint.key, connection.peer, 1.0, waiting=True)
        with monkeypatch.context() as patch:
            patch.setattr(handle_server._Conversation, "_send", fail)
            assert await client.refused(attach=ATTACH) == "RESOURCE_LIMIT"
        assert counter.held() == [waiting.number]
        attached = await client.attach()
        assert counter.held() == [attached.lease]

    play(counter)


@pytest.fixture
def in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lease and manifest fill the first message, and the segment comes in a second one."""
    monkeypatch.setattr(handle_server, "MAX_DESCRIPTORS", 2)


@pytest.mark.usefixtures("in_batches")
@at_the_counter
async def test_segments_that_do_not_fit_come_when_the_first_were_acknowledged(counter: Counter) -> None:
    client = await counter.come()
    await client.attach()
    assert len(client.descriptors) == 2
    batch = (await client.ask(ack=handles_pb2.BatchAck())).batch
    assert (batch.descriptors, len(client.descriptors)) == (1, 3)
    client.socket.send(Request(ack=handles_pb2.BatchAck()).SerializeToString())
    await client.closed()  # an acknowledgement for nothing


async def descriptors_are(number: int) -> None:
    """So many are open, or will be: a lease file stays for a second after its last lease, and the next is another."""
    while len(open_descriptors()) != number:  # noqa: ASYNC110  # nobody is told of it
        await asyncio.sleep(0.05)


@pytest.mark.usefixtures("in_batches")
@at_the_counter
async def test_another_request_before_the_acknowledgement_ends_the_connection(counter: Counter) -> None:
    await counter.attach_in_batches()
    client = await counter.come()
    before = len(open_descriptors())
    await client.attach()
    client.let_go()
    client.socket.send(Request(attach=ATTACH).SerializeToString())
    await client.closed()
    await descriptors_are(before - 1)  # without that of the connection, and what was not sent is closed


@pytest.mark.usefixtures("in_batches")
def test_no_acknowledgement_in_time_ends_the_connection(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle_server, "ACK_SECONDS", 0.01)

    @at_the_counter
    async def play(counter: Counter) -> None:
        client = await counter.come()
        await client.attach()
        await client.closed()

    play(counter)


@pytest.mark.usefixtures("in_batches")
def test_what_waits_for_an_acknowledgement_is_closed_when_the_rest_fails(
    counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = handle_server._Conversation._send

    def fail(peer: Any, reply: handles_pb2.HandleReply, descriptors: Sequence[int] = ()) -> None:
        if descriptors:
            raise OSError(errno.EMFILE, "Too many open files")
        send(peer, reply)

    @at_the_counter
    async def play(counter: Counter) -> None:
        await counter.attach_in_batches()
        client = await counter.come()
        before = len(open_descriptors())
        with monkeypatch.context() as patch:
            patch.setattr(handle_server._Conversation, "_send", fail)
            assert await client.refused(attach=ATTACH) == "RESOURCE_LIMIT"
        await descriptors_are(before)
        await client.attach()

    play(counter)


def test_a_peer_that_does_not_say_hello_is_hung_up_on(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle_server, "HELLO_SECONDS", 0.01)

    @at_the_counter
    async def play(counter: Counter) -> None:
        silent = Client(counter.server)
        counter.clients.append(silent)
        await silent.closed()
        assert len(counter.connections) == 0

    play(counter)


@at_the_counter
async def test_a_peer_that_reads_no_answers_is_hung_up_on(counter: Counter) -> None:
    client = await counter.come()
    client.socket.setblocking(True)
    frame = Request(attach=handles_pb2.AttachRequest(reference="n" * 500)).SerializeToString()

    def flood() -> None:
        for _ in range(100_000):
            client.socket.send(frame)

    with pytest.raises(ConnectionError):
        await asyncio.to_thread(flood)
    assert set(counter.attaches) == {"NOT_FOUND"}


def test_a_connection_may_end_while_its_attach_waits_for_a_lease_file(
    counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = asyncio.Event()

    async def wait() -> None:
        waiting.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(counter.books.locks, "room", lambda _: wait())

    @at_the_counter
    async def play(counter: Counter) -> None:
        client = await counter.come()
        client.socket.send(Request(attach=ATTACH).SerializeToString())
        await waiting.wait()
        counter.server.stop()
        await client.closed()
        assert (counter.attaches, len(counter.connections)) == ([], 0)

    play(counter)


@at_the_counter
async def test_offers_are_taken_or_end_with_their_connection(counter: Counter) -> None:
    client = await counter.come()
    numbers = [(await client.ask(offer=handles_pb2.OfferRequest())).offer.offer_id for _ in range(2)]
    (connection,) = counter.connections._by_token.values()
    assert counter.connections.by_token(connection.token) is connection
    assert counter.connections.offers_of(os.geteuid()) == 2
    os.close(connection.pop_offer(numbers[0]))
    counter.server.stop()
    assert connection.offers == {}
    assert os.read(client.descriptors[1], 1) == b"", "the daemon's end is closed"


def test_a_user_has_so_many_leases_and_what_waits_for_the_attach_is_one_of_them(
    counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counter.connections, "who", lambda _: Principal(os.geteuid(), admin=False, domain=""))

    @at_the_counter
    async def play(counter: Counter) -> None:
        client = await counter.come()
        (connection,) = counter.connections._by_token.values()
        counter.limits.leases = 1
        counter.store.leases.begin(counter.checkpoint.key, connection.peer, 1.0, waiting=True)
        attached = await client.attach()
        assert await client.refused(attach=ATTACH) == "CAPACITY"
        client.let_go()
        assert (await client.ask(detach=handles_pb2.DetachRequest(lease=attached.lease))).detach.ended
        await client.attach()

    play(counter)


@at_the_counter
async def test_a_loop_that_wakes_for_nothing_and_a_second_end_change_nothing(counter: Counter) -> None:
    """What ends a connection may come while it ends: its deadline, the end of the server, or another frame."""
    client = await counter.come()
    (conversation,) = counter.server._peers
    conversation._guard(conversation._serve_frame)
    await client.attach()
    conversation.close("once")
    conversation.close("twice")
    await client.closed()


@at_the_counter
async def test_many_who_break_the_protocol_are_one_line_in_the_log(counter: Counter) -> None:
    for _ in range(3):
        client = await counter.come()
        client.socket.send(b"\xff")
        await client.closed()
    assert counter.server._nonsense._more == 2


@pytest.mark.usefixtures("in_batches")
@at_the_counter
async def test_handles_that_are_no_descriptors_come_in_batches_too(counter: Counter) -> None:
    """Those of CUDA IPC are bytes, and there is nothing to close."""
    counter.books.device.shared = lambda _: b"ipc"  # type: ignore[method-assign]  # as devices/cuda_ipc.py
    client, other = await counter.come(), await counter.come()
    for one in (client, other):
        assert (await one.attach()).handles == []
    batch = (await client.ask(ack=handles_pb2.BatchAck())).batch
    assert (list(batch.handles), batch.descriptors) == ([b"ipc"], 0)
