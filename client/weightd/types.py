"""Plain values that library, command and daemon share. Sizes are bytes, times are datetimes in UTC."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from datetime import datetime

ALIGNMENT = 256
"""Bytes at which every tensor begins in its segment; what cudaMalloc guarantees and kernels expect."""

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one element, by safetensors' dtype names."""


class FileIdentity(NamedTuple):
    """What fstat says of an opened file."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class SourceFile(NamedTuple):
    """One file of a checkpoint: the component it belongs to (empty for a plain checkpoint) and its name in there.

    An index has no tensors: it says whose a tensor is that several files of its component have.
    """

    component: str
    file: str
    identity: FileIdentity
    is_index: bool = False


class CheckpointFile(NamedTuple):
    """A file as its checkpoint records it: component, name, and its own metadata (None where it has none)."""

    component: str
    file: str
    metadata: dict[str, str] | None = None


class TensorKey(NamedTuple):
    """A tensor's name in a checkpoint."""

    component: str
    name: str


class TensorSpec(NamedTuple):
    """A tensor as its file describes it: `offset` and `length` are bytes in that file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


class TensorInfo(NamedTuple):
    """A tensor as a manifest places it: `segment` indexes the manifest's segments, `offset` and `length` are bytes."""

    component: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    segment: int
    offset: int
    length: int
    digest: bytes
    variant: int
    file: int


class DerivedView(NamedTuple):
    """Tensors of one component that lie in one segment, one behind the other, as a framework fuses them into one."""

    component: str
    name: str
    members: tuple[str, ...]
    shape: tuple[int, ...]


class StoredPlace(NamedTuple):
    """Where bytes lie in attached memory of this process: their address, how many, and of which attached tensors."""

    address: int
    length: int
    tensors: tuple[TensorKey, ...]


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How a load gets on; `phase` is "opening", "hashing" or "copying"."""

    phase: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What a load brought; `shared_bytes` were resident already or occur more than once in the checkpoint.

    `evicted` is what had to go for it: of each checkpoint its first name, or its digest. Where the daemon keeps users
    apart, `evicted_others` counts those of other users.
    `order` says by whose groups it lies, where the load had some: "requested", "joined" (those of another load that was
    under way) or "resident" (it was there already, and nothing was moved; removed and loaded again, it would lie in the
    order that is asked for). Of the load's own, `groups` were fit to be heeded, as far as their tensors were not
    resident already; `ignored_groups` says why others were not.
    """

    name: str
    content_digest: str
    tensors: int
    total_bytes: int
    unique_bytes: int
    shared_bytes: int
    read_bytes: int
    seconds: float
    device: str
    evicted: tuple[str, ...] = ()
    evicted_others: int = 0
    order: str = ""
    groups: int = 0
    ignored_groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One checkpoint on one device. `state` is "loading", "resident", "absent" or "lost".

    One that is absent is kept on a device that cannot be used now. `owner_uid` is None where who loaded it has no
    identity.
    """

    names: tuple[str, ...]
    content_digest: str
    device: str
    tensors: int
    total_bytes: int
    exclusive_bytes: int
    shared_bytes: int
    leases: int
    pinned: bool
    loaded_at: datetime | None
    last_used_at: datetime | None
    state: str
    owner_uid: int | None
    owner: str

    @property
    def name(self) -> str:
        """The first name; empty when there is none."""
        return self.names[0] if self.names else ""


@dataclass(frozen=True, slots=True)
class NameInfo:
    """One name. `state` is that of its content: "resident", "absent", "lost" or "evicted".

    `owner_uid` is None where its owner has no identity. A name that `is_default` was derived from a path, and goes when
    its content is evicted.
    """

    name: str
    content_digest: str
    state: str
    owner_uid: int | None
    owner: str
    is_default: bool


@dataclass(frozen=True, slots=True)
class ComponentInfo:
    """One part of a checkpoint."""

    name: str
    tensors: int
    total_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class CheckpointDetails:
    """What `inspect` shows: the checkpoint, its parts, how many segments hold it and the files it came from.

    `kind` is how the segments are shared ("host", "cuda_vmm" or "cuda_ipc"), `note` what people must know of that.
    `reference` is what the files were found by, a path or a repository; empty where nobody remembers.
    """

    checkpoint: CheckpointInfo
    components: tuple[ComponentInfo, ...]
    segments: int
    sources: tuple[SourceFile, ...]
    kind: str
    note: str
    reference: str = ""


@dataclass(frozen=True, slots=True)
class LeaseInfo:
    """One hold of one process on one checkpoint; `waiting` while a finished load is kept for it.

    `pid` is None where the daemon does not know the process, as where it is outside of its PID namespace, and `uid`
    where the process has no identity.
    """

    lease: int
    pid: int | None
    uid: int | None
    user: str
    command: str
    checkpoint: str
    device: str
    bytes: int
    since: datetime
    waiting: bool


@dataclass(frozen=True, slots=True)
class DeviceStats:
    """The books of one device: used = live + reusable + in flight, and used <= budget.

    `device_free_bytes` is what is free on the device itself, whoever uses the rest; None where nobody knows. `absence`
    is why the device cannot be used now, empty while it can; of one that is absent the budget is what it uses.
    Blobs of pinned and of leased checkpoints take `pinned_bytes` and `leased_bytes`, and some count in both;
    `evictable_bytes` is what an eviction of all others would free. Of what is reusable, `hole_bytes` lie in segments
    that hold something; the rest is the pool.
    """

    uuid: str
    kind: str
    name: str
    budget_bytes: int
    used_bytes: int
    live_bytes: int
    reusable_bytes: int
    in_flight_bytes: int
    free_bytes: int
    segments: int
    device_free_bytes: int | None
    absence: str = ""
    pinned_bytes: int = 0
    leased_bytes: int = 0
    evictable_bytes: int = 0
    hole_bytes: int = 0


@dataclass(frozen=True, slots=True)
class DigestIndexStats:
    """How the digest index is: its file, why it cannot be used now (empty while it can), how often it failed."""

    path: str
    problem: str
    failures: int


@dataclass(frozen=True, slots=True)
class BooksStats:
    """The daemon's own memory for its lists of tensors. `limit_bytes` 0 is no limit."""

    limit_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of the daemon's books. `state` is "serving", "draining" or "drained".

    `digest_index` and `books` are None from a daemon that does not say. While `revision` is the same, nothing has
    changed of checkpoints, names, pins, leases and loads but their progress.
    """

    devices: tuple[DeviceStats, ...]
    logical_bytes: int
    resident_bytes: int
    saved_bytes: int
    saved_ratio: float
    checkpoints: int
    blobs: int
    leases: int
    digest_collisions: int
    evictions: int
    state: str = "serving"
    digest_index: DigestIndexStats | None = None
    books: BooksStats | None = None
    revision: int = 0


@dataclass(frozen=True, slots=True)
class DaemonEvent:
    """Something that has happened. What does not belong to its kind is empty, 0 or None.

    `kind` is "load_begun", "load_ended", "load_answered", "sealed", "attached", "detached", "evicted", "named",
    "unnamed", "device_lost", "device_absent", "device_back", "draining", "drained" or "undrained". `reason` says how a
    load ended ("OK", "CANCELLED", or its error's reason), or why a checkpoint was evicted ("capacity", "removed",
    "lost", "drained"). `evicted` and `evicted_others` say what went for a load, as in LoadResult; `previous_digest`
    what a name meant before. `pid` and `uid` are as in LeaseInfo.
    """

    time: datetime
    kind: str
    content_digest: str
    device: str
    names: tuple[str, ...]
    load: int
    lease: int
    pid: int | None
    uid: int | None
    user: str
    command: str
    reason: str
    message: str
    total_bytes: int
    unique_bytes: int
    read_bytes: int
    seconds: float
    previous_digest: str
    evicted: tuple[str, ...]
    evicted_others: int


@dataclass(frozen=True, slots=True)
class DrainResult:
    """What went with a drain."""

    checkpoints: int
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """Who answers at the daemon's address."""

    version: str
    pid: int
    uptime_seconds: float


@dataclass(frozen=True, slots=True)
class VerifyProgress:
    """How a verification gets on."""

    done_blobs: int
    total_blobs: int
    done_bytes: int
    total_bytes: int


class FilePart(NamedTuple):
    """What a file says of the split checkpoint that it is a part of: its number from 0, how many parts and tensors."""

    number: int
    parts: int
    tensors: int


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A checked checkpoint file: its tensors and its own metadata (None where the file has none).

    `part` is None unless the file itself says that it is one of several.
    """

    tensors: tuple[TensorSpec, ...]
    metadata: dict[str, str] | None = field(default=None)
    part: FilePart | None = field(default=None)
