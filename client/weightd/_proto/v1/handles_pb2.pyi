from weightd._proto.v1 import checkpoint_pb2 as _checkpoint_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_BOOL: _ClassVar[DType]
    DTYPE_F4: _ClassVar[DType]
    DTYPE_F6_E2M3: _ClassVar[DType]
    DTYPE_F6_E3M2: _ClassVar[DType]
    DTYPE_U8: _ClassVar[DType]
    DTYPE_I8: _ClassVar[DType]
    DTYPE_F8_E5M2: _ClassVar[DType]
    DTYPE_F8_E4M3: _ClassVar[DType]
    DTYPE_F8_E8M0: _ClassVar[DType]
    DTYPE_F8_E4M3FNUZ: _ClassVar[DType]
    DTYPE_F8_E5M2FNUZ: _ClassVar[DType]
    DTYPE_I16: _ClassVar[DType]
    DTYPE_U16: _ClassVar[DType]
    DTYPE_F16: _ClassVar[DType]
    DTYPE_BF16: _ClassVar[DType]
    DTYPE_I32: _ClassVar[DType]
    DTYPE_U32: _ClassVar[DType]
    DTYPE_F32: _ClassVar[DType]
    DTYPE_C64: _ClassVar[DType]
    DTYPE_F64: _ClassVar[DType]
    DTYPE_I64: _ClassVar[DType]
    DTYPE_U64: _ClassVar[DType]
    DTYPE_GGML_Q4_0: _ClassVar[DType]
    DTYPE_GGML_Q4_1: _ClassVar[DType]
    DTYPE_GGML_Q5_0: _ClassVar[DType]
    DTYPE_GGML_Q5_1: _ClassVar[DType]
    DTYPE_GGML_Q8_0: _ClassVar[DType]
    DTYPE_GGML_Q8_1: _ClassVar[DType]
    DTYPE_GGML_Q2_K: _ClassVar[DType]
    DTYPE_GGML_Q3_K: _ClassVar[DType]
    DTYPE_GGML_Q4_K: _ClassVar[DType]
    DTYPE_GGML_Q5_K: _ClassVar[DType]
    DTYPE_GGML_Q6_K: _ClassVar[DType]
    DTYPE_GGML_Q8_K: _ClassVar[DType]
    DTYPE_GGML_IQ2_XXS: _ClassVar[DType]
    DTYPE_GGML_IQ2_XS: _ClassVar[DType]
    DTYPE_GGML_IQ3_XXS: _ClassVar[DType]
    DTYPE_GGML_IQ1_S: _ClassVar[DType]
    DTYPE_GGML_IQ4_NL: _ClassVar[DType]
    DTYPE_GGML_IQ3_S: _ClassVar[DType]
    DTYPE_GGML_IQ2_S: _ClassVar[DType]
    DTYPE_GGML_IQ4_XS: _ClassVar[DType]
    DTYPE_GGML_IQ1_M: _ClassVar[DType]
    DTYPE_GGML_TQ1_0: _ClassVar[DType]
    DTYPE_GGML_TQ2_0: _ClassVar[DType]
    DTYPE_GGML_MXFP4: _ClassVar[DType]
    DTYPE_GGML_NVFP4: _ClassVar[DType]
    DTYPE_GGML_Q1_0: _ClassVar[DType]
DTYPE_UNSPECIFIED: DType
DTYPE_BOOL: DType
DTYPE_F4: DType
DTYPE_F6_E2M3: DType
DTYPE_F6_E3M2: DType
DTYPE_U8: DType
DTYPE_I8: DType
DTYPE_F8_E5M2: DType
DTYPE_F8_E4M3: DType
DTYPE_F8_E8M0: DType
DTYPE_F8_E4M3FNUZ: DType
DTYPE_F8_E5M2FNUZ: DType
DTYPE_I16: DType
DTYPE_U16: DType
DTYPE_F16: DType
DTYPE_BF16: DType
DTYPE_I32: DType
DTYPE_U32: DType
DTYPE_F32: DType
DTYPE_C64: DType
DTYPE_F64: DType
DTYPE_I64: DType
DTYPE_U64: DType
DTYPE_GGML_Q4_0: DType
DTYPE_GGML_Q4_1: DType
DTYPE_GGML_Q5_0: DType
DTYPE_GGML_Q5_1: DType
DTYPE_GGML_Q8_0: DType
DTYPE_GGML_Q8_1: DType
DTYPE_GGML_Q2_K: DType
DTYPE_GGML_Q3_K: DType
DTYPE_GGML_Q4_K: DType
DTYPE_GGML_Q5_K: DType
DTYPE_GGML_Q6_K: DType
DTYPE_GGML_Q8_K: DType
DTYPE_GGML_IQ2_XXS: DType
DTYPE_GGML_IQ2_XS: DType
DTYPE_GGML_IQ3_XXS: DType
DTYPE_GGML_IQ1_S: DType
DTYPE_GGML_IQ4_NL: DType
DTYPE_GGML_IQ3_S: DType
DTYPE_GGML_IQ2_S: DType
DTYPE_GGML_IQ4_XS: DType
DTYPE_GGML_IQ1_M: DType
DTYPE_GGML_TQ1_0: DType
DTYPE_GGML_TQ2_0: DType
DTYPE_GGML_MXFP4: DType
DTYPE_GGML_NVFP4: DType
DTYPE_GGML_Q1_0: DType

class HandleRequest(_message.Message):
    __slots__ = ("hello", "attach", "ack", "offer", "detach", "reclaim", "ended")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    DETACH_FIELD_NUMBER: _ClassVar[int]
    RECLAIM_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    hello: HelloRequest
    attach: AttachRequest
    ack: BatchAck
    offer: OfferRequest
    detach: DetachRequest
    reclaim: ReclaimRequest
    ended: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, hello: _Optional[_Union[HelloRequest, _Mapping]] = ..., attach: _Optional[_Union[AttachRequest, _Mapping]] = ..., ack: _Optional[_Union[BatchAck, _Mapping]] = ..., offer: _Optional[_Union[OfferRequest, _Mapping]] = ..., detach: _Optional[_Union[DetachRequest, _Mapping]] = ..., reclaim: _Optional[_Union[ReclaimRequest, _Mapping]] = ..., ended: _Optional[_Iterable[int]] = ...) -> None: ...

class HandleReply(_message.Message):
    __slots__ = ("hello", "attach", "batch", "offer", "detach", "error", "reclaim")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    DETACH_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RECLAIM_FIELD_NUMBER: _ClassVar[int]
    hello: HelloReply
    attach: AttachReply
    batch: DescriptorBatch
    offer: OfferReply
    detach: DetachReply
    error: HandleError
    reclaim: ReclaimReply
    def __init__(self, hello: _Optional[_Union[HelloReply, _Mapping]] = ..., attach: _Optional[_Union[AttachReply, _Mapping]] = ..., batch: _Optional[_Union[DescriptorBatch, _Mapping]] = ..., offer: _Optional[_Union[OfferReply, _Mapping]] = ..., detach: _Optional[_Union[DetachReply, _Mapping]] = ..., error: _Optional[_Union[HandleError, _Mapping]] = ..., reclaim: _Optional[_Union[ReclaimReply, _Mapping]] = ...) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ("protocol", "read_only")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    READ_ONLY_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    read_only: bool
    def __init__(self, protocol: _Optional[int] = ..., read_only: bool = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("protocol", "token", "version", "read_only")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    READ_ONLY_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    token: str
    version: str
    read_only: bool
    def __init__(self, protocol: _Optional[int] = ..., token: _Optional[str] = ..., version: _Optional[str] = ..., read_only: bool = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("reference", "sources", "device", "components", "tensors", "manifest_only", "lease_file")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_ONLY_FIELD_NUMBER: _ClassVar[int]
    LEASE_FILE_FIELD_NUMBER: _ClassVar[int]
    reference: str
    sources: SourceSet
    device: str
    components: _containers.RepeatedScalarFieldContainer[str]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorKey]
    manifest_only: bool
    lease_file: bool
    def __init__(self, reference: _Optional[str] = ..., sources: _Optional[_Union[SourceSet, _Mapping]] = ..., device: _Optional[str] = ..., components: _Optional[_Iterable[str]] = ..., tensors: _Optional[_Iterable[_Union[TensorKey, _Mapping]]] = ..., manifest_only: bool = ..., lease_file: bool = ...) -> None: ...

class SourceSet(_message.Message):
    __slots__ = ("sources",)
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    sources: _containers.RepeatedCompositeFieldContainer[_checkpoint_pb2.SourceFile]
    def __init__(self, sources: _Optional[_Iterable[_Union[_checkpoint_pb2.SourceFile, _Mapping]]] = ...) -> None: ...

class TensorKey(_message.Message):
    __slots__ = ("component", "name")
    COMPONENT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    component: str
    name: str
    def __init__(self, component: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class AttachReply(_message.Message):
    __slots__ = ("lease", "content_digest", "manifest_bytes", "segments", "descriptors", "handles", "lease_file")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTORS_FIELD_NUMBER: _ClassVar[int]
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    LEASE_FILE_FIELD_NUMBER: _ClassVar[int]
    lease: int
    content_digest: str
    manifest_bytes: int
    segments: _containers.RepeatedScalarFieldContainer[int]
    descriptors: int
    handles: _containers.RepeatedScalarFieldContainer[bytes]
    lease_file: bool
    def __init__(self, lease: _Optional[int] = ..., content_digest: _Optional[str] = ..., manifest_bytes: _Optional[int] = ..., segments: _Optional[_Iterable[int]] = ..., descriptors: _Optional[int] = ..., handles: _Optional[_Iterable[bytes]] = ..., lease_file: bool = ...) -> None: ...

class DescriptorBatch(_message.Message):
    __slots__ = ("descriptors", "handles")
    DESCRIPTORS_FIELD_NUMBER: _ClassVar[int]
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    descriptors: int
    handles: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, descriptors: _Optional[int] = ..., handles: _Optional[_Iterable[bytes]] = ...) -> None: ...

class BatchAck(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OfferRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OfferReply(_message.Message):
    __slots__ = ("offer_id",)
    OFFER_ID_FIELD_NUMBER: _ClassVar[int]
    offer_id: int
    def __init__(self, offer_id: _Optional[int] = ...) -> None: ...

class DetachRequest(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: int
    def __init__(self, lease: _Optional[int] = ...) -> None: ...

class DetachReply(_message.Message):
    __slots__ = ("ended",)
    ENDED_FIELD_NUMBER: _ClassVar[int]
    ended: bool
    def __init__(self, ended: bool = ...) -> None: ...

class ReclaimRequest(_message.Message):
    __slots__ = ("lease", "content_digest", "device")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    lease: int
    content_digest: str
    device: str
    def __init__(self, lease: _Optional[int] = ..., content_digest: _Optional[str] = ..., device: _Optional[str] = ...) -> None: ...

class ReclaimReply(_message.Message):
    __slots__ = ("held",)
    HELD_FIELD_NUMBER: _ClassVar[int]
    held: bool
    def __init__(self, held: bool = ...) -> None: ...

class HandleError(_message.Message):
    __slots__ = ("reason", "message", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class IntakeBatch(_message.Message):
    __slots__ = ("first", "descriptors")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTORS_FIELD_NUMBER: _ClassVar[int]
    first: int
    descriptors: int
    def __init__(self, first: _Optional[int] = ..., descriptors: _Optional[int] = ...) -> None: ...

class IntakeAck(_message.Message):
    __slots__ = ("received",)
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    received: int
    def __init__(self, received: _Optional[int] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("content_digest", "device", "components", "files", "segment_bytes", "names", "file_indices", "dtypes", "ranks", "dimensions", "segments", "offsets", "lengths", "digests", "variants", "kind", "views", "form")
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    FILE_INDICES_FIELD_NUMBER: _ClassVar[int]
    DTYPES_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    VIEWS_FIELD_NUMBER: _ClassVar[int]
    FORM_FIELD_NUMBER: _ClassVar[int]
    content_digest: str
    device: str
    components: _containers.RepeatedScalarFieldContainer[str]
    files: _containers.RepeatedCompositeFieldContainer[ManifestFile]
    segment_bytes: _containers.RepeatedScalarFieldContainer[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    file_indices: _containers.RepeatedScalarFieldContainer[int]
    dtypes: _containers.RepeatedScalarFieldContainer[DType]
    ranks: _containers.RepeatedScalarFieldContainer[int]
    dimensions: _containers.RepeatedScalarFieldContainer[int]
    segments: _containers.RepeatedScalarFieldContainer[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    digests: bytes
    variants: _containers.RepeatedScalarFieldContainer[int]
    kind: str
    views: _containers.RepeatedCompositeFieldContainer[DerivedView]
    form: int
    def __init__(self, content_digest: _Optional[str] = ..., device: _Optional[str] = ..., components: _Optional[_Iterable[str]] = ..., files: _Optional[_Iterable[_Union[ManifestFile, _Mapping]]] = ..., segment_bytes: _Optional[_Iterable[int]] = ..., names: _Optional[_Iterable[str]] = ..., file_indices: _Optional[_Iterable[int]] = ..., dtypes: _Optional[_Iterable[_Union[DType, str]]] = ..., ranks: _Optional[_Iterable[int]] = ..., dimensions: _Optional[_Iterable[int]] = ..., segments: _Optional[_Iterable[int]] = ..., offsets: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ..., digests: _Optional[bytes] = ..., variants: _Optional[_Iterable[int]] = ..., kind: _Optional[str] = ..., views: _Optional[_Iterable[_Union[DerivedView, _Mapping]]] = ..., form: _Optional[int] = ...) -> None: ...

class DerivedView(_message.Message):
    __slots__ = ("name", "component", "members", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    COMPONENT_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    component: int
    members: _containers.RepeatedScalarFieldContainer[int]
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., component: _Optional[int] = ..., members: _Optional[_Iterable[int]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class ManifestFile(_message.Message):
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
    component: int
    file: str
    metadata: _containers.ScalarMap[str, str]
    has_metadata: bool
    def __init__(self, component: _Optional[int] = ..., file: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., has_metadata: bool = ...) -> None: ...
