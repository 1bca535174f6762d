from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Sink(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SINK_UNSPECIFIED: _ClassVar[Sink]
    SINK_FILES: _ClassVar[Sink]
    SINK_MEMORY: _ClassVar[Sink]
SINK_UNSPECIFIED: Sink
SINK_FILES: Sink
SINK_MEMORY: Sink

class WatchInventoryRequest(_message.Message):
    __slots__ = ("follow",)
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    follow: bool
    def __init__(self, follow: bool = ...) -> None: ...

class Inventory(_message.Message):
    __slots__ = ("entries", "draining", "devices", "problem")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[InventoryEntry]
    draining: bool
    devices: _containers.RepeatedCompositeFieldContainer[DeviceInventory]
    problem: str
    def __init__(self, entries: _Optional[_Iterable[_Union[InventoryEntry, _Mapping]]] = ..., draining: bool = ..., devices: _Optional[_Iterable[_Union[DeviceInventory, _Mapping]]] = ..., problem: _Optional[str] = ...) -> None: ...

class InventoryEntry(_message.Message):
    __slots__ = ("name", "total_bytes", "tensors", "repository", "commit", "reference")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    total_bytes: int
    tensors: int
    repository: str
    commit: str
    reference: str
    def __init__(self, name: _Optional[str] = ..., total_bytes: _Optional[int] = ..., tensors: _Optional[int] = ..., repository: _Optional[str] = ..., commit: _Optional[str] = ..., reference: _Optional[str] = ...) -> None: ...

class DeviceInventory(_message.Message):
    __slots__ = ("device", "kind", "budget_bytes", "used_bytes", "firm_bytes", "page_bytes", "checkpoints")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FIRM_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    device: str
    kind: str
    budget_bytes: int
    used_bytes: int
    firm_bytes: int
    page_bytes: int
    checkpoints: _containers.RepeatedCompositeFieldContainer[ResidentCheckpoint]
    def __init__(self, device: _Optional[str] = ..., kind: _Optional[str] = ..., budget_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., firm_bytes: _Optional[int] = ..., page_bytes: _Optional[int] = ..., checkpoints: _Optional[_Iterable[_Union[ResidentCheckpoint, _Mapping]]] = ...) -> None: ...

class ResidentCheckpoint(_message.Message):
    __slots__ = ("name", "pinned", "firm")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    FIRM_FIELD_NUMBER: _ClassVar[int]
    name: str
    pinned: bool
    firm: bool
    def __init__(self, name: _Optional[str] = ..., pinned: bool = ..., firm: bool = ...) -> None: ...

class GetManifestRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ManifestPiece(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class ReadRowsRequest(_message.Message):
    __slots__ = ("name", "digests", "serves_at")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    SERVES_AT_FIELD_NUMBER: _ClassVar[int]
    name: str
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    serves_at: str
    def __init__(self, name: _Optional[str] = ..., digests: _Optional[_Iterable[bytes]] = ..., serves_at: _Optional[str] = ...) -> None: ...

class RowPiece(_message.Message):
    __slots__ = ("row", "offset", "data")
    ROW_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    row: int
    offset: int
    data: bytes
    def __init__(self, row: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("name", "sources", "sink", "local_name", "pin")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    SINK_FIELD_NUMBER: _ClassVar[int]
    LOCAL_NAME_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    name: str
    sources: _containers.RepeatedScalarFieldContainer[str]
    sink: Sink
    local_name: str
    pin: bool
    def __init__(self, name: _Optional[str] = ..., sources: _Optional[_Iterable[str]] = ..., sink: _Optional[_Union[Sink, str]] = ..., local_name: _Optional[str] = ..., pin: bool = ...) -> None: ...

class FetchEvent(_message.Message):
    __slots__ = ("progress", "result")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    progress: FetchProgress
    result: FetchResult
    def __init__(self, progress: _Optional[_Union[FetchProgress, _Mapping]] = ..., result: _Optional[_Union[FetchResult, _Mapping]] = ...) -> None: ...

class FetchProgress(_message.Message):
    __slots__ = ("done_bytes", "total_bytes")
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    done_bytes: int
    total_bytes: int
    def __init__(self, done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class FetchResult(_message.Message):
    __slots__ = ("digest", "name", "moved_bytes", "local_bytes", "small_bytes", "content_digest", "folder")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MOVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOCAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SMALL_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    digest: str
    name: str
    moved_bytes: int
    local_bytes: int
    small_bytes: int
    content_digest: str
    folder: str
    def __init__(self, digest: _Optional[str] = ..., name: _Optional[str] = ..., moved_bytes: _Optional[int] = ..., local_bytes: _Optional[int] = ..., small_bytes: _Optional[int] = ..., content_digest: _Optional[str] = ..., folder: _Optional[str] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
