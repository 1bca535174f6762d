"""Restores the state of an earlier daemon: reads the root record, adopts segments, checks manifests, fills the store.

Nothing is trusted. A row that is not understood, a descriptor that is missing or not what it should be, a manifest that
does not fit: each is left, with a line in the log, and with it what depends on it. But processes may still read what is
left. So a segment that has bytes of it is *frozen*: it is neither filled nor punched, until all of it can go.
"""

from __future__ import annotations

import logging
import math
import os
import re
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from weightd._manifest import Manifest
from weightd._transport.protocol import MAX_MANIFEST_BYTES
from weightd.errors import DeviceError, ServerError
from weightd.types import FileIdentity, SourceFile
from weightd_daemon.core.adoption import BlobPlace, CheckpointDescription, StoreAdoption, number_uses
from weightd_daemon.core.catalog import CONTROL, NAME_BYTES, Catalog, CatalogTag
from weightd_daemon.core.checkpoint import CheckpointKey
from weightd_daemon.core.digest import BlobIdentity
from weightd_daemon.core.lease import NOBODY
from weightd_daemon.core.manifest import ContentFile, ContentTensor
from weightd_daemon.handles.connections import NO_UID
from weightd_daemon.handles.manifest_file import is_manifest
from weightd_daemon.handles.manifests import ManifestHandles
from weightd_daemon.handles.segment_table import HandleSegmentTable
from weightd_daemon.log_line import Line

from .root_record import SCHEMA

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from weightd_daemon.core.store import ContentStore
    from weightd_daemon.devices.device import Device

    from .given import GivenDescriptors

log = logging.getLogger(__name__)

_U64 = (1 << 64) - 1
_I64 = 1 << 63
_MOST_SECONDS = 253_402_300_800
"""The year 10,000, which nothing can show."""
_MOST_NAMES = 8
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SCHEMA_KEYS = {"schema", "last_id", "last_lease", "segments", "checkpoints", "names"}
_CANNOT_BE = (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError, struct.error, ServerError)
"""What checking something that is not what it should be may raise."""


class _Segment(NamedTuple):
    """A row of the root record, and the number under which the device has adopted it."""

    device: str
    domain: str
    size: int
    frozen: bool
    number: int


class _Restore:
    """One adoption: the books and devices, and what has been found so far."""

    def __init__(
        self,
        given: GivenDescriptors,
        store: ContentStore,
        catalog: Catalog,
        devices: Mapping[str, Device],
        manifests: ManifestHandles,
    ) -> None:
        self.given = given
        self.store = store
        self.catalog = catalog
        self.devices = devices
        self.manifests = manifests
        self.segments: dict[int, _Segment] = {}
        self.frozen: set[int] = set()
        self.kept: dict[CheckpointKey, int] = {}
        self.uses: dict[CheckpointKey, tuple[int, float]] = {}
        self.adoptions: dict[str, StoreAdoption] = {}

    def adopt(self, row: Mapping[str, Any]) -> None:
        """Take over a segment. Errors: of _CANNOT_BE, DeviceError."""
        number, uuid = _number(row["id"]), _text(row["device"])
        descriptor, size = self.given.descriptors.get(f"seg.{number}"), _number(row["size"])
        device = self.devices.get(uuid)
        if device is None or device.kind != row["kind"] or not device.lasting:
            raise ValueError(f"{uuid} is not served here as {row['kind']!r}")
        if descriptor is None or descriptor in self.given.taken or number in self.segments:
            raise ValueError("its descriptor is not there")
        if not size or size % device.page:
            raise ValueError(f"{size} bytes are no whole pages")
        adopted = device.adopt(descriptor, size)
        self.given.taken.add(descriptor)
        frozen = row.get("frozen") is not False  # also where that is not said
        self.segments[number] = _Segment(uuid, _text(row["domain"]), size, frozen, adopted)

    def checkpoint(self, row: Mapping[str, Any]) -> None:
        """Restore a checkpoint. Errors: of _CANNOT_BE; then nothing has changed."""
        key = CheckpointKey(_text(row["device"]), _text(row["domain"]), _text(row["content"]))
        if not _DIGEST.fullmatch(key.content_digest):
            raise ValueError("its content digest is none")
        number = _number(row["manifest"])
        descriptor = self.given.descriptors.get(f"man.{number}")
        if descriptor is None or descriptor in self.given.taken:
            raise ValueError("its manifest is not there")
        segments = [self.segments[_number(one)] for one in row["segments"]]
        if any((segment.device, segment.domain) != key[:2] for segment in segments):
            raise ValueError("a segment is of another device or domain")
        device = self.devices[key.device]
        described, table = _read_manifest(descriptor, key, device.kind, segments)
        owner, loaded, last_used = _uid(row["owner"]), _seconds(row["loaded"]), _seconds(row["last_used"])
        used = _number(row.get("used", 0))  # a daemon before this one had the time only
        pins = {_uid(one) for one in row["pins"]}
        origin, sources = _files(row["origin"]), [_files(one) for one in row["sources"]]
        reference = _text(row.get("reference", ""))
        adoption = self.adoptions.get(key.device)
        if adoption is None:
            here = (segment for segment in self.segments.values() if segment.device == key.device)
            sizes = {segment.number: segment.size for segment in here}
            adoption = self.adoptions[key.device] = StoreAdoption(self.store, sizes)
        checkpoint = adoption.add(key, described, owner, loaded)
        checkpoint.segments = [segment.number for segment in segments]
        checkpoint.last_used = last_used
        for uid in pins:
            self.store.index.pin(checkpoint, uid)
        self.uses[key] = used, last_used
        checkpoint.origin, checkpoint.reference = origin, reference
        self.store.index.add_sources(checkpoint, sources)
        self.given.taken.add(descriptor)
        self.manifests.add(key, descriptor, table, number=number)
        self.kept[key] = number

    def listed(self, row: Mapping[str, Any]) -> set[int]:
        """The segments of a checkpoint that cannot be restored: where its row does not tell, any of them."""
        listed: object = row.get("segments")
        if isinstance(listed, list) and listed and all(isinstance(one, int) for one in listed):
            return {*listed}
        return {*self.segments}

    def name(self, row: Mapping[str, Any]) -> None:
        """Restore a name. Errors: of _CANNOT_BE."""
        name, content = _text(row["name"]), _text(row["content"])
        if not 1 <= len(name.encode()) <= NAME_BYTES or CONTROL.search(name) or not _DIGEST.fullmatch(content):
            raise ValueError("it cannot be given")
        # Where the record does not say which names were only paths, those that look so are taken for that.
        is_default = row["default"] is True if "default" in row else name.startswith("/")
        self.catalog.restore(_text(row["domain"]), name, CatalogTag(content, _uid(row["owner"]), is_default))

    def finish_segments(self) -> dict[tuple[str, int], int]:
        """Enter the segments that restored checkpoints need, release the rest. Returns what is kept as what."""
        found: dict[tuple[str, int], int] = {}
        for number, segment in self.segments.items():
            adoption, device = self.adoptions.get(segment.device), self.devices[segment.device]
            taken = adoption.taken.get(segment.number) if adoption else None
            if taken is None:
                device.release(segment.number)
                continue
            self.store.memories[segment.device].adopt(
                segment.domain, segment.number, segment.size, taken, device.hollow(segment.number),
                frozen=segment.frozen or number in self.frozen,
            )  # fmt: skip
            found[segment.device, segment.number] = number
        return found


def restore(
    given: GivenDescriptors,
    *,
    store: ContentStore,
    catalog: Catalog,
    devices: Mapping[str, Device],
    manifests: ManifestHandles,
    last_lease: int,
    now: float,
) -> tuple[dict[tuple[str, int], int], dict[CheckpointKey, int]]:
    """Fill empty books with what a root record names. Returns the numbers under which segments and manifests are kept.

    What is left is not in `given.taken`. A root record of another schema is understood as far as its rows are; what
    else it may place in segments nobody knows, so all of them are frozen.
    """
    body = given.body
    state = _Restore(given, store, catalog, devices, manifests)
    foreign = body.get("schema") != SCHEMA
    if foreign:
        unknown = ", ".join(sorted(map(str, body.keys() - _SCHEMA_KEYS))) or "nothing"
        log.warning("the root record has schema %s, not %d: left are %s, and rows that are not understood",
                    body.get("schema"), SCHEMA, unknown)  # fmt: skip
    for row in _rows(body, "segments"):
        try:
            state.adopt(row)
        except (*_CANNOT_BE, DeviceError) as error:
            log.warning("segment %s is left: %s", row.get("id"), _why(error))
    for row in _rows(body, "checkpoints"):
        try:
            state.checkpoint(row)
        except _CANNOT_BE as error:
            what = {"content": str(row.get("content"))[:19], "device": row.get("device")}
            why = f"is left: {_why(error)}; load it again"
            log.warning(Line("checkpoint", _names(body, row).strip(), what, why))
            state.frozen |= state.listed(row)
    number_uses(store, state.uses)
    if foreign:
        state.frozen |= {*state.segments}
    segments = state.finish_segments()
    for row in _rows(body, "names"):
        try:
            state.name(row)
        except _CANNOT_BE as error:
            log.warning("name %s is left: %s", str(row.get("name"))[:80], _why(error))
    for key in state.kept:
        numbers = manifests.inherited(key, last_lease)
        if numbers is None or any(store.leases.get(number) for number in numbers):
            # The second: somebody has locked a byte of one manifest that is a lease on another. Which one is not to be
            # told, and both may be read: each counts as held.
            manifests.hold_as_one(key, store.leases.inherit_some(key, NOBODY, now), last_lease)
            what = {"content": key.content_digest[:19]}
            names = _listed(catalog.names(store.checkpoints[key])).strip()
            log.warning(Line("leases of", names, what, "cannot be told apart: one line stands for all"))
            continue
        for number in numbers:
            store.leases.inherit(number, key, NOBODY, now)
    return segments, state.kept


def _read_manifest(
    descriptor: int, key: CheckpointKey, kind: str, segments: list[_Segment]
) -> tuple[CheckpointDescription, HandleSegmentTable]:
    """What a manifest says, its places in the numbers of this daemon. Errors: of _CANNOT_BE."""
    size = os.fstat(descriptor).st_size
    if not is_manifest(descriptor) or size > MAX_MANIFEST_BYTES:
        raise ValueError("its manifest is not sealed")
    manifest = Manifest(os.pread(descriptor, size, 0))
    if (manifest.content_digest, manifest.device, manifest.kind) != (key.content_digest, key.device, kind):
        raise ValueError("its manifest is another's")
    if list(manifest.segment_bytes) != [segment.size for segment in segments]:
        raise ValueError("its segments are not those of its manifest")
    tensors = manifest.tensors
    described = CheckpointDescription(
        [ContentFile(*file) for file in manifest.files],
        [ContentTensor(one.component, one.name, one.dtype, one.shape, one.file, one.length) for one in tensors],
        [BlobIdentity(one.digest, one.length, one.variant) for one in tensors],
        [BlobPlace(segments[one.segment].number, one.offset) if one.length else None for one in tensors],
        size,
    )
    return described, HandleSegmentTable(
        (one.component, one.name, one.segment if one.length else None) for one in tensors
    )


def _rows(body: Mapping[str, Any], key: str) -> Iterator[Mapping[str, Any]]:
    rows = body.get(key)
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict):
            yield row


def _names(body: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """What a checkpoint that cannot be restored is called, as far as the root record says."""
    where = "domain", "content"
    named = [one.get("name") for one in _rows(body, "names") if all(one.get(key) == row.get(key) for key in where)]
    return _listed([name for name in named if isinstance(name, str) and not CONTROL.search(name[:NAME_BYTES])])


def _listed(names: list[str]) -> str:
    """For a line of the log, with a blank behind it; empty without names."""
    return f"{', '.join(name[:NAME_BYTES] for name in names[:_MOST_NAMES])} " if names else ""


def _why(error: Exception) -> str:
    """In words: what is missing or out of range is not said by Python's own."""
    if isinstance(error, KeyError | IndexError):
        return f"{error} is not there"
    return str(error) or type(error).__name__


def _number(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _U64:
        return value
    raise ValueError(f"{value!r:.40} is no number")


def _text(value: object) -> str:
    if isinstance(value, str):
        value.encode()  # half a surrogate cannot be sent
        return value
    raise ValueError(f"{value!r:.40} is no text")


def _uid(value: object) -> int | None:
    if value is not None and _number(value) >= NO_UID:
        raise ValueError(f"{value} is no uid")
    return None if value is None else _number(value)


def _seconds(value: object) -> float:
    if isinstance(value, int | float) and math.isfinite(value) and 0 <= value < _MOST_SECONDS:
        return float(value)
    raise ValueError(f"{value!r:.40} is no time")


def _files(rows: Any) -> tuple[SourceFile, ...]:
    return tuple(
        SourceFile(_text(component), _text(file), _identity(*identity), bool(index and index[0]))
        for component, file, identity, *index in rows  # a record without indexes has no column
    )


def _identity(device: object, inode: object, size: object, mtime: object, ctime: object) -> FileIdentity:
    times = [value for value in (size, mtime, ctime) if isinstance(value, int) and -_I64 <= value < _I64]
    if len(times) < 3:
        raise ValueError("a file's size or time is none")
    return FileIdentity(_number(device), _number(inode), *times)
