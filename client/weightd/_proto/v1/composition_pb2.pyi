from weightd._proto.v1 import checkpoint_pb2 as _checkpoint_pb2
from weightd._proto.v1 import handles_pb2 as _handles_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ComposeRequest(_message.Message):
    __slots__ = ("device", "name", "pin", "detached", "reference", "sources", "files", "names", "file_indices", "dtypes", "ranks", "dimensions", "source_indices", "renamed", "source_names")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    DETACHED_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    FILE_INDICES_FIELD_NUMBER: _ClassVar[int]
    DTYPES_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_INDICES_FIELD_NUMBER: _ClassVar[int]
    RENAMED_FIELD_NUMBER: _ClassVar[int]
    SOURCE_NAMES_FIELD_NUMBER: _ClassVar[int]
    device: str
    name: str
    pin: bool
    detached: bool
    reference: str
    sources: _containers.RepeatedCompositeFieldContainer[TensorSource]
    files: _containers.RepeatedCompositeFieldContainer[ComposedFile]
    names: _containers.RepeatedScalarFieldContainer[str]
    file_indices: _containers.RepeatedScalarFieldContainer[int]
    dtypes: _containers.RepeatedScalarFieldContainer[_handles_pb2.DType]
    ranks: _containers.RepeatedScalarFieldContainer[int]
    dimensions: _containers.RepeatedScalarFieldContainer[int]
    source_indices: _containers.RepeatedScalarFieldContainer[int]
    renamed: _containers.RepeatedScalarFieldContainer[int]
    source_names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, device: _Optional[str] = ..., name: _Optional[str] = ..., pin: bool = ..., detached: bool = ..., reference: _Optional[str] = ..., sources: _Optional[_Iterable[_Union[TensorSource, _Mapping]]] = ..., files: _Optional[_Iterable[_Union[ComposedFile, _Mapping]]] = ..., names: _Optional[_Iterable[str]] = ..., file_indices: _Optional[_Iterable[int]] = ..., dtypes: _Optional[_Iterable[_Union[_handles_pb2.DType, str]]] = ..., ranks: _Optional[_Iterable[int]] = ..., dimensions: _Optional[_Iterable[int]] = ..., source_indices: _Optional[_Iterable[int]] = ..., renamed: _Optional[_Iterable[int]] = ..., source_names: _Optional[_Iterable[str]] = ...) -> None: ...

class TensorSource(_message.Message):
    __slots__ = ("content_digest", "component")
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    COMPONENT_FIELD_NUMBER: _ClassVar[int]
    content_digest: str
    component: str
    def __init__(self, content_digest: _Optional[str] = ..., component: _Optional[str] = ...) -> None: ...

class ComposedFile(_message.Message):
    __slots__ = ("component", "file", "metadata", "has_metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    COMPONENT_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    HAS_METADATA_FIELD_NUMBER: _ClassVar[int]
    component: str
    file: str
    metadata: _containers.ScalarMap[str, str]
    has_metadata: bool
    def __init__(self, component: _Optional[str] = ..., file: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., has_metadata: bool = ...) -> None: ...

class ComposeResponse(_message.Message):
    __slots__ = ("result",)
    RESULT_FIELD_NUMBER: _ClassVar[int]
    result: _checkpoint_pb2.LoadResult
    def __init__(self, result: _Optional[_Union[_checkpoint_pb2.LoadResult, _Mapping]] = ...) -> None: ...
