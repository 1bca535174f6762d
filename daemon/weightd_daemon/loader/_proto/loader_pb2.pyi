from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Use(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    USE_UNSPECIFIED: _ClassVar[Use]
    USE_BLOB: _ClassVar[Use]
    USE_SLOT: _ClassVar[Use]
    USE_COPY: _ClassVar[Use]
USE_UNSPECIFIED: Use
USE_BLOB: Use
USE_SLOT: Use
USE_COPY: Use

class ToDaemon(_message.Message):
    __slots__ = ("laid_out", "sampled", "hashed", "grant", "candidate", "settle", "share", "finish", "received", "file", "tensors", "progress", "verified", "failed", "idle", "counted", "full")
    LAID_OUT_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    HASHED_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    SETTLE_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    IDLE_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    FULL_FIELD_NUMBER: _ClassVar[int]
    laid_out: LaidOut
    sampled: Digests
    hashed: Hashed
    grant: Grant
    candidate: Candidate
    settle: Settle
    share: Share
    finish: Finish
    received: Received
    file: File
    tensors: Tensors
    progress: Progress
    verified: Verified
    failed: Failure
    idle: Idle
    counted: Counted
    full: Full
    def __init__(self, laid_out: _Optional[_Union[LaidOut, _Mapping]] = ..., sampled: _Optional[_Union[Digests, _Mapping]] = ..., hashed: _Optional[_Union[Hashed, _Mapping]] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ..., candidate: _Optional[_Union[Candidate, _Mapping]] = ..., settle: _Optional[_Union[Settle, _Mapping]] = ..., share: _Optional[_Union[Share, _Mapping]] = ..., finish: _Optional[_Union[Finish, _Mapping]] = ..., received: _Optional[_Union[Received, _Mapping]] = ..., file: _Optional[_Union[File, _Mapping]] = ..., tensors: _Optional[_Union[Tensors, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., verified: _Optional[_Union[Verified, _Mapping]] = ..., failed: _Optional[_Union[Failure, _Mapping]] = ..., idle: _Optional[_Union[Idle, _Mapping]] = ..., counted: _Optional[_Union[Counted, _Mapping]] = ..., full: _Optional[_Union[Full, _Mapping]] = ...) -> None: ...

class ToLoader(_message.Message):
    __slots__ = ("laid_out", "sampled", "hashed", "grant", "candidate", "settle", "share", "finish", "failed", "load", "verify", "counted", "full", "segments")
    LAID_OUT_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    HASHED_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    SETTLE_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    FULL_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    laid_out: Known
    sampled: Verdict
    hashed: Matched
    grant: Extent
    candidate: Candidates
    settle: Candidates
    share: Shared
    finish: Pairs
    failed: Failure
    load: Load
    verify: Verify
    counted: Admitted
    full: Freed
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    def __init__(self, laid_out: _Optional[_Union[Known, _Mapping]] = ..., sampled: _Optional[_Union[Verdict, _Mapping]] = ..., hashed: _Optional[_Union[Matched, _Mapping]] = ..., grant: _Optional[_Union[Extent, _Mapping]] = ..., candidate: _Optional[_Union[Candidates, _Mapping]] = ..., settle: _Optional[_Union[Candidates, _Mapping]] = ..., share: _Optional[_Union[Shared, _Mapping]] = ..., finish: _Optional[_Union[Pairs, _Mapping]] = ..., failed: _Optional[_Union[Failure, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., verify: _Optional[_Union[Verify, _Mapping]] = ..., counted: _Optional[_Union[Admitted, _Mapping]] = ..., full: _Optional[_Union[Freed, _Mapping]] = ..., segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("number", "size", "handle")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    number: int
    size: int
    handle: bytes
    def __init__(self, number: _Optional[int] = ..., size: _Optional[int] = ..., handle: _Optional[bytes] = ...) -> None: ...

class Full(_message.Message):
    __slots__ = ("call",)
    CALL_FIELD_NUMBER: _ClassVar[int]
    call: str
    def __init__(self, call: _Optional[str] = ...) -> None: ...

class Freed(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Failure(_message.Message):
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

class Load(_message.Message):
    __slots__ = ("kind", "device", "threads", "lanes", "sources", "group_sizes", "group_tensors")
    KIND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZES_FIELD_NUMBER: _ClassVar[int]
    GROUP_TENSORS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    device: str
    threads: int
    lanes: int
    sources: _containers.RepeatedCompositeFieldContainer[Source]
    group_sizes: _containers.RepeatedScalarFieldContainer[int]
    group_tensors: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, kind: _Optional[str] = ..., device: _Optional[str] = ..., threads: _Optional[int] = ..., lanes: _Optional[int] = ..., sources: _Optional[_Iterable[_Union[Source, _Mapping]]] = ..., group_sizes: _Optional[_Iterable[int]] = ..., group_tensors: _Optional[_Iterable[int]] = ...) -> None: ...

class Source(_message.Message):
    __slots__ = ("component", "file", "is_index")
    COMPONENT_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    IS_INDEX_FIELD_NUMBER: _ClassVar[int]
    component: str
    file: str
    is_index: bool
    def __init__(self, component: _Optional[str] = ..., file: _Optional[str] = ..., is_index: bool = ...) -> None: ...

class Verify(_message.Message):
    __slots__ = ("kind", "device", "blobs", "segments", "offsets", "lengths", "digests")
    KIND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    device: str
    blobs: _containers.RepeatedScalarFieldContainer[int]
    segments: _containers.RepeatedScalarFieldContainer[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    digests: bytes
    def __init__(self, kind: _Optional[str] = ..., device: _Optional[str] = ..., blobs: _Optional[_Iterable[int]] = ..., segments: _Optional[_Iterable[int]] = ..., offsets: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ..., digests: _Optional[bytes] = ...) -> None: ...

class Verified(_message.Message):
    __slots__ = ("blobs", "bytes", "bad", "all")
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BAD_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    blobs: int
    bytes: int
    bad: _containers.RepeatedScalarFieldContainer[int]
    all: bool
    def __init__(self, blobs: _Optional[int] = ..., bytes: _Optional[int] = ..., bad: _Optional[_Iterable[int]] = ..., all: bool = ...) -> None: ...

class Received(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Idle(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class File(_message.Message):
    __slots__ = ("device", "inode", "size", "mtime_ns", "ctime_ns", "trusted", "metadata", "has_metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    INODE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    MTIME_NS_FIELD_NUMBER: _ClassVar[int]
    CTIME_NS_FIELD_NUMBER: _ClassVar[int]
    TRUSTED_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    HAS_METADATA_FIELD_NUMBER: _ClassVar[int]
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    trusted: bool
    metadata: _containers.ScalarMap[str, str]
    has_metadata: bool
    def __init__(self, device: _Optional[int] = ..., inode: _Optional[int] = ..., size: _Optional[int] = ..., mtime_ns: _Optional[int] = ..., ctime_ns: _Optional[int] = ..., trusted: bool = ..., metadata: _Optional[_Mapping[str, str]] = ..., has_metadata: bool = ...) -> None: ...

class Tensors(_message.Message):
    __slots__ = ("file", "names", "dtypes", "ranks", "dimensions", "offsets", "lengths")
    FILE_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    DTYPES_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    file: int
    names: _containers.RepeatedScalarFieldContainer[str]
    dtypes: _containers.RepeatedScalarFieldContainer[str]
    ranks: _containers.RepeatedScalarFieldContainer[int]
    dimensions: _containers.RepeatedScalarFieldContainer[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, file: _Optional[int] = ..., names: _Optional[_Iterable[str]] = ..., dtypes: _Optional[_Iterable[str]] = ..., ranks: _Optional[_Iterable[int]] = ..., dimensions: _Optional[_Iterable[int]] = ..., offsets: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("phase", "done", "total")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    phase: str
    done: int
    total: int
    def __init__(self, phase: _Optional[str] = ..., done: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...

class Counted(_message.Message):
    __slots__ = ("tensors", "name_bytes", "total_bytes")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    NAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    tensors: int
    name_bytes: int
    total_bytes: int
    def __init__(self, tensors: _Optional[int] = ..., name_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class Admitted(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LaidOut(_message.Message):
    __slots__ = ("lanes", "groups", "ignored_groups")
    LANES_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    IGNORED_GROUPS_FIELD_NUMBER: _ClassVar[int]
    lanes: int
    groups: int
    ignored_groups: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, lanes: _Optional[int] = ..., groups: _Optional[int] = ..., ignored_groups: _Optional[_Iterable[str]] = ...) -> None: ...

class Known(_message.Message):
    __slots__ = ("known", "hash_first", "sample")
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    HASH_FIRST_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    known: _containers.RepeatedScalarFieldContainer[int]
    hash_first: bool
    sample: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, known: _Optional[_Iterable[int]] = ..., hash_first: bool = ..., sample: _Optional[_Iterable[int]] = ...) -> None: ...

class Digests(_message.Message):
    __slots__ = ("tensors", "digests")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedScalarFieldContainer[int]
    digests: bytes
    def __init__(self, tensors: _Optional[_Iterable[int]] = ..., digests: _Optional[bytes] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("hash_first",)
    HASH_FIRST_FIELD_NUMBER: _ClassVar[int]
    hash_first: bool
    def __init__(self, hash_first: bool = ...) -> None: ...

class Hashed(_message.Message):
    __slots__ = ("digests", "lanes")
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    digests: Digests
    lanes: int
    def __init__(self, digests: _Optional[_Union[Digests, _Mapping]] = ..., lanes: _Optional[int] = ...) -> None: ...

class Matched(_message.Message):
    __slots__ = ("matched",)
    MATCHED_FIELD_NUMBER: _ClassVar[int]
    matched: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, matched: _Optional[_Iterable[int]] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("ends", "need")
    ENDS_FIELD_NUMBER: _ClassVar[int]
    NEED_FIELD_NUMBER: _ClassVar[int]
    ends: _containers.RepeatedScalarFieldContainer[int]
    need: int
    def __init__(self, ends: _Optional[_Iterable[int]] = ..., need: _Optional[int] = ...) -> None: ...

class Extent(_message.Message):
    __slots__ = ("segment", "offset", "length")
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    segment: int
    offset: int
    length: int
    def __init__(self, segment: _Optional[int] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("tensor", "digest")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    tensor: int
    digest: bytes
    def __init__(self, tensor: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class Candidates(_message.Message):
    __slots__ = ("found", "blobs", "segments", "offsets")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    found: _containers.RepeatedScalarFieldContainer[bool]
    blobs: _containers.RepeatedScalarFieldContainer[int]
    segments: _containers.RepeatedScalarFieldContainer[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, found: _Optional[_Iterable[bool]] = ..., blobs: _Optional[_Iterable[int]] = ..., segments: _Optional[_Iterable[int]] = ..., offsets: _Optional[_Iterable[int]] = ...) -> None: ...

class Settle(_message.Message):
    __slots__ = ("tensors", "digests", "segments", "offsets", "differences", "differing")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    DIFFERING_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedScalarFieldContainer[int]
    digests: bytes
    segments: _containers.RepeatedScalarFieldContainer[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    differences: _containers.RepeatedScalarFieldContainer[int]
    differing: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tensors: _Optional[_Iterable[int]] = ..., digests: _Optional[bytes] = ..., segments: _Optional[_Iterable[int]] = ..., offsets: _Optional[_Iterable[int]] = ..., differences: _Optional[_Iterable[int]] = ..., differing: _Optional[_Iterable[int]] = ...) -> None: ...

class Share(_message.Message):
    __slots__ = ("tensors", "blobs", "segments", "offsets")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedScalarFieldContainer[int]
    blobs: _containers.RepeatedScalarFieldContainer[int]
    segments: _containers.RepeatedScalarFieldContainer[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tensors: _Optional[_Iterable[int]] = ..., blobs: _Optional[_Iterable[int]] = ..., segments: _Optional[_Iterable[int]] = ..., offsets: _Optional[_Iterable[int]] = ...) -> None: ...

class Shared(_message.Message):
    __slots__ = ("uses",)
    USES_FIELD_NUMBER: _ClassVar[int]
    uses: _containers.RepeatedScalarFieldContainer[Use]
    def __init__(self, uses: _Optional[_Iterable[_Union[Use, str]]] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ("read", "placed", "sealed", "equal")
    READ_FIELD_NUMBER: _ClassVar[int]
    PLACED_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    EQUAL_FIELD_NUMBER: _ClassVar[int]
    read: int
    placed: _containers.RepeatedScalarFieldContainer[int]
    sealed: _containers.RepeatedScalarFieldContainer[int]
    equal: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, read: _Optional[int] = ..., placed: _Optional[_Iterable[int]] = ..., sealed: _Optional[_Iterable[int]] = ..., equal: _Optional[_Iterable[bool]] = ...) -> None: ...

class Pairs(_message.Message):
    __slots__ = ("placed", "placed_segments", "placed_offsets", "sealed", "sealed_segments", "sealed_offsets", "lengths")
    PLACED_FIELD_NUMBER: _ClassVar[int]
    PLACED_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    PLACED_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    SEALED_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    SEALED_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    placed: _containers.RepeatedScalarFieldContainer[int]
    placed_segments: _containers.RepeatedScalarFieldContainer[int]
    placed_offsets: _containers.RepeatedScalarFieldContainer[int]
    sealed: _containers.RepeatedScalarFieldContainer[int]
    sealed_segments: _containers.RepeatedScalarFieldContainer[int]
    sealed_offsets: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, placed: _Optional[_Iterable[int]] = ..., placed_segments: _Optional[_Iterable[int]] = ..., placed_offsets: _Optional[_Iterable[int]] = ..., sealed: _Optional[_Iterable[int]] = ..., sealed_segments: _Optional[_Iterable[int]] = ..., sealed_offsets: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ...) -> None: ...
