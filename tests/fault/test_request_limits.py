"""What is asked for without a right to it, too often, or at too great length: refused before anything is received."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import weightd
from support.daemon import Daemon, eventually
from support.launch import launcher
from support.wire import Peer
from weightd._proto.v1 import (
    checkpoint_pb2,
    checkpoint_pb2_grpc,
    composition_pb2,
    composition_pb2_grpc,
    daemon_pb2,
    daemon_pb2_grpc,
    handles_pb2,
)
from weightd_daemon.api import admission, grpc_server

StartDaemon = Callable[..., Daemon]
MIB = 1 << 20
UNBOUND = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]


@contextlib.contextmanager
def channel(daemon: Daemon) -> Iterator[grpc.Channel]:
    """A channel of its own, which sends whatever it is given."""
    with grpc.insecure_channel(f"unix:{daemon.socket}", options=UNBOUND) as made:
        yield made


def outcome(call: Callable[[], Any]) -> tuple[str, str]:
    """The code and the text of a call."""
    try:
        answer = call()
        if not hasattr(answer, "DESCRIPTOR"):
            list(answer)
    except grpc.RpcError as error:
        failed: Any = error
        return failed.code().name, failed.details()
    return "OK", ""


def many(
    daemon: Daemon,
    ask: Callable[[Any], Any],
    made: Callable[[grpc.Channel], Any] = checkpoint_pb2_grpc.CheckpointServiceStub,
    each: int = 8,
) -> Counter[str]:
    """How calls end that are made on 8 channels at once, so many on each."""

    def some(_: int) -> list[str]:
        with channel(daemon) as own:
            stub = made(own)
            return [outcome(lambda: ask(stub))[0] for _ in range(each)]

    with ThreadPoolExecutor(8) as threads:
        return Counter(code for codes in threads.map(some, range(8)) for code in codes)


def heavy(size: int) -> checkpoint_pb2.LoadRequest:
    """A load's request of about that many bytes, of a list of files."""
    files = [checkpoint_pb2.SourceFile(file=f"{n:06}".ljust(1000, "f")) for n in range(size // 1007)]
    return checkpoint_pb2.LoadRequest(offer_id=1, sources=files)


def test_calls_without_a_token_cost_no_memory(daemon: Daemon) -> None:
    daemon.connect().version()
    before = daemon.rss()
    for request, each in ((heavy(7 * MIB), 8), (heavy(60 * MIB), 2)):
        ended = many(daemon, lambda stub, request=request: stub.Load(request), each=each)
        assert ended == {"PERMISSION_DENIED": 8 * each}
        assert daemon.rss() < before + 20 * MIB
    with channel(daemon) as own, Peer(daemon.socket) as peer:  # a token, and nothing offered
        load = checkpoint_pb2_grpc.CheckpointServiceStub(own).Load
        metadata = (("weightd-token", peer.token),)
        assert outcome(lambda: load(heavy(7 * MIB), metadata=metadata))[0] == "ABORTED"
        peer.ask(offer=handles_pb2.OfferRequest())
        assert outcome(lambda: load(heavy(60 * MIB), metadata=metadata))[0] == "RESOURCE_EXHAUSTED"
    assert daemon.rss() < before + 20 * MIB


def test_compositions_that_cannot_be_cost_no_memory(daemon: Daemon) -> None:
    """A list of tensors without their shapes: what is too long is not received, and the rest is let go of.

    All that was received is 448 MiB; what Python keeps between other things is much less.
    """
    daemon.connect().version()
    before = daemon.rss()
    refused = {"INVALID_ARGUMENT", "FAILED_PRECONDITION"}
    for size, codes, each in ((7 * MIB, refused, 8), (60 * MIB, {"RESOURCE_EXHAUSTED"}, 2)):
        request = composition_pb2.ComposeRequest(names=[f"{n:06}".ljust(1000, "t") for n in range(size // 1003)])
        with Peer(daemon.socket) as peer:
            options = {"metadata": (("weightd-token", peer.token),), "timeout": 60}
            ended = many(
                daemon, lambda stub, r=request, o=options: stub.Compose(r, **o),
                composition_pb2_grpc.CompositionServiceStub, each,
            )  # fmt: skip
        assert ended.keys() <= codes
    eventually(lambda: daemon.rss() < before + 120 * MIB, what="no request is left")
    assert daemon.connect().checkpoints() == []


def test_long_references_cost_no_memory_and_are_refused_first(daemon: Daemon) -> None:
    client = daemon.connect()
    client.version()
    before = daemon.rss()
    for length in (1_000_000, 30_000_000):
        with Peer(daemon.socket) as peer:
            request = checkpoint_pb2.GetCheckpointRequest(reference="x" * length)
            metadata = (("weightd-token", peer.token),)
            codes = many(daemon, lambda stub, r=request, m=metadata: stub.Get(r, metadata=m, timeout=60))
        assert codes == {"INVALID_ARGUMENT" if length < 8 * MIB else "RESOURCE_EXHAUSTED": 64}
    eventually(lambda: daemon.rss() < before + 20 * MIB, what="its memory is back")
    for call in (client.inspect, client.pin, client.unpin, client.remove, client.verify, client.attach):
        with pytest.raises(weightd.InvalidReferenceError) as caught:
            call("\u20ac" * 342)
        shown = "\u20ac" * 80
        assert str(caught.value).startswith(f"reference '{shown}…': has 1026 bytes, and may have 1024")
    with pytest.raises(weightd.NotFoundError):
        client.inspect("x" * 1024)


def test_a_load_whose_list_is_too_long_is_told_so_before_it_is_sent(daemon: Daemon) -> None:
    client = daemon.connect()
    with pytest.raises(weightd.InvalidReferenceError, match=r"files and the groups take \d+ bytes, and a load may"):
        client._rpc().load(heavy(9 * MIB), lambda: None, None)


def test_what_is_no_request_is_answered(daemon: Daemon) -> None:
    with channel(daemon) as own, Peer(daemon.socket) as peer:
        get = own.unary_unary("/weightd.v1.CheckpointService/Get")
        code, text = outcome(lambda: get(b"\xff" * 10, metadata=(("weightd-token", peer.token),)))
    assert (code, text) == ("INVALID_ARGUMENT", "the 10 bytes that were sent are no request of this call")


def test_connections_on_the_control_socket_are_bounded_and_silent_ones_end(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(max_connections=10)
    most = 10 + grpc_server.CONNECTIONS_OF_OTHERS
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(4 * most)]
        for one in silent:
            one.connect(str(daemon.socket))
            one.settimeout(60)

        def closed(one: socket.socket) -> bool:
            try:
                while one.recv(4096):
                    pass
            except ConnectionResetError:
                pass
            return True

        assert daemon.descriptors() <= daemon.baseline + most + 3
        assert all(map(closed, silent)), "none of them is kept"
    assert daemon.connect().version().pid == daemon.pid


def test_streams_without_a_token_are_bounded(daemon: Daemon) -> None:
    client = daemon.connect()
    client.version()
    ours = [("grpc.use_local_subchannel_pool", 1)]
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(grpc.insecure_channel(f"unix:{daemon.socket}", options=ours)) for _ in range(2)]
        streams = []
        for number in range(admission.MAX_CALLS_WITHOUT_TOKEN):
            watch = health_pb2_grpc.HealthStub(made[number % 2]).Watch(health_pb2.HealthCheckRequest(), timeout=60)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            streams.append(watch)
        check = health_pb2_grpc.HealthStub(made[0]).Check
        code, text = outcome(lambda: check(health_pb2.HealthCheckRequest(), timeout=60))
        assert (code, text.partition(";")[0]) == (
            "UNAVAILABLE", "64 calls of callers without a token are under way, and no more may be"
        )  # fmt: skip
        assert client.checkpoints() == [], "with a token one is served"
        for stream in streams:
            stream.cancel()
        eventually(lambda: outcome(lambda: check(health_pb2.HealthCheckRequest(), timeout=60))[0] == "OK")


def test_calls_of_one_connection_are_bounded(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        peer, other = stack.enter_context(Peer(daemon.socket)), stack.enter_context(Peer(daemon.socket))
        health = health_pb2_grpc.HealthStub(stack.enter_context(channel(daemon)))
        stubs = [health, health_pb2_grpc.HealthStub(stack.enter_context(channel(daemon)))]
        token = (("weightd-token", peer.token),)
        for number in range(admission.MAX_CALLS_OF_CONNECTION):
            watch = stubs[number % 2].Watch(health_pb2.HealthCheckRequest(), timeout=60, metadata=token)
            next(watch)
            stack.callback(watch.cancel)
        books = daemon_pb2_grpc.DaemonServiceStub(stack.enter_context(channel(daemon)))
        ask = daemon_pb2.GetStatsRequest()
        code, text = outcome(lambda: books.GetStats(ask, timeout=60, metadata=token))
        assert (code, "128 calls of this connection" in text) == ("UNAVAILABLE", True), text
        assert outcome(lambda: books.GetStats(ask, timeout=60, metadata=(("weightd-token", other.token),)))[0] == "OK"


def test_who_sends_no_request_holds_up_only_their_own(start_daemon: StartDaemon) -> None:
    """A call is let in, but what it asks for does not come: it ends, and others are answered meanwhile."""
    daemon = start_daemon(argv=launcher(read=1.0))
    waiting = threading.Event()

    def nothing() -> Iterator[bytes]:
        waiting.wait(60)
        yield from ()

    with channel(daemon) as own, Peer(daemon.socket) as peer:
        get = own.stream_unary("/weightd.v1.CheckpointService/Get")
        token = (("weightd-token", peer.token),)
        late = [get.future(nothing(), metadata=token, timeout=60) for _ in range(admission.READERS)]
        health = health_pb2_grpc.HealthStub(own)
        assert outcome(lambda: health.Check(health_pb2.HealthCheckRequest(), timeout=60))[0] == "OK"
        for call in late:
            code, text = outcome(call.result)
            assert (code, "did not arrive within" in text) == ("UNAVAILABLE", True), (code, text)
        waiting.set()


def test_idle_streams_of_requests_hold_nobody_up(daemon: Daemon) -> None:
    """Reflection's may send another request at any time: that is no request that does not come."""
    waiting = threading.Event()

    def one() -> Iterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        waiting.wait(60)

    with channel(daemon) as own:
        reflect = reflection_pb2_grpc.ServerReflectionStub(own).ServerReflectionInfo
        streams = [reflect(one(), timeout=60) for _ in range(admission.READERS)]
        for stream in streams:
            assert next(stream).list_services_response.service
        health = health_pb2_grpc.HealthStub(own)
        assert outcome(lambda: health.Check(health_pb2.HealthCheckRequest(), timeout=60))[0] == "OK"
        assert all(stream.is_active() for stream in streams), "none of them had to end before"
        waiting.set()
        for stream in streams:
            stream.cancel()
