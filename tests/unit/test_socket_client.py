"""The client's end of the handle socket: what it makes of each answer, and when the connection is over."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import weightd
from support.answers import HELLO, Answers, Frame, failed, kinds
from weightd._proto.v1 import handles_pb2
from weightd._transport import handle_socket
from weightd._transport.handle_socket import ReceivedDescriptors, SocketClient, fit
from weightd._transport.protocol import MAX_FRAME
from weightd.errors import DaemonBusyError, InUseError, LeaseLostError

Reply = handles_pb2.HandleReply
DETACHED: Frame = (Reply(detach=handles_pb2.DetachReply(ended=True)), 0)
OFFERED = Reply(offer=handles_pb2.OfferReply(offer_id=5))
RECLAIM = handles_pb2.ReclaimRequest(lease=7)
Pair = tuple[socket.socket, socket.socket]

# Before the fixtures of a test, so that it looks when they have closed what is theirs.
pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def broken(client: SocketClient) -> list[str]:
    """What has been told of the connection's end, from now on."""
    told: list[str] = []
    client.on_broken = lambda: told.append("broken")
    return told


# -- hello -------------------------------------------------------------------------------------------------------------


def test_hello_names_the_connection(answers: Answers) -> None:
    client = answers.connect()
    assert (client.token, client.version) == ("t", "9.9")
    assert client.fileno() >= 0
    assert client.alive()
    client.close()
    assert client.fileno() == -1
    assert not client.alive()


@pytest.mark.parametrize("says", [b"\xff" * 9, Reply(), Reply(detach=handles_pb2.DetachReply())])
def test_whoever_does_not_say_hello_is_no_daemon(says: Reply | bytes, answers: Answers) -> None:
    says = says if isinstance(says, bytes) else says.SerializeToString() or b"\xa2\x06\x00"  # no frame is empty
    with pytest.raises(weightd.ProtocolMismatchError, match=f"{answers.path} does not speak weightd's protocol"):
        answers.connect(hello=says)


def test_a_daemon_that_refuses_a_connection_says_why(answers: Answers) -> None:
    with pytest.raises(weightd.PermissionDeniedError, match=r"^said so$"):
        answers.connect(hello=failed(weightd.PermissionDeniedError.reason))


def test_a_daemon_that_knows_no_read_only_connections_is_not_used(answers: Answers) -> None:
    """It would let everything be changed."""
    with pytest.raises(weightd.ProtocolMismatchError, match=r"is version 9\.9, which has no read-only connections"):
        answers.connect(read_only=True)
    assert answers.asked[0].hello.read_only


def test_a_daemon_that_knows_read_only_connections_is_used(answers: Answers) -> None:
    hello = Reply.FromString(HELLO.SerializeToString())
    hello.hello.read_only = True
    assert answers.connect(hello=hello, read_only=True).token == "t"


def test_a_daemon_of_another_user_at_the_users_own_address_is_not_used(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise weightd.PermissionDeniedError("not you")

    monkeypatch.setattr(handle_socket, "check_peer", refuse)
    with pytest.raises(weightd.PermissionDeniedError, match="not you"):
        answers.connect()
    assert answers.asked == []


# -- connecting --------------------------------------------------------------------------------------------------------


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[socket.socket]:
    """A listener at w.sock that has not accepted as many as may wait."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as first,
    ):
        listener.bind(str(tmp_path / "w.sock.handles"))
        listener.listen(0)
        first.connect(listener.getsockname())
        yield listener


def test_whoever_finds_others_waiting_waits_as_well(
    crowded: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted = []

    def accept(seconds: float) -> None:
        assert seconds > 0
        accepted.append(crowded.accept()[0])

    monkeypatch.setattr(handle_socket.time, "sleep", accept)
    monkeypatch.setattr(SocketClient, "_ask", lambda *_: HELLO)  # there is room, and that is all
    SocketClient(tmp_path / "w.sock", timeout=60).close()
    assert len(accepted) == 1
    accepted[0].close()


@pytest.mark.usefixtures("crowded")
def test_whoever_waits_in_vain_is_told_that_the_daemon_is_busy(tmp_path: Path) -> None:
    with pytest.raises(DaemonBusyError, match=r"does not answer within 0\.01 s"):
        SocketClient(tmp_path / "w.sock", timeout=0.01)


def test_where_there_is_no_daemon_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(weightd.DaemonUnreachableError, match="there is no such socket"):
        SocketClient(tmp_path / "w.sock", timeout=60)


def test_where_no_socket_can_be_made_the_limit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(weightd.ResourceLimitError, match="raise `ulimit -n`"):
        SocketClient(tmp_path / "w.sock", timeout=60)


# -- questions ---------------------------------------------------------------------------------------------------------


def test_a_daemon_that_hangs_up_ends_the_connection(answers: Answers) -> None:
    client = answers.connect()
    told = broken(client)
    with pytest.raises(weightd.DaemonUnreachableError, match="closed the connection"):
        client.detach(7)
    assert (told, client.alive()) == (["broken"], False)
    with pytest.raises(weightd.DaemonUnreachableError, match="closed the connection"):
        client.detach(7)


def test_an_answer_to_another_question_ends_the_connection(answers: Answers) -> None:
    client = answers.connect(DETACHED)
    told = broken(client)
    with pytest.raises(weightd.ServerError, match="the daemon answered detach to offer"):
        client.offer()
    assert (told, client.alive()) == (["broken"], False)


@pytest.mark.parametrize("says", [b"\xff" * 9, b"\xa2\x06\x00"])
def test_an_answer_that_is_none_ends_the_connection(says: bytes, answers: Answers) -> None:
    client = answers.connect((says, 0))
    told = broken(client)
    with pytest.raises(weightd.ProtocolMismatchError):
        client.detach(7)
    assert (told, client.alive()) == (["broken"], False)


@pytest.mark.parametrize("answer", [(bytes(MAX_FRAME + 1), 0), (DETACHED[0], 1)])
def test_an_answer_that_is_cut_off_ends_the_connection(answer: Frame, answers: Answers) -> None:
    """That is also how the kernel keeps back a descriptor."""
    client = answers.connect(answer)
    told = broken(client)
    with pytest.raises(weightd.ServerError, match="was cut off"):
        client.detach(7)
    assert (told, client.alive()) == (["broken"], False)


def test_ctrl_c_ends_the_connection(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next question would get this one's answer."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    client = answers.connect(DETACHED)
    told = broken(client)
    monkeypatch.setattr(handle_socket, "_receive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        client.detach(7)
    assert (told, client.alive()) == (["broken"], False)


def test_an_error_of_the_daemon_leaves_the_connection(answers: Answers) -> None:
    client = answers.connect((failed(InUseError.reason), 0), DETACHED)
    told = broken(client)
    with pytest.raises(InUseError):
        client.detach(7)
    assert client.detach(7)
    assert (told, client.alive()) == ([], True)


def test_a_connection_that_waits_for_an_answer_is_alive(answers: Answers) -> None:
    client = answers.connect()
    with client._lock:
        client._socket.close()  # whoever waits finds out
        assert client.alive()
    assert not client.alive()


# -- leases ------------------------------------------------------------------------------------------------------------


def test_nothing_is_said_in_the_midst_of_a_question_or_in_a_forked_child(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = answers.connect()
    with client._lock:
        assert not client.detach(7)
    monkeypatch.setattr(client, "_pid", os.getppid())
    assert not client.detach(7)
    assert kinds(answers.asked) == ["hello"]


def test_leases_that_have_ended_are_told_with_the_next_questions(answers: Answers) -> None:
    client = answers.connect(*[DETACHED] * 3)
    client.ended.extend(range(300))
    for _ in range(3):
        client.detach(7)
    told = [list(request.ended) for request in answers.asked[1:]]
    assert told == [list(range(256)), list(range(256, 300)), []]


def test_a_question_as_long_as_a_frame_tells_of_no_leases(answers: Answers) -> None:
    client = answers.connect((failed(InUseError.reason), 0))
    client.ended.extend(range(300))
    with pytest.raises(InUseError):
        client.attach(handles_pb2.AttachRequest(reference="x" * (MAX_FRAME - 100)))
    assert len(client.ended) == 300
    assert not answers.asked[-1].ended


@pytest.mark.parametrize("held", [True, False])
def test_a_lease_is_taken_up_again_where_the_daemon_knows_it(held: bool, answers: Answers) -> None:
    client = answers.connect((Reply(reclaim=handles_pb2.ReclaimReply(held=held)), 0))
    assert client.reclaim(RECLAIM) is held


def test_a_daemon_that_hangs_up_at_a_claim_does_not_take_leases_up(answers: Answers) -> None:
    """An older one does not know the question."""
    with pytest.raises(LeaseLostError, match="does not take leases up again"):
        answers.connect().reclaim(RECLAIM)


def test_a_busy_daemon_may_be_asked_again(answers: Answers) -> None:
    client = answers.connect((failed(DaemonBusyError.reason), 0))
    with pytest.raises(DaemonBusyError):
        client.reclaim(RECLAIM)


# -- offers ------------------------------------------------------------------------------------------------------------


def test_an_offer_comes_with_its_intake(pair: Pair, answers: Answers) -> None:
    ours, theirs = pair
    number, intake = answers.connect((OFFERED, [theirs.fileno()])).offer()
    with intake:
        intake.send(b"file")
        assert (number, ours.recv(9)) == (5, b"file")


@pytest.mark.parametrize("descriptors", [0, 1])
def test_an_offer_without_its_intake_is_refused(descriptors: int, answers: Answers) -> None:
    """The one descriptor is no socket."""
    client = answers.connect((OFFERED, descriptors))
    with pytest.raises(weightd.ServerError, match=f"came with {descriptors} descriptors, and not with its intake"):
        client.offer()


def test_an_offer_with_more_than_its_intake_is_refused(pair: Pair, answers: Answers) -> None:
    client = answers.connect((OFFERED, [end.fileno() for end in pair]))
    with pytest.raises(weightd.ServerError, match="came with 2 descriptors, and not with its intake"):
        client.offer()


# -- manifests ---------------------------------------------------------------------------------------------------------


def received(says: int, data: bytes = b"manifest") -> ReceivedDescriptors:
    manifest = os.memfd_create("manifest")
    os.write(manifest, data)
    return ReceivedDescriptors(handles_pb2.AttachReply(manifest_bytes=says), manifest, manifest, [])


def test_a_manifest_is_read_in_as_many_parts_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    got, pread = received(8), os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, at: pread(descriptor, min(size, 3), at))
    assert got.read_manifest() == b"manifest"
    os.close(got.manifest)


@pytest.mark.parametrize("says", [-1, 0, 9, 1 << 40])
def test_a_manifest_that_cannot_be_as_long_as_it_says_is_refused(says: int) -> None:
    got = received(says)
    with pytest.raises(weightd.ServerError, match=f"cannot have the {says} bytes"):
        got.read_manifest()
    os.close(got.manifest)


def test_a_manifest_that_ends_while_it_is_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    got, pread = received(8), os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, at: b"" if at else pread(descriptor, 3, at))
    with pytest.raises(weightd.ServerError, match="a manifest of 3 bytes, and said 8"):
        got.read_manifest()
    os.close(got.manifest)


def test_a_lease_file_is_mapped_by_the_page() -> None:
    got = received(8)
    assert got.lease_bytes == 8
    got.reply.lease_file = True
    assert got.lease_bytes == os.sysconf("SC_PAGESIZE")
    os.close(got.manifest)


def test_a_request_too_long_for_a_frame_names_no_tensors() -> None:
    request = handles_pb2.AttachRequest(reference="m", components=["unet"])
    assert fit(request)
    assert request.components == ["unet"]
    request.tensors.extend(handles_pb2.TensorKey(name="x" * 100) for _ in range(700))
    assert fit(request)
    assert (list(request.components), list(request.tensors)) == ([], [])
    assert not fit(handles_pb2.AttachRequest(reference="x" * MAX_FRAME))
