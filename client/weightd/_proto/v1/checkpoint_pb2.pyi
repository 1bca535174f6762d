from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LoadOrder(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOAD_ORDER_UNSPECIFIED: _ClassVar[LoadOrder]
    LOAD_ORDER_REQUESTED: _ClassVar[LoadOrder]
    LOAD_ORDER_JOINED: _ClassVar[LoadOrder]
    LOAD_ORDER_RESIDENT: _ClassVar[LoadOrder]

class CheckpointState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHECKPOINT_STATE_UNSPECIFIED: _ClassVar[CheckpointState]
    CHECKPOINT_STATE_LOADING: _ClassVar[CheckpointState]
    CHECKPOINT_STATE_RESIDENT: _ClassVar[CheckpointState]
    CHECKPOINT_STATE_LOST: _ClassVar[CheckpointState]
    CHECKPOINT_STATE_EVICTED: _ClassVar[CheckpointState]
    CHECKPOINT_STATE_ABSENT: _ClassVar[CheckpointState]
LOAD_ORDER_UNSPECIFIED: LoadOrder
LOAD_ORDER_REQUESTED: LoadOrder
LOAD_ORDER_JOINED: LoadOrder
LOAD_ORDER_RESIDENT: LoadOrder
CHECKPOINT_STATE_UNSPECIFIED: CheckpointState
CHECKPOINT_STATE_LOADING: CheckpointState
CHECKPOINT_STATE_RESIDENT: CheckpointState
CHECKPOINT_STATE_LOST: CheckpointState
CHECKPOINT_STATE_EVICTED: CheckpointState
CHECKPOINT_STATE_ABSENT: CheckpointState

class FileIdentity(_message.Message):
    __slots__ = ("device", "inode", "size_bytes", "mtime_ns", "ctime_ns")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    INODE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MTIME_NS_FIELD_NUMBER: _ClassVar[int]
    CTIME_NS_FIELD_NUMBER: _ClassVar[int]
    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    def __init__(self, device: _Optional[int] = ..., inode: _Optional[int] = ..., size_bytes: _Optional[int] = ..., mtime_ns: _Optional[int] = ..., ctime_ns: _Optional[int] = ...) -> None: ...

class SourceFile(_message.Message):
    __slots__ = ("component", "file", "identity", "is_index")
    COMPONENT_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    IS_INDEX_FIELD_NUMBER: _ClassVar[int]
    component: str
    file: str
    identity: FileIdentity
    is_index: bool
    def __init__(self, component: _Optional[str] = ..., file: _Optional[str] = ..., identity: _Optional[_Union[FileIdentity, _Mapping]] = ..., is_index: bool = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("offer_id", "sources", "name", "name_is_default", "device", "pin", "detached", "verify", "reference", "group_sizes", "group_tensors")
    OFFER_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NAME_IS_DEFAULT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    DETACHED_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZES_FIELD_NUMBER: _ClassVar[int]
    GROUP_TENSORS_FIELD_NUMBER: _ClassVar[int]
    offer_id: int
    sources: _containers.RepeatedCompositeFieldContainer[SourceFile]
    name: str
    name_is_default: bool
    device: str
    pin: bool
    detached: bool
    verify: bool
    reference: str
    group_sizes: _containers.RepeatedScalarFieldContainer[int]
    group_tensors: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, offer_id: _Optional[int] = ..., sources: _Optional[_Iterable[_Union[SourceFile, _Mapping]]] = ..., name: _Optional[str] = ..., name_is_default: bool = ..., device: _Optional[str] = ..., pin: bool = ..., detached: bool = ..., verify: bool = ..., reference: _Optional[str] = ..., group_sizes: _Optional[_Iterable[int]] = ..., group_tensors: _Optional[_Iterable[int]] = ...) -> None: ...

class LoadEvent(_message.Message):
    __slots__ = ("feed", "progress", "result")
    FEED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    feed: LoadFeed
    progress: LoadProgress
    result: LoadResult
    def __init__(self, feed: _Optional[_Union[LoadFeed, _Mapping]] = ..., progress: _Optional[_Union[LoadProgress, _Mapping]] = ..., result: _Optional[_Union[LoadResult, _Mapping]] = ...) -> None: ...

class LoadFeed(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LoadProgress(_message.Message):
    __slots__ = ("phase", "done_bytes", "total_bytes")
    class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PHASE_UNSPECIFIED: _ClassVar[LoadProgress.Phase]
        PHASE_OPENING: _ClassVar[LoadProgress.Phase]
        PHASE_HASHING: _ClassVar[LoadProgress.Phase]
        PHASE_COPYING: _ClassVar[LoadProgress.Phase]
    PHASE_UNSPECIFIED: LoadProgress.Phase
    PHASE_OPENING: LoadProgress.Phase
    PHASE_HASHING: LoadProgress.Phase
    PHASE_COPYING: LoadProgress.Phase
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    phase: LoadProgress.Phase
    done_bytes: int
    total_bytes: int
    def __init__(self, phase: _Optional[_Union[LoadProgress.Phase, str]] = ..., done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class LoadResult(_message.Message):
    __slots__ = ("name", "content_digest", "tensors", "total_bytes", "unique_bytes", "shared_bytes", "read_bytes", "seconds", "device", "evicted", "evicted_others", "order", "groups", "ignored_groups")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNIQUE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_OTHERS_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    IGNORED_GROUPS_FIELD_NUMBER: _ClassVar[int]
    name: str
    content_digest: str
    tensors: int
    total_bytes: int
    unique_bytes: int
    shared_bytes: int
    read_bytes: int
    seconds: float
    device: str
    evicted: _containers.RepeatedScalarFieldContainer[str]
    evicted_others: int
    order: LoadOrder
    groups: int
    ignored_groups: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., content_digest: _Optional[str] = ..., tensors: _Optional[int] = ..., total_bytes: _Optional[int] = ..., unique_bytes: _Optional[int] = ..., shared_bytes: _Optional[int] = ..., read_bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., device: _Optional[str] = ..., evicted: _Optional[_Iterable[str]] = ..., evicted_others: _Optional[int] = ..., order: _Optional[_Union[LoadOrder, str]] = ..., groups: _Optional[int] = ..., ignored_groups: _Optional[_Iterable[str]] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("names", "content_digest", "device", "tensors", "total_bytes", "exclusive_bytes", "shared_bytes", "leases", "pinned", "load_time", "last_use_time", "state", "owner_uid", "owner")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXCLUSIVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    LOAD_TIME_FIELD_NUMBER: _ClassVar[int]
    LAST_USE_TIME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    OWNER_UID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    content_digest: str
    device: str
    tensors: int
    total_bytes: int
    exclusive_bytes: int
    shared_bytes: int
    leases: int
    pinned: bool
    load_time: _timestamp_pb2.Timestamp
    last_use_time: _timestamp_pb2.Timestamp
    state: CheckpointState
    owner_uid: int
    owner: str
    def __init__(self, names: _Optional[_Iterable[str]] = ..., content_digest: _Optional[str] = ..., device: _Optional[str] = ..., tensors: _Optional[int] = ..., total_bytes: _Optional[int] = ..., exclusive_bytes: _Optional[int] = ..., shared_bytes: _Optional[int] = ..., leases: _Optional[int] = ..., pinned: bool = ..., load_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., last_use_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., state: _Optional[_Union[CheckpointState, str]] = ..., owner_uid: _Optional[int] = ..., owner: _Optional[str] = ...) -> None: ...

class ListCheckpointsRequest(_message.Message):
    __slots__ = ("names", "name")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    names: bool
    name: str
    def __init__(self, names: bool = ..., name: _Optional[str] = ...) -> None: ...

class Name(_message.Message):
    __slots__ = ("name", "content_digest", "state", "owner_uid", "owner", "is_default")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    OWNER_UID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    IS_DEFAULT_FIELD_NUMBER: _ClassVar[int]
    name: str
    content_digest: str
    state: CheckpointState
    owner_uid: int
    owner: str
    is_default: bool
    def __init__(self, name: _Optional[str] = ..., content_digest: _Optional[str] = ..., state: _Optional[_Union[CheckpointState, str]] = ..., owner_uid: _Optional[int] = ..., owner: _Optional[str] = ..., is_default: bool = ...) -> None: ...

class ListCheckpointsResponse(_message.Message):
    __slots__ = ("checkpoints", "names")
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    checkpoints: _containers.RepeatedCompositeFieldContainer[Checkpoint]
    names: _containers.RepeatedCompositeFieldContainer[Name]
    def __init__(self, checkpoints: _Optional[_Iterable[_Union[Checkpoint, _Mapping]]] = ..., names: _Optional[_Iterable[_Union[Name, _Mapping]]] = ...) -> None: ...

class GetCheckpointRequest(_message.Message):
    __slots__ = ("reference", "device")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    reference: str
    device: str
    def __init__(self, reference: _Optional[str] = ..., device: _Optional[str] = ...) -> None: ...

class Component(_message.Message):
    __slots__ = ("name", "tensors", "total_bytes", "shared_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    tensors: int
    total_bytes: int
    shared_bytes: int
    def __init__(self, name: _Optional[str] = ..., tensors: _Optional[int] = ..., total_bytes: _Optional[int] = ..., shared_bytes: _Optional[int] = ...) -> None: ...

class GetCheckpointResponse(_message.Message):
    __slots__ = ("checkpoint", "components", "segments", "sources", "kind", "note", "reference")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    checkpoint: Checkpoint
    components: _containers.RepeatedCompositeFieldContainer[Component]
    segments: int
    sources: _containers.RepeatedCompositeFieldContainer[SourceFile]
    kind: str
    note: str
    reference: str
    def __init__(self, checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ..., components: _Optional[_Iterable[_Union[Component, _Mapping]]] = ..., segments: _Optional[int] = ..., sources: _Optional[_Iterable[_Union[SourceFile, _Mapping]]] = ..., kind: _Optional[str] = ..., note: _Optional[str] = ..., reference: _Optional[str] = ...) -> None: ...

class PinCheckpointRequest(_message.Message):
    __slots__ = ("reference", "device")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    reference: str
    device: str
    def __init__(self, reference: _Optional[str] = ..., device: _Optional[str] = ...) -> None: ...

class PinCheckpointResponse(_message.Message):
    __slots__ = ("checkpoint",)
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    checkpoint: Checkpoint
    def __init__(self, checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ...) -> None: ...

class UnpinCheckpointRequest(_message.Message):
    __slots__ = ("reference", "device")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    reference: str
    device: str
    def __init__(self, reference: _Optional[str] = ..., device: _Optional[str] = ...) -> None: ...

class UnpinCheckpointResponse(_message.Message):
    __slots__ = ("checkpoint",)
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    checkpoint: Checkpoint
    def __init__(self, checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ...) -> None: ...

class RemoveCheckpointRequest(_message.Message):
    __slots__ = ("reference", "device")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    reference: str
    device: str
    def __init__(self, reference: _Optional[str] = ..., device: _Optional[str] = ...) -> None: ...

class RemoveCheckpointResponse(_message.Message):
    __slots__ = ("freed_bytes",)
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    freed_bytes: int
    def __init__(self, freed_bytes: _Optional[int] = ...) -> None: ...

class VerifyCheckpointRequest(_message.Message):
    __slots__ = ("reference", "device")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    reference: str
    device: str
    def __init__(self, reference: _Optional[str] = ..., device: _Optional[str] = ...) -> None: ...

class VerifyEvent(_message.Message):
    __slots__ = ("done_blobs", "total_blobs", "done_bytes", "total_bytes")
    DONE_BLOBS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOBS_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    done_blobs: int
    total_blobs: int
    done_bytes: int
    total_bytes: int
    def __init__(self, done_blobs: _Optional[int] = ..., total_blobs: _Optional[int] = ..., done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...
