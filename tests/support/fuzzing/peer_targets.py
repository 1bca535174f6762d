"""PeerService between nodes, on either end, and the manifest that travels there."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError

from support import checkpoints
from support.agents import NO_DAEMON, published
from weightd.errors import FormatError, WeightdError, from_wire
from weightd_fleet._proto.v1 import peer_pb2
from weightd_fleet.agent.addresses import AgentAddress
from weightd_fleet.agent.agent import NodeSettings, fetching_node
from weightd_fleet.agent.peer import Peer
from weightd_fleet.agent.peer_service import PeerService
from weightd_fleet.agent.requests import Fetched, FetchOrder
from weightd_fleet.agent.serving import ReadAdmission, ServedBlobs
from weightd_fleet.core.manifest import FleetManifest
from weightd_fleet.publishing.state import PublishedState

from .scripts import frames_of
from .target import HungUpError, Target

_ROW_BYTES = 1000
_CALLS = (
    ("WatchInventory", peer_pb2.WatchInventoryRequest),
    ("GetManifest", peer_pb2.GetManifestRequest),
    ("ReadRows", peer_pb2.ReadRowsRequest),
    ("Fetch", peer_pb2.FetchRequest),
)


class _AbortedError(Exception):
    """The call was aborted, as gRPC has it."""


class _Context:
    """What a servicer sees of a call."""

    def __init__(self) -> None:
        self.trailers: dict[str, str] = {}

    def set_trailing_metadata(self, trailers: Any) -> None:
        self.trailers = dict(trailers)

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        assert code is not grpc.StatusCode.INTERNAL, details
        raise _AbortedError(details)

    def is_active(self) -> bool:
        return False

    def cancel(self) -> None:
        pass


class Served:
    """A node's state with a checkpoint of two rows. One for the process."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="weightd-fuzz-")
        folder = Path(self._folder.name)
        model = checkpoints.write_random(folder / "m" / "model.safetensors", 2, _ROW_BYTES)
        (folder / "m" / "config.json").write_text("{}")
        self.name = published(folder / "state", model.parent)
        self.manifest: FleetManifest = PublishedState(folder / "state").manifest(self.name)
        self._stack = contextlib.ExitStack()
        node = self._stack.enter_context(fetching_node(NodeSettings(str(folder / "state"), str(NO_DAEMON))))
        self.service = PeerService(ServedBlobs(node.state, node.resident), ReadAdmission(2), _fetch, secure=False)

    @property
    def wanted(self) -> list[tuple[bytes, int]]:
        """Digests and lengths of the rows."""
        return [(row.digest, row.length) for row in self.manifest.tensors]


def _fetch(order: FetchOrder, _: Any) -> Fetched:
    return Fetched(order.digest, order.local_name, 0, 0, 0)


@cache
def served() -> Served:
    """The served node."""
    return Served()


def answer_request(data: bytes) -> int:
    """What an agent answers: the first byte chooses a call, the rest is its request. Returns the number of answers.

    Errors: WeightdError, as the caller sees it; DecodeError (gRPC refuses such a request itself).
    """
    name, message = _CALLS[(data[0] if data else 0) % len(_CALLS)]
    request = message.FromString(data[1:])
    context = _Context()
    try:
        return sum(1 for _ in getattr(served().service, name)(request, cast("Any", context)))
    except _AbortedError as error:
        raise from_wire(context.trailers["weightd-reason"], str(error)) from None


def hear_peer(data: bytes) -> int:
    """What a node makes of a peer's answers: a script that is read as an inventory, a manifest and rows in turn.

    Returns how many bytes of rows it was given. Errors: FormatError and others of WeightdError.
    """
    frames = [frame.data for frame in frames_of(data)]
    peer: Any = Peer.__new__(Peer)
    peer.address, peer._patience = AgentAddress("127.0.0.1", 1), 5.0
    peer._stub = SimpleNamespace(
        WatchInventory=lambda *_, **__: _Answers(peer_pb2.Inventory, frames[:1]),
        GetManifest=lambda *_, **__: _Answers(peer_pb2.ManifestPiece, frames[1:2]),
        ReadRows=lambda *_, **__: _Answers(peer_pb2.RowPiece, frames[2:]),
    )
    taken = 0
    try:
        for entry in peer.inventory():
            assert isinstance(entry.name, str)
        assert peer.manifest(served().name).name == served().name
        wanted = served().wanted
        got = [0] * len(wanted)
        for row, piece in peer.rows(served().name, wanted, ""):
            got[row] += len(piece)
            taken += len(piece)
            assert got[row] <= wanted[row][1]
    except DecodeError:
        raise HungUpError("gRPC refuses the message") from None
    assert got == [length for _, length in wanted]
    return taken


class _Answers:
    """A call's answers, decoded as gRPC does."""

    def __init__(self, message: Any, frames: list[bytes]) -> None:
        self._message = message
        self._frames = frames

    def __iter__(self) -> Iterator[Any]:
        return (self._message.FromString(frame) for frame in self._frames)

    def cancel(self) -> None:
        pass


def read_fleet_manifest(data: bytes) -> FleetManifest:
    """A manifest of a fleet. Errors: FormatError."""
    manifest = FleetManifest.decode(data)
    assert manifest.encoded == data
    for file in manifest.files:
        pieces = manifest.pieces(file)
        assert sum(piece.length for piece in pieces) == file.size
    return manifest


FLEET_MANIFEST = Target(read_fleet_manifest, (FormatError,), ("weightd_fleet.core",))
PEER_ANSWERS = Target(hear_peer, (WeightdError, HungUpError), ("weightd_fleet.agent.peer", "weightd_fleet.core"))
PEER_REQUESTS = Target(answer_request, (WeightdError, DecodeError), ("weightd_fleet.agent",))
