from google.protobuf import timestamp_pb2 as _timestamp_pb2
from weightd._proto.v1 import checkpoint_pb2 as _checkpoint_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetMapRequest(_message.Message):
    __slots__ = ("device", "page_size", "page_token")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    device: str
    page_size: int
    page_token: str
    def __init__(self, device: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class GetMapResponse(_message.Message):
    __slots__ = ("device", "revision", "segments", "extents", "users", "checkpoints", "next_page_token")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    EXTENTS_FIELD_NUMBER: _ClassVar[int]
    USERS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    device: str
    revision: int
    segments: _containers.RepeatedCompositeFieldContainer[MapSegment]
    extents: _containers.RepeatedCompositeFieldContainer[MapExtent]
    users: _containers.RepeatedCompositeFieldContainer[BlobUsers]
    checkpoints: _containers.RepeatedCompositeFieldContainer[CheckpointName]
    next_page_token: str
    def __init__(self, device: _Optional[str] = ..., revision: _Optional[int] = ..., segments: _Optional[_Iterable[_Union[MapSegment, _Mapping]]] = ..., extents: _Optional[_Iterable[_Union[MapExtent, _Mapping]]] = ..., users: _Optional[_Iterable[_Union[BlobUsers, _Mapping]]] = ..., checkpoints: _Optional[_Iterable[_Union[CheckpointName, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class MapSegment(_message.Message):
    __slots__ = ("segment", "size_bytes")
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    segment: int
    size_bytes: int
    def __init__(self, segment: _Optional[int] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class MapExtent(_message.Message):
    __slots__ = ("segment", "offset", "length", "kind", "blobs", "users", "load")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[MapExtent.Kind]
        KIND_BLOBS: _ClassVar[MapExtent.Kind]
        KIND_HOLE: _ClassVar[MapExtent.Kind]
        KIND_HOLLOW: _ClassVar[MapExtent.Kind]
        KIND_LEAVING: _ClassVar[MapExtent.Kind]
        KIND_IN_FLIGHT: _ClassVar[MapExtent.Kind]
        KIND_SET_ASIDE: _ClassVar[MapExtent.Kind]
        KIND_OTHERS: _ClassVar[MapExtent.Kind]
    KIND_UNSPECIFIED: MapExtent.Kind
    KIND_BLOBS: MapExtent.Kind
    KIND_HOLE: MapExtent.Kind
    KIND_HOLLOW: MapExtent.Kind
    KIND_LEAVING: MapExtent.Kind
    KIND_IN_FLIGHT: MapExtent.Kind
    KIND_SET_ASIDE: MapExtent.Kind
    KIND_OTHERS: MapExtent.Kind
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    USERS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    segment: int
    offset: int
    length: int
    kind: MapExtent.Kind
    blobs: int
    users: int
    load: int
    def __init__(self, segment: _Optional[int] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., kind: _Optional[_Union[MapExtent.Kind, str]] = ..., blobs: _Optional[int] = ..., users: _Optional[int] = ..., load: _Optional[int] = ...) -> None: ...

class BlobUsers(_message.Message):
    __slots__ = ("checkpoints", "others")
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    checkpoints: _containers.RepeatedScalarFieldContainer[int]
    others: int
    def __init__(self, checkpoints: _Optional[_Iterable[int]] = ..., others: _Optional[int] = ...) -> None: ...

class CheckpointName(_message.Message):
    __slots__ = ("content_digest", "name")
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    content_digest: str
    name: str
    def __init__(self, content_digest: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class ListSharingRequest(_message.Message):
    __slots__ = ("reference", "device", "page_size", "page_token")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    reference: str
    device: str
    page_size: int
    page_token: str
    def __init__(self, reference: _Optional[str] = ..., device: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListSharingResponse(_message.Message):
    __slots__ = ("revision", "pairs", "checkpoints", "next_page_token")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    revision: int
    pairs: _containers.RepeatedCompositeFieldContainer[SharedPair]
    checkpoints: _containers.RepeatedCompositeFieldContainer[CheckpointName]
    next_page_token: str
    def __init__(self, revision: _Optional[int] = ..., pairs: _Optional[_Iterable[_Union[SharedPair, _Mapping]]] = ..., checkpoints: _Optional[_Iterable[_Union[CheckpointName, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class SharedPair(_message.Message):
    __slots__ = ("device", "one", "other", "shared_bytes", "only_bytes", "components")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ONE_FIELD_NUMBER: _ClassVar[int]
    OTHER_FIELD_NUMBER: _ClassVar[int]
    SHARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ONLY_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    device: str
    one: int
    other: int
    shared_bytes: int
    only_bytes: int
    components: _containers.RepeatedCompositeFieldContainer[SharedComponents]
    def __init__(self, device: _Optional[str] = ..., one: _Optional[int] = ..., other: _Optional[int] = ..., shared_bytes: _Optional[int] = ..., only_bytes: _Optional[int] = ..., components: _Optional[_Iterable[_Union[SharedComponents, _Mapping]]] = ...) -> None: ...

class SharedComponents(_message.Message):
    __slots__ = ("one", "other", "shared_bytes")
    ONE_FIELD_NUMBER: _ClassVar[int]
    OTHER_FIELD_NUMBER: _ClassVar[int]
    SHARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    one: str
    other: str
    shared_bytes: int
    def __init__(self, one: _Optional[str] = ..., other: _Optional[str] = ..., shared_bytes: _Optional[int] = ...) -> None: ...

class ListTensorsRequest(_message.Message):
    __slots__ = ("reference", "device", "page_size", "page_token")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    reference: str
    device: str
    page_size: int
    page_token: str
    def __init__(self, reference: _Optional[str] = ..., device: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListTensorsResponse(_message.Message):
    __slots__ = ("revision", "tensors", "users", "checkpoints", "next_page_token")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    USERS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    revision: int
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    users: _containers.RepeatedCompositeFieldContainer[BlobUsers]
    checkpoints: _containers.RepeatedCompositeFieldContainer[CheckpointName]
    next_page_token: str
    def __init__(self, revision: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., users: _Optional[_Iterable[_Union[BlobUsers, _Mapping]]] = ..., checkpoints: _Optional[_Iterable[_Union[CheckpointName, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("component", "name", "dtype", "shape", "length", "digest", "variant", "segment", "offset", "file", "users")
    COMPONENT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    USERS_FIELD_NUMBER: _ClassVar[int]
    component: str
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    length: int
    digest: bytes
    variant: int
    segment: int
    offset: int
    file: str
    users: int
    def __init__(self, component: _Optional[str] = ..., name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., length: _Optional[int] = ..., digest: _Optional[bytes] = ..., variant: _Optional[int] = ..., segment: _Optional[int] = ..., offset: _Optional[int] = ..., file: _Optional[str] = ..., users: _Optional[int] = ...) -> None: ...

class ListLoadsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListLoadsResponse(_message.Message):
    __slots__ = ("loads",)
    LOADS_FIELD_NUMBER: _ClassVar[int]
    loads: _containers.RepeatedCompositeFieldContainer[LoadUnderWay]
    def __init__(self, loads: _Optional[_Iterable[_Union[LoadUnderWay, _Mapping]]] = ...) -> None: ...

class LoadUnderWay(_message.Message):
    __slots__ = ("load", "names", "reference", "device", "progress", "bytes_per_second", "remaining_seconds", "begin_time", "pid", "uid", "user", "command", "waiters")
    LOAD_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    REMAINING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BEGIN_TIME_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    WAITERS_FIELD_NUMBER: _ClassVar[int]
    load: int
    names: _containers.RepeatedScalarFieldContainer[str]
    reference: str
    device: str
    progress: _checkpoint_pb2.LoadProgress
    bytes_per_second: float
    remaining_seconds: float
    begin_time: _timestamp_pb2.Timestamp
    pid: int
    uid: int
    user: str
    command: str
    waiters: int
    def __init__(self, load: _Optional[int] = ..., names: _Optional[_Iterable[str]] = ..., reference: _Optional[str] = ..., device: _Optional[str] = ..., progress: _Optional[_Union[_checkpoint_pb2.LoadProgress, _Mapping]] = ..., bytes_per_second: _Optional[float] = ..., remaining_seconds: _Optional[float] = ..., begin_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., pid: _Optional[int] = ..., uid: _Optional[int] = ..., user: _Optional[str] = ..., command: _Optional[str] = ..., waiters: _Optional[int] = ...) -> None: ...

class GetSettingsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetSettingsResponse(_message.Message):
    __slots__ = ("settings", "file")
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    settings: _containers.RepeatedCompositeFieldContainer[Setting]
    file: str
    def __init__(self, settings: _Optional[_Iterable[_Union[Setting, _Mapping]]] = ..., file: _Optional[str] = ...) -> None: ...

class Setting(_message.Message):
    __slots__ = ("key", "value", "origin")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: str
    origin: str
    def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ..., origin: _Optional[str] = ...) -> None: ...

class CheckBooksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckBooksResponse(_message.Message):
    __slots__ = ("figures",)
    FIGURES_FIELD_NUMBER: _ClassVar[int]
    figures: _containers.RepeatedCompositeFieldContainer[BooksFigure]
    def __init__(self, figures: _Optional[_Iterable[_Union[BooksFigure, _Mapping]]] = ...) -> None: ...

class BooksFigure(_message.Message):
    __slots__ = ("device", "what", "books", "found", "source", "agrees", "in_bytes")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    BOOKS_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    AGREES_FIELD_NUMBER: _ClassVar[int]
    IN_BYTES_FIELD_NUMBER: _ClassVar[int]
    device: str
    what: str
    books: int
    found: int
    source: str
    agrees: bool
    in_bytes: bool
    def __init__(self, device: _Optional[str] = ..., what: _Optional[str] = ..., books: _Optional[int] = ..., found: _Optional[int] = ..., source: _Optional[str] = ..., agrees: bool = ..., in_bytes: bool = ...) -> None: ...
