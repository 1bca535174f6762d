"""Fetch a checkpoint: find what of it is on this node, receive the rest from peers, and hand all to a sink.

A sink says which tensors it wants and takes them batch by batch, so that only one batch is staged at a time.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from weightd._references.huggingface import cache_folder
from weightd.errors import FormatError, InvalidReferenceError, NotFoundError
from weightd_fleet.core.digests import is_fleet_name

from .hub_layout import HubRevision
from .local_blobs import BlobReaders, StateBlobs, published_files
from .requests import Fetched, FetchOrder
from .sink_files import FilesSink, PlainFolder
from .sink_memory import PART_BYTES, MemorySink
from .sources import FetchSources
from .staging import StagingFolder, staging

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from weightd.client import Client
    from weightd_fleet.core.manifest import FleetManifest
    from weightd_fleet.publishing.state import PublishedState

    from .addresses import AgentAddress
    from .local_blobs import PublishedFiles
    from .peer import Peer
    from .resident import HeldTensors, ResidentTensors


@dataclass(frozen=True)
class FetchingNode:
    """What a fetch uses of its node. Another fetch of the same checkpoint is waited for, up to `wait_seconds`."""

    state: PublishedState
    resident: ResidentTensors
    daemon: Callable[[], Client]
    peer: Callable[[AgentAddress], Peer]
    serves_at: str = ""
    wait_seconds: float = 3600.0
    part_bytes: int = PART_BYTES
    hub_cache: Path = field(default_factory=cache_folder)

    def serving_at(self, address: str) -> FetchingNode:
        """The node, which serves what it has at an address of HOST:PORT."""
        return replace(self, serves_at=address)


def fetch(
    node: FetchingNode,
    order: FetchOrder,
    advance: Callable[[int, int], None] = lambda done, total: None,
    note: Callable[[str], None] = lambda line: None,
) -> Fetched:
    """Fetch what is missing. `advance` is called with bytes received and bytes to receive; `note` with a line for each
    peer that is dropped.

    Errors: InvalidReferenceError, NotFoundError, DigestMismatchError and FormatError (no peer has the bytes),
    DaemonUnreachableError (no peer answers; or the daemon, for memory), DaemonBusyError, PermissionDeniedError,
    CapacityError (the disk, or the daemon's device, is full), and those of `Client.load_memory` and `Client.compose`.
    """
    if not is_fleet_name(order.digest):
        raise InvalidReferenceError(
            f"{order.digest[:80]!r} is not a checkpoint's name in a fleet, b3: and 64 hex digits"
        )
    sources = FetchSources(order.sources, node.peer, note, node.serves_at)
    with staging(node.state.folder / "staging", order.digest.removeprefix("b3:"), node.wait_seconds) as staged:
        manifest = _manifest(node.state, order.digest, sources)
        wanted = {row.digest: row.length for row in manifest.tensors if row.length}
        with (
            node.resident.hold(wanted, set(wanted.values())) as held,
            published_files(node.state, node.state.names(), wanted) as files,
        ):
            fetched = _fetch(node, order, manifest, sources, staged, held, files, advance)
        staged.remove()
    return fetched


def _fetch(
    node: FetchingNode,
    order: FetchOrder,
    manifest: FleetManifest,
    sources: FetchSources,
    staged: StagingFolder,
    held: HeldTensors,
    files: PublishedFiles,
    advance: Callable[[int, int], None],
) -> Fetched:
    name = order.local_name or (manifest.origin.repository if manifest.origin else manifest.name)
    small = _small_blobs(manifest)
    local = BlobReaders([staged, held, files, _KeptBlobs(node.state, manifest)])
    missing_small = {digest: length for digest, length in small.items() if digest not in local}
    with _sink(node, order, manifest, held, files, name) as sink:
        to_move = sum(length for digest, length in sink.wanted.items() if digest not in local)
        total = to_move + sum(missing_small.values())
        done = 0

        def received(count: int) -> None:
            nonlocal done
            done += count
            advance(done, total)

        sources.receive(manifest.name, missing_small, staged, received)
        moved = 0
        for batch in sink.batches():
            missing = {digest: length for digest, length in batch.items() if digest not in local}
            moved += sources.receive(manifest.name, missing, staged, received)
            sink.take(batch, local)
            for digest in batch:
                staged.drop(digest)
        sink.finish(local)
        blobs = [b"".join(local.pieces(digest)) for digest in small]
        if isinstance(sink, FilesSink) or manifest.name not in node.state.names():  # what was published keeps its files
            node.state.put(manifest, blobs, {"reference": name, "files": sink.sources()})
        return Fetched(
            digest=manifest.name,
            name=name,
            moved_bytes=moved,
            local_bytes=sum(sink.wanted.values()) - moved,
            small_bytes=sum(missing_small.values()),
            content_digest=sink.content_digest if isinstance(sink, MemorySink) else "",
            folder="" if isinstance(sink, MemorySink) else str(sink.folder),
        )


def _manifest(state: PublishedState, name: str, sources: FetchSources) -> FleetManifest:
    try:
        return state.manifest(name)
    except (NotFoundError, FormatError):
        return sources.manifest(name)


def _small_blobs(manifest: FleetManifest) -> dict[bytes, int]:
    """Digest and length of the frames and small files that have bytes."""
    frames = {file.frame: file.frame_bytes for file in manifest.files if file.frame_bytes}
    return frames | {small.digest: small.length for small in manifest.small_files if small.length}


class _KeptBlobs(StateBlobs):
    """Those frames and small files that the state folder has."""

    def __init__(self, state: PublishedState, manifest: FleetManifest) -> None:
        super().__init__(state, manifest)
        self._readable: dict[bytes, bool] = {}

    def __contains__(self, digest: bytes) -> bool:
        if super().__contains__(digest) and digest not in self._readable:
            try:
                self._state.blob(digest)
                self._readable[digest] = True
            except (NotFoundError, FormatError):
                self._readable[digest] = False
        return self._readable.get(digest, False)


@contextlib.contextmanager
def _sink(
    node: FetchingNode,
    order: FetchOrder,
    manifest: FleetManifest,
    held: HeldTensors,
    files: PublishedFiles,
    name: str,
) -> Iterator[MemorySink | FilesSink]:
    if order.sink == "memory":
        with node.daemon() as client:
            yield MemorySink(manifest, client, held, name, pin=order.pin, part_bytes=node.part_bytes)
        return
    if order.folder:
        layout: PlainFolder | HubRevision = PlainFolder(Path(order.folder).absolute())
    elif manifest.origin is not None:
        layout = HubRevision(node.hub_cache, manifest.origin)
    else:
        layout = PlainFolder(node.state.folder / "files" / manifest.name.removeprefix("b3:"))
    sink = FilesSink(manifest, layout, files)
    try:
        yield sink
    finally:
        sink.close()
