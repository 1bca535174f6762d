from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

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
    __slots__ = ("uuid", "kind", "name", "budget_bytes", "used_bytes", "live_bytes", "reusable_bytes", "in_flight_bytes", "free_bytes", "segments", "device_free_bytes")
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
    def __init__(self, uuid: _Optional[str] = ..., kind: _Optional[str] = ..., name: _Optional[str] = ..., budget_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., live_bytes: _Optional[int] = ..., reusable_bytes: _Optional[int] = ..., in_flight_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., segments: _Optional[int] = ..., device_free_bytes: _Optional[int] = ...) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("devices", "logical_bytes", "resident_bytes", "saved_bytes", "saved_ratio", "checkpoints", "blobs", "leases", "digest_collisions", "evictions")
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
    def __init__(self, devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ..., logical_bytes: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., saved_bytes: _Optional[int] = ..., saved_ratio: _Optional[float] = ..., checkpoints: _Optional[int] = ..., blobs: _Optional[int] = ..., leases: _Optional[int] = ..., digest_collisions: _Optional[int] = ..., evictions: _Optional[int] = ...) -> None: ...
