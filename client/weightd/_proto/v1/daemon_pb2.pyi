from google.protobuf import timestamp_pb2 as _timestamp_pb2
from weightd._proto.v1 import lease_pb2 as _lease_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DaemonState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DAEMON_STATE_UNSPECIFIED: _ClassVar[DaemonState]
    DAEMON_STATE_SERVING: _ClassVar[DaemonState]
    DAEMON_STATE_DRAINING: _ClassVar[DaemonState]
    DAEMON_STATE_DRAINED: _ClassVar[DaemonState]

class EventKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EVENT_KIND_UNSPECIFIED: _ClassVar[EventKind]
    EVENT_KIND_LOAD_BEGUN: _ClassVar[EventKind]
    EVENT_KIND_LOAD_ENDED: _ClassVar[EventKind]
    EVENT_KIND_SEALED: _ClassVar[EventKind]
    EVENT_KIND_ATTACHED: _ClassVar[EventKind]
    EVENT_KIND_DETACHED: _ClassVar[EventKind]
    EVENT_KIND_EVICTED: _ClassVar[EventKind]
    EVENT_KIND_DEVICE_LOST: _ClassVar[EventKind]
    EVENT_KIND_DRAINING: _ClassVar[EventKind]
    EVENT_KIND_DRAINED: _ClassVar[EventKind]
    EVENT_KIND_UNDRAINED: _ClassVar[EventKind]
    EVENT_KIND_LOAD_ANSWERED: _ClassVar[EventKind]
    EVENT_KIND_NAMED: _ClassVar[EventKind]
    EVENT_KIND_UNNAMED: _ClassVar[EventKind]
    EVENT_KIND_DEVICE_ABSENT: _ClassVar[EventKind]
    EVENT_KIND_DEVICE_BACK: _ClassVar[EventKind]
DAEMON_STATE_UNSPECIFIED: DaemonState
DAEMON_STATE_SERVING: DaemonState
DAEMON_STATE_DRAINING: DaemonState
DAEMON_STATE_DRAINED: DaemonState
EVENT_KIND_UNSPECIFIED: EventKind
EVENT_KIND_LOAD_BEGUN: EventKind
EVENT_KIND_LOAD_ENDED: EventKind
EVENT_KIND_SEALED: EventKind
EVENT_KIND_ATTACHED: EventKind
EVENT_KIND_DETACHED: EventKind
EVENT_KIND_EVICTED: EventKind
EVENT_KIND_DEVICE_LOST: EventKind
EVENT_KIND_DRAINING: EventKind
EVENT_KIND_DRAINED: EventKind
EVENT_KIND_UNDRAINED: EventKind
EVENT_KIND_LOAD_ANSWERED: EventKind
EVENT_KIND_NAMED: EventKind
EVENT_KIND_UNNAMED: EventKind
EVENT_KIND_DEVICE_ABSENT: EventKind
EVENT_KIND_DEVICE_BACK: EventKind

class GetVersionRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetVersionResponse(_message.Message):
    __slots__ = ("version", "pid", "uptime_seconds")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    version: str
    pid: int
    uptime_seconds: float
    def __init__(self, version: _Optional[str] = ..., pid: _Optional[int] = ..., uptime_seconds: _Optional[float] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Device(_message.Message):
    __slots__ = ("uuid", "kind", "name", "budget_bytes", "used_bytes", "live_bytes", "reusable_bytes", "in_flight_bytes", "free_bytes", "segments", "device_free_bytes", "absence", "pinned_bytes", "leased_bytes", "evictable_bytes", "hole_bytes")
    UUID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    REUSABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ABSENCE_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASED_BYTES_FIELD_NUMBER: _ClassVar[int]
    EVICTABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOLE_BYTES_FIELD_NUMBER: _ClassVar[int]
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
    device_free_bytes: int
    absence: str
    pinned_bytes: int
    leased_bytes: int
    evictable_bytes: int
    hole_bytes: int
    def __init__(self, uuid: _Optional[str] = ..., kind: _Optional[str] = ..., name: _Optional[str] = ..., budget_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., live_bytes: _Optional[int] = ..., reusable_bytes: _Optional[int] = ..., in_flight_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., segments: _Optional[int] = ..., device_free_bytes: _Optional[int] = ..., absence: _Optional[str] = ..., pinned_bytes: _Optional[int] = ..., leased_bytes: _Optional[int] = ..., evictable_bytes: _Optional[int] = ..., hole_bytes: _Optional[int] = ...) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("devices", "logical_bytes", "resident_bytes", "saved_bytes", "saved_ratio", "checkpoints", "blobs", "leases", "digest_collisions", "evictions", "state", "digest_index", "books", "revision")
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    LOGICAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SAVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SAVED_RATIO_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_COLLISIONS_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_INDEX_FIELD_NUMBER: _ClassVar[int]
    BOOKS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    logical_bytes: int
    resident_bytes: int
    saved_bytes: int
    saved_ratio: float
    checkpoints: int
    blobs: int
    leases: int
    digest_collisions: int
    evictions: int
    state: DaemonState
    digest_index: DigestIndex
    books: Books
    revision: int
    def __init__(self, devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ..., logical_bytes: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., saved_bytes: _Optional[int] = ..., saved_ratio: _Optional[float] = ..., checkpoints: _Optional[int] = ..., blobs: _Optional[int] = ..., leases: _Optional[int] = ..., digest_collisions: _Optional[int] = ..., evictions: _Optional[int] = ..., state: _Optional[_Union[DaemonState, str]] = ..., digest_index: _Optional[_Union[DigestIndex, _Mapping]] = ..., books: _Optional[_Union[Books, _Mapping]] = ..., revision: _Optional[int] = ...) -> None: ...

class Books(_message.Message):
    __slots__ = ("limit_bytes", "used_bytes")
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    limit_bytes: int
    used_bytes: int
    def __init__(self, limit_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ...) -> None: ...

class DigestIndex(_message.Message):
    __slots__ = ("path", "problem", "failures")
    PATH_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    path: str
    problem: str
    failures: int
    def __init__(self, path: _Optional[str] = ..., problem: _Optional[str] = ..., failures: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_seconds", "forget")
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    timeout_seconds: float
    forget: str
    def __init__(self, timeout_seconds: _Optional[float] = ..., forget: _Optional[str] = ...) -> None: ...

class DrainEvent(_message.Message):
    __slots__ = ("holders", "result")
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    holders: DrainHolders
    result: DrainResult
    def __init__(self, holders: _Optional[_Union[DrainHolders, _Mapping]] = ..., result: _Optional[_Union[DrainResult, _Mapping]] = ...) -> None: ...

class DrainHolders(_message.Message):
    __slots__ = ("leases",)
    LEASES_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedCompositeFieldContainer[_lease_pb2.Lease]
    def __init__(self, leases: _Optional[_Iterable[_Union[_lease_pb2.Lease, _Mapping]]] = ...) -> None: ...

class DrainResult(_message.Message):
    __slots__ = ("checkpoints", "freed_bytes")
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    checkpoints: int
    freed_bytes: int
    def __init__(self, checkpoints: _Optional[int] = ..., freed_bytes: _Optional[int] = ...) -> None: ...

class UndrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UndrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchEventsRequest(_message.Message):
    __slots__ = ("follow",)
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    follow: bool
    def __init__(self, follow: bool = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("event_time", "kind", "content_digest", "device", "names", "total_bytes", "load", "lease", "pid", "uid", "user", "command", "reason", "message", "unique_bytes", "read_bytes", "seconds", "previous_digest", "evicted", "evicted_others")
    EVENT_TIME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    UNIQUE_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_OTHERS_FIELD_NUMBER: _ClassVar[int]
    event_time: _timestamp_pb2.Timestamp
    kind: EventKind
    content_digest: str
    device: str
    names: _containers.RepeatedScalarFieldContainer[str]
    total_bytes: int
    load: int
    lease: int
    pid: int
    uid: int
    user: str
    command: str
    reason: str
    message: str
    unique_bytes: int
    read_bytes: int
    seconds: float
    previous_digest: str
    evicted: _containers.RepeatedScalarFieldContainer[str]
    evicted_others: int
    def __init__(self, event_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., kind: _Optional[_Union[EventKind, str]] = ..., content_digest: _Optional[str] = ..., device: _Optional[str] = ..., names: _Optional[_Iterable[str]] = ..., total_bytes: _Optional[int] = ..., load: _Optional[int] = ..., lease: _Optional[int] = ..., pid: _Optional[int] = ..., uid: _Optional[int] = ..., user: _Optional[str] = ..., command: _Optional[str] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., unique_bytes: _Optional[int] = ..., read_bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., previous_digest: _Optional[str] = ..., evicted: _Optional[_Iterable[str]] = ..., evicted_others: _Optional[int] = ...) -> None: ...
