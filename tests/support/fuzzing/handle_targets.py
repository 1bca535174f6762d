"""The handle socket, on either end: a daemon with one checkpoint, and a client that a hostile daemon answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from support.kept_books import DATA, Books, Keeper
from weightd import _fused
from weightd._manifest import Manifest
from weightd._proto.v1 import handles_pb2
from weightd._transport.handle_socket import SocketClient, feed
from weightd.attachment import Attachment
from weightd.errors import InvalidReferenceError, NotFoundError, ServerError, WeightdError, from_wire
from weightd.types import TensorKey
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.handles.attach import AttachHandler
from weightd_daemon.handles.connections import HandleSocketConnections
from weightd_daemon.handles.handle_server import HandleServer
from weightd_daemon.handles.manifest_file import make_sealed

from .scripts import frames_of
from .target import HungUpError, Target

_SEGMENT_BYTES = 4096
_MOST_DESCRIPTORS = 253
_TURNS = 200
"""Steps of the loop in which an answer that comes at all has come: nothing here waits for a thread or a process."""


class _Log(logging.Handler):
    """The lines that a logger wrote in the last block; they go nowhere else. A traceback is a fault."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._logger = logging.getLogger(name)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        self.lines.clear()
        propagates, self._logger.propagate = self._logger.propagate, False
        self._logger.addHandler(self)
        try:
            yield
        finally:
            self._logger.removeHandler(self)
            self._logger.propagate = propagates

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        assert record.exc_info is None, self.format(record)


class _Server:
    """A daemon's end of the handle socket over real books, with the checkpoint "a" in them. One for the process."""

    def __init__(self) -> None:
        self.log = _Log("weightd_daemon.handles.handle_server")
        self.books = Books(Keeper())
        self.books.load("a", DATA["a"])
        self.connections = HandleSocketConnections(isolated=False, admins=frozenset())
        self.loop = asyncio.new_event_loop()
        loads = SimpleNamespace(disconnected=lambda _: None, untaken=lambda _: 0, find_resident=lambda _: None)
        self.server = HandleServer(
            connections=self.connections,
            attacher=AttachHandler(
                store=self.books.store, catalog=self.books.catalog, loads=cast("Any", loads),
                manifests=self.books.manifests, locks=self.books.locks, connections=self.connections,
                devices={"host": self.books.device}, default_device="host", limits=UserLimits(), now=lambda: 9.0,
            ),
            max_connections=4,
            on_attach=lambda *_: None,
        )  # fmt: skip
        self.server._nonsense = cast("Any", SimpleNamespace(may_log=lambda: True))

    def serve(self, data: bytes) -> list[handles_pb2.HandleReply]:
        with self.log.listening():
            return self.loop.run_until_complete(self._serve(data))

    async def _serve(self, data: bytes) -> list[handles_pb2.HandleReply]:
        theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        replies: list[handles_pb2.HandleReply] = []
        with theirs, ours:
            self.server._enter(theirs)
            for frame in frames_of(data):
                lent = [ours.fileno()] * min(frame.descriptors, _MOST_DESCRIPTORS)
                with contextlib.suppress(OSError):  # it has hung up
                    socket.send_fds(ours, [frame.data], lent)
                await self._hear(ours, replies)
            self.server.stop()
        self.books.store.leases.refresh()
        return replies

    async def _hear(self, ours: socket.socket, replies: list[handles_pb2.HandleReply]) -> None:
        for _ in range(_TURNS):
            await asyncio.sleep(0)
            try:
                answer, descriptors, _, _ = socket.recv_fds(ours, 1 << 17, _MOST_DESCRIPTORS)
            except BlockingIOError:
                continue
            except OSError:
                return
            for descriptor in descriptors:
                os.close(descriptor)
            if not answer:
                return
            replies.append(handles_pb2.HandleReply.FromString(answer))


@cache
def _server() -> _Server:
    return _Server()


def serve_frames(data: bytes) -> list[str]:
    """What a daemon answers to a script of frames. Errors: HungUpError, else the last error that it answered."""
    server = _server()
    replies = server.serve(data)
    assert len(server.connections) == 0, "a connection is left"
    if server.log.lines:
        raise HungUpError(server.log.lines[0])
    for reply in reversed(replies):
        if reply.HasField("error"):
            raise from_wire(reply.error.reason, reply.error.message, dict(reply.error.metadata))
    return [str(reply.WhichOneof("body")) for reply in replies]


class _HostileDaemon:
    """Answers each connection with a script of frames, whatever it is asked. One for the process."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="weightd-fuzz-")
        self.path = Path(self._folder.name) / "w.sock"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"{self.path}.handles")
        self._listener.listen()
        self.script = b""
        self._done = threading.Semaphore(0)
        self._manifest = make_sealed("fuzz-manifest", valid_manifest())
        self._segment = make_sealed("fuzz-segment", bytes(_SEGMENT_BYTES))
        threading.Thread(target=self._run, daemon=True).start()

    @contextlib.contextmanager
    def answering(self, data: bytes) -> Iterator[Path]:
        self.script = data
        yield self.path
        assert self._done.acquire(timeout=60), "the client did not connect"

    def _run(self) -> None:
        while True:
            connected, _ = self._listener.accept()
            with connected, contextlib.suppress(OSError):
                for frame in frames_of(self.script):
                    lent = [self._manifest, *[self._segment] * _MOST_DESCRIPTORS]
                    socket.send_fds(connected, [frame.data], lent[: min(frame.descriptors, _MOST_DESCRIPTORS)])
                connected.shutdown(socket.SHUT_WR)
                while connected.recv(1 << 17):
                    pass
            self._done.release()


@cache
def _hostile_daemon() -> _HostileDaemon:
    return _HostileDaemon()


def hear_replies(data: bytes) -> int:
    """What a client makes of a script of replies: to hello, an attach, an offer, a claim and a detach.

    Errors: WeightdError.
    """
    with _hostile_daemon().answering(data) as path:
        client = SocketClient(path, 5.0)
        client_ended = SimpleNamespace(hold=lambda *_: None, detach=lambda _: True)
        try:
            received = client.attach(handles_pb2.AttachRequest(reference="a"))
            with Attachment(received, cast("Any", client_ended)) as attachment:
                size = sum(len(attachment.buffer(key.name, key.component)) for key in attachment.tensors)
                assert len(attachment.views) <= len(attachment.tensors)
            _, intake = client.offer()
            with intake:
                feed(intake, [], 5.0)
            client.reclaim(handles_pb2.ReclaimRequest(lease=1))
            client.detach(1)
        finally:
            client.close()
    return size


def read_manifest(data: bytes) -> int:
    """What a client makes of a manifest. Errors: ServerError, NotFoundError, InvalidReferenceError."""
    manifest = Manifest(data)
    assert len(manifest.files) <= len(data)
    tensors = manifest.tensors
    attached = {TensorKey(info.component, info.name): info for info in tensors}
    _fused.views(manifest.views, tensors, attached, {})
    for info in tensors[:1]:
        assert manifest.select([info.component], [])
        assert info in manifest.rows(manifest.select([], [TensorKey(info.component, info.name)]))
    for number, info in enumerate(tensors):
        assert info == manifest.row(number)
        assert not info.length or info.offset + info.length <= manifest.segment_bytes[info.segment]
    return len(tensors)


def valid_manifest() -> bytes:
    """A manifest of two tensors in one segment and a view of both; the smallest with every column."""
    return handles_pb2.Manifest(
        form=1, content_digest="sha256:" + "7" * 64, device="host", kind="host", components=["", "unet"],
        files=[{"component": 0, "file": "m.safetensors", "metadata": {"k": "v"}, "has_metadata": True}],
        segment_bytes=[_SEGMENT_BYTES], names=["q", "k"], file_indices=[0, 0], dtypes=[handles_pb2.DTYPE_U8] * 2,
        ranks=[2, 2], dimensions=[1, 256, 1, 256], segments=[0, 0], offsets=[0, 256], lengths=[256, 256],
        variants=[0, 0], digests=bytes(32),
        views=[{"name": "qk", "component": 0, "members": [0, 1], "shape": [2, 256]}],
    ).SerializeToString()  # fmt: skip


FRAMES = Target(
    serve_frames,
    (WeightdError, HungUpError),
    ("weightd_daemon.handles.handle_server", "weightd_daemon.handles.attach", "weightd_daemon.handles.entrance"),
)
REPLIES = Target(
    hear_replies, (WeightdError,), ("weightd._transport.handle_socket", "weightd.attachment"), passes_on=True
)
MANIFEST = Target(
    read_manifest,
    (ServerError, NotFoundError, InvalidReferenceError),
    ("weightd._manifest", "weightd._fused", "weightd.layouts"),
)
