"""The GGUF format, versions 2 and 3, little-endian: keys and values, a directory of tensors, then their bytes.

What is accepted is what ggml's own reader (gguf.cpp) accepts: tensors lie in the directory's order, the first at the
begin of the data, each other one where the one before it ends, rounded up to the alignment. The last one's padding may
be missing, and what follows it is not looked at. These differ:

- names of 64 bytes and more, and arrays of arrays up to `MAX_DEPTH` deep, are accepted here and refused there;
- a key, a name or a string value that is not UTF-8 is refused here (strings in arrays are not decoded, so not judged);
- dimensions must come to less than 2**63 bytes also where another one is 0;
- refused are more than `MAX_KEYS` keys, `MAX_TENSORS` tensors, `MAX_KEY_BYTES` bytes of a key, `MAX_NAME_BYTES` of a
  name, `MAX_METADATA_BYTES` of metadata as it is kept (below), `MAX_HEADER_BYTES` before the data, and an alignment
  over `MAX_ALIGNMENT`: limits far beyond real checkpoints, so that a header cannot cost memory without bounds;
- where a file says that it is one of several (`split.count`), `split.no` and `split.tensors.count` must be there too.

Quantised types go by ggml's name after "GGML_" ("GGML_Q4_K"), the others by safetensors' name, which is the same as
ggml's. Shapes are row-major: ggml's dimensions in reverse order.

Metadata is every key with its value as text: strings as they are, numbers in decimal (a float with the digits that its
double needs), truth values as "true" and "false", and an array, which may hold a whole vocabulary, as a line such as
"[49152 string] xxh3_128:0123…": its length, its type, and the digest of its elements as they are encoded in the file.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from weightd._formats import GGUF
from weightd._proto.v1 import handles_pb2
from weightd.errors import FormatError
from weightd.types import FileLayout, FilePart, TensorSpec
from weightd_daemon.core import digest

from . import label, quote

if TYPE_CHECKING:
    from collections.abc import Callable

    Read = Callable[[int, int], bytes]

MAX_HEADER_BYTES: Final = 100_000_000
"""The most bytes before the data; the same as of a safetensors file."""
MAX_KEYS: Final = 65_536
MAX_KEY_BYTES: Final = 65_535
"""The longest key in bytes; the format's own cap."""
MAX_METADATA_BYTES: Final = 16 << 20
MAX_DEPTH: Final = 4
"""The deepest nesting of arrays."""
MAX_TENSORS: Final = 1_000_000
MAX_DIMENSIONS: Final = 4
"""ggml's own cap (GGML_MAX_DIMS)."""
MAX_NAME_BYTES: Final = 4096
MAX_ALIGNMENT: Final = 16 << 20

_WINDOW: Final = 1 << 20
_DEFAULT_ALIGNMENT: Final = 32
_INT_LIMIT: Final = 2**63
_LEAST_KEY_BYTES: Final = 13  # an empty key, its type, and a value of one byte
_LEAST_TENSOR_BYTES: Final = 24  # an empty name, no dimensions, type and offset
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_SCALARS: Final = {
    0: ("uint8", struct.Struct("<B")),
    1: ("int8", struct.Struct("<b")),
    2: ("uint16", struct.Struct("<H")),
    3: ("int16", struct.Struct("<h")),
    4: ("uint32", struct.Struct("<I")),
    5: ("int32", struct.Struct("<i")),
    6: ("float32", struct.Struct("<f")),
    7: ("bool", struct.Struct("<?")),
    10: ("uint64", struct.Struct("<Q")),
    11: ("int64", struct.Struct("<q")),
    12: ("float64", struct.Struct("<d")),
}
_STRING: Final = 8
_ARRAY: Final = 9
_NAMES: Final = {number: name for number, (name, _) in _SCALARS.items()} | {_STRING: "string", _ARRAY: "array"}
_LEAST_BYTES: Final = {number: form.size for number, (_, form) in _SCALARS.items()} | {_STRING: 8, _ARRAY: 12}
"""Bytes that one element of an array takes at least."""
_ALIGNMENT_KEY: Final = "general.alignment"
_DTYPES: Final = frozenset(handles_pb2.DType.keys())


def read_layout(name: str, size: int, read: Read) -> FileLayout:
    """Read and check everything before the data of a GGUF file.

    `name` is what messages call the file, `size` its length in bytes, and `read(offset, length)` returns `length` bytes
    of it, or fewer at its end. The layout's tensors are in the file's order; offsets are absolute, in bytes.

    Raises FormatError for anything but a whole, well-formed GGUF file, and where the package gguf is not installed.
    """
    return _Reader(name, size, read).layout()


class _Type(NamedTuple):
    """A type of ggml's: our name for it, and how many elements lie in a block of how many bytes."""

    dtype: str
    elements: int
    bytes: int


class _Reader:
    """One file, read from front to back in windows; it exists so that every message can name the file."""

    def __init__(self, name: str, size: int, read: Read) -> None:
        self._label = label(name)
        self._size = size
        self._read = read
        self._window = b""
        self._start = 0
        self._position = 0

    def _fail(self, fault: str) -> NoReturn:
        raise FormatError(f"{self._label}: {fault}")

    def layout(self) -> FileLayout:
        types = self._types()
        tensor_count, key_count = self._head()
        values = self._values(key_count)
        alignment = self._alignment(values)
        tensors = [self._tensor(types) for _ in range(tensor_count)]
        metadata = {key: text for key, (_, text) in values.items()}
        return FileLayout(self._placed(tensors, alignment), metadata, self._part(values))

    def _types(self) -> dict[int, _Type]:
        """ggml's types by number, as the package knows them."""
        try:
            from gguf import GGML_QUANT_SIZES
        except ImportError:
            self._fail(
                "GGUF files need the package gguf where the daemon runs: pip install '.[gguf]' in weightd's checkout"
            )
        return {
            int(number): _Type(number.name if elements == 1 else f"GGML_{number.name}", elements, length)
            for number, (elements, length) in GGML_QUANT_SIZES.items()
        }

    # -- reading -----------------------------------------------------------------------------------------------------

    def _need(self, count: int, what: str) -> None:
        """Refuse what the file, or what we read of one, has no room for."""
        end = self._position + count
        if end > self._size:
            self._fail(f"{what} reaches past the file's end at {self._size} bytes; truncated, or damaged")
        if end > MAX_HEADER_BYTES:
            self._fail(f"{what} reaches past byte {MAX_HEADER_BYTES}, up to which keys and tensor directory may reach")

    def _consume(self, count: int, what: str) -> bytes:
        self._need(count, what)
        begin = self._position - self._start
        if begin + count > len(self._window):
            length = min(max(count, _WINDOW), self._size - self._position)
            self._window, self._start, begin = self._fetch(self._position, length), self._position, 0
        self._position += count
        return self._window[begin : begin + count]

    def _fetch(self, offset: int, length: int) -> bytes:
        found = self._read(offset, length)
        if len(found) != length:
            self._fail(f"only {len(found)} of {length} bytes could be read at {offset}: the file was changed")
        return found

    def _skip(self, count: int, what: str) -> None:
        self._need(count, what)
        self._position += count

    def _u32(self, what: str) -> int:
        number: int = _U32.unpack(self._consume(4, what))[0]
        return number

    def _u64(self, what: str) -> int:
        number: int = _U64.unpack(self._consume(8, what))[0]
        return number

    def _text(self, what: str, limit: int) -> str:
        length = self._u64(what)
        if length > limit:
            self._fail(f"{what} has {length} bytes, more than the {limit} that are supported")
        raw = self._consume(length, what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self._fail(f"{what} {quote(raw)} is not UTF-8; damaged")

    # -- keys and values ---------------------------------------------------------------------------------------------

    def _head(self) -> tuple[int, int]:
        """How many tensors and keys there are, once both are known to be plausible."""
        magic = self._consume(4, "the magic number")
        if magic != GGUF.magic:
            self._fail(f"begins with {quote(magic)} instead of {GGUF.magic!r}; not a GGUF file")
        version = self._u32("the version")
        if version and not version & 0xFFFF:
            self._fail("is big-endian; only little-endian GGUF files are supported: convert it")
        if version not in (2, 3):
            self._fail(f"GGUF version {version} is not supported, only 2 and 3 are; convert the checkpoint again")
        tensors, keys = self._u64("the number of tensors"), self._u64("the number of keys")
        for count, what, limit, least in (
            (tensors, "tensors", MAX_TENSORS, _LEAST_TENSOR_BYTES),
            (keys, "keys", MAX_KEYS, _LEAST_KEY_BYTES),
        ):
            if count > limit:
                self._fail(f"lists {count} {what}, more than the {limit} that are supported")
            self._need(count * least, f"a list of {count} {what}")
        return tensors, keys

    def _values(self, count: int) -> dict[str, tuple[int, str]]:
        """Every key with the number of its type and its value as text."""
        values: dict[str, tuple[int, str]] = {}
        room = MAX_METADATA_BYTES
        for number in range(count):
            key = self._text(f"key {number}", MAX_KEY_BYTES)
            if not key:
                self._fail(f"key {number} is empty")
            what = f"key {quote(key)}"
            if key in values:
                self._fail(f"{what} is there twice; which one holds is undefined")
            kind = self._u32(f"the type of {what}")
            text = self._value(kind, what)
            room -= len(key.encode()) + len(text.encode())
            if room < 0:
                self._fail(f"{what}: metadata holds more than the {MAX_METADATA_BYTES} bytes that are supported")
            values[key] = kind, text
        return values

    def _value(self, kind: int, what: str) -> str:
        if kind == _STRING:
            return self._text(f"the value of {what}", MAX_METADATA_BYTES)
        if kind == _ARRAY:
            return self._array(what)
        if kind not in _SCALARS:
            self._fail(f"{what}: its value has type {kind}, which GGUF does not have")
        _, form = _SCALARS[kind]
        value = form.unpack(self._consume(form.size, f"the value of {what}"))[0]
        return str(value).lower()  # "true", "nan"; float's text has the digits that it needs

    def _array(self, what: str) -> str:
        kind, count = self._array_head(what)
        begin = self._position
        self._pass_elements(kind, count, what, 1)
        hasher = digest.new_hasher()
        for offset in range(begin, self._position, _WINDOW):
            hasher.update(memoryview(self._fetch(offset, min(_WINDOW, self._position - offset))))
        return f"[{count} {_NAMES[kind]}] xxh3_128:{hasher.digest().hex()}"

    def _array_head(self, what: str) -> tuple[int, int]:
        kind, count = self._u32(f"the element type of {what}"), self._u64(f"the length of {what}")
        if kind not in _NAMES:
            self._fail(f"{what}: its elements have type {kind}, which GGUF does not have")
        self._need(count * _LEAST_BYTES[kind], f"{what}: an array of {count} elements")
        return kind, count

    def _pass_elements(self, kind: int, count: int, what: str, depth: int) -> None:
        """Go to the end of an array's elements."""
        if kind in _SCALARS:
            self._skip(count * _LEAST_BYTES[kind], what)
        elif kind == _STRING:
            for _ in range(count):
                self._skip(self._u64(what), f"a string in {what}")
        elif depth == MAX_DEPTH:
            self._fail(f"{what}: nests arrays deeper than {MAX_DEPTH} levels")
        else:
            for _ in range(count):
                self._pass_elements(*self._array_head(what), what, depth + 1)

    def _alignment(self, values: dict[str, tuple[int, str]]) -> int:
        kind, text = values.get(_ALIGNMENT_KEY, (4, str(_DEFAULT_ALIGNMENT)))
        if _NAMES[kind] != "uint32":
            self._fail(f"key {_ALIGNMENT_KEY!r} must be a uint32, not {_NAMES[kind]}")
        alignment = int(text)
        if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self._fail(f"key {_ALIGNMENT_KEY!r} is {alignment}, not a power of two from 1 to {MAX_ALIGNMENT}")
        return alignment

    def _part(self, values: dict[str, tuple[int, str]]) -> FilePart | None:
        """What the file says of being one of several; None where it says nothing, or that it is the only one."""
        if "split.count" not in values or (count := self._whole(values, "split.count")) < 2:
            return None
        part = FilePart(self._whole(values, "split.no"), count, self._whole(values, "split.tensors.count"))
        if part.number >= count:
            self._fail(f"key 'split.no' is {part.number}, but there are {count} parts, numbered from 0")
        return part

    def _whole(self, values: dict[str, tuple[int, str]], key: str) -> int:
        kind, text = values.get(key, (_STRING, ""))
        if "int" not in _NAMES[kind] or int(text) < 0:
            self._fail(f"key {key!r} must be there, as the file is one of several, and a whole number")
        return int(text)

    # -- tensors -----------------------------------------------------------------------------------------------------

    def _tensor(self, types: dict[int, _Type]) -> TensorSpec:
        """One entry of the directory, its offset still relative to the data, and not checked yet."""
        name = self._text("the name of a tensor", MAX_NAME_BYTES)
        what = f"tensor {quote(name)}"
        rank = self._u32(what)
        if rank > MAX_DIMENSIONS:
            self._fail(f"{what}: has {rank} dimensions, more than {MAX_DIMENSIONS}")
        dimensions = struct.unpack(f"<{rank}Q", self._consume(8 * rank, what))
        number, offset = self._u32(what), self._u64(what)
        if number not in types:
            self._fail(
                f"{what}: has type {number}, which the installed package gguf does not know; update that, "
                f"or convert the checkpoint again"
            )
        dtype, in_block, block_bytes = types[number]
        if f"DTYPE_{dtype}" not in _DTYPES:
            self._fail(f"{what}: has type {dtype}, which this version of weightd does not know")
        if math.prod(size or 1 for size in dimensions) * block_bytes >= _INT_LIMIT:  # empty ones too: numpy cannot
            self._fail(f"{what}: dimensions {list(dimensions)} overflow: they come to 2**63 bytes or more")
        row = dimensions[0] if rank else 1
        if row % in_block:
            self._fail(f"{what}: rows of {row} elements are no whole number of {dtype}'s blocks of {in_block}")
        return TensorSpec(name, dtype, dimensions[::-1], offset, math.prod(dimensions) // in_block * block_bytes)

    def _placed(self, tensors: list[TensorSpec], alignment: int) -> tuple[TensorSpec, ...]:
        """The tensors with absolute offsets, once they are known to follow one another."""
        start = -(-self._position // alignment) * alignment
        expected, before = 0, "the begin of the data"
        names: set[str] = set()
        placed: list[TensorSpec] = []
        for spec in tensors:
            what = f"tensor {quote(spec.name)}"
            if spec.name in names:
                self._fail(f"{what}: is there twice; which one holds is undefined")
            names.add(spec.name)
            if spec.offset != expected:
                self._fail(
                    f"{what}: its offset is {spec.offset} instead of {expected}: it must follow on {before}, "
                    f"without overlap or hole, at the alignment of {alignment}"
                )
            end = spec.offset + spec.length
            if start + end > self._size:
                self._fail(
                    f"{what}: its bytes reach to {start + end}, past the file's end at {self._size} bytes; truncated"
                )
            placed.append(spec._replace(offset=start + spec.offset))
            expected, before = -(-end // alignment) * alignment, what
        return tuple(placed)
