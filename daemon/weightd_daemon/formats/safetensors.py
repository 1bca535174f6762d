"""The safetensors format: 8 bytes of header length, a JSON header, then the tensors' bytes without gaps.

What is accepted is what the safetensors package 0.8 accepts, extra keys in a tensor's entry included (it ignores them),
except for these, which are refused here and accepted there:

- a key that occurs twice in one object: a tensor, a metadata key, or anything inside an ignored extra key;
- white space before the header's opening brace (the format's own specification forbids it);
- a tensor's entry written as a JSON array, or its dtype as a JSON object (accidents of its parser);
- a dimension, or a product of the dimensions so far, of 2**63 and more (reachable only with zero-size tensors);
- more than `MAX_TENSORS` tensors, `MAX_DIMENSIONS` dimensions, `MAX_NAME_BYTES` bytes of a name, `MAX_METADATA_BYTES`
  bytes of metadata (keys and values together), or `MAX_VALUES` JSON values: limits far beyond real checkpoints, so
  that a header cannot cost memory without bounds.

Names are not judged further: empty ones and ones with control characters are valid there and here, so whoever prints a
name must quote it, as the messages here do.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Final, NoReturn

from weightd.errors import FormatError
from weightd.types import DTYPE_BITS, FileLayout, TensorSpec

from . import label, quote

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_HEADER_BYTES: Final = 100_000_000
"""The header's longest length in bytes; safetensors' own cap."""
MAX_DEPTH: Final = 127
"""The deepest nesting of JSON arrays and objects; safetensors' own cap. A plain header nests 3 deep."""
MAX_TENSORS: Final = 1_000_000
MAX_DIMENSIONS: Final = 64
MAX_NAME_BYTES: Final = 4096
MAX_METADATA_BYTES: Final = 16 << 20
MAX_VALUES: Final = 20_000_000

_PREFIX_BYTES: Final = 8
_METADATA: Final = "__metadata__"
_ENTRY_KEYS: Final = ("dtype", "shape", "data_offsets")
_INT_LIMIT: Final = 2**63
_LFS_MAGIC: Final = b"version https://git-lfs"
_CONVERT: Final = (
    "convert it with safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors'), "
    "then load that"
)
_NOT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
# A string to its end, closed or not (so that a scan stays linear whatever it meets), or one bracket.
_TOKENS: Final = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_SURROGATE_ESCAPE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def read_layout(name: str, size: int, read: Callable[[int, int], bytes]) -> FileLayout:
    """Read and check the header of a safetensors file.

    `name` is what messages call the file, `size` its length in bytes, and `read(offset, length)` returns `length` bytes
    of it, or fewer at its end. The layout's tensors are in order of their offset in the file (zero-size tensors before
    another at the same offset, and among themselves in the header's order); offsets are absolute, in bytes.

    Raises FormatError for anything but a whole, well-formed safetensors file.
    """
    return _Reader(name, size).layout(read)


def _shorten(value: object, limit: int = 80) -> str:
    """A piece of a hostile file, quoted, on one line and of bounded length."""
    if isinstance(value, (str, bytes)):
        return quote(value, limit)
    if isinstance(value, list):
        # Never the repr of the whole: it may hold millions of values, and lists in lists.
        text = ", ".join("a list" if isinstance(item, list) else _shorten(item, 24) for item in value[:8])
        return f"[{text}, ...]" if len(value) > 8 else f"[{text}]"
    if isinstance(value, dict):
        return "an object"
    return json.dumps(value)


class _Reader:
    """One file's checks; it exists so that every message can name the file."""

    def __init__(self, name: str, size: int) -> None:
        self._label = label(name)
        self._size = size

    def _fail(self, fault: str) -> NoReturn:
        raise FormatError(f"{self._label}: {fault}")

    def layout(self, read: Callable[[int, int], bytes]) -> FileLayout:
        header = self._header(read)
        data_start = _PREFIX_BYTES + len(header)
        document = self._parse(header)
        metadata = self._metadata(document.pop(_METADATA, None))
        if len(document) > MAX_TENSORS:
            self._fail(f"header lists {len(document)} tensors, more than the {MAX_TENSORS} that are supported")
        spans = [self._tensor(name, entry) for name, entry in document.items()]
        spans.sort(key=lambda spec: (spec.offset, spec.length))  # stable: the header's order among equals
        self._check_cover(spans, self._size - data_start)
        return FileLayout(tuple(spec._replace(offset=spec.offset + data_start) for spec in spans), metadata)

    def _header(self, read: Callable[[int, int], bytes]) -> bytes:
        """The header's bytes, once its length is known to be plausible."""
        if self._size == 0:
            self._fail("file is empty; it was probably not downloaded completely")
        head = read(0, min(self._size, 32))
        if len(head) < min(self._size, 32):
            self._fail(f"file ends at byte {len(head)}, but had {self._size} bytes when it was opened: it was changed")
        # A valid header may have a length whose bytes look like a pickle's, so its brace is looked at first.
        if head[_PREFIX_BYTES : _PREFIX_BYTES + 1] != b"{":
            self._refuse_other_formats(head)
        if self._size < _PREFIX_BYTES:
            self._fail(f"file has {self._size} bytes, too few for the 8 bytes of the header's length: truncated")
        length = int.from_bytes(head[:_PREFIX_BYTES], "little")
        if length == 0:
            self._fail("header length is 0; not a safetensors file")
        if length > MAX_HEADER_BYTES:
            self._fail(
                f"header length {length} is over the limit of {MAX_HEADER_BYTES} bytes; "
                f"not a safetensors file, or a damaged one"
            )
        if length > self._size - _PREFIX_BYTES:
            self._fail(
                f"header length {length} reaches past the file's end at {self._size} bytes; "
                f"truncated, or not a safetensors file"
            )
        if head[_PREFIX_BYTES] != ord("{"):
            self._fail(
                f"header begins with {_shorten(head[_PREFIX_BYTES : _PREFIX_BYTES + 1])} instead of '{{'; "
                f"not a safetensors file"
            )
        header = read(_PREFIX_BYTES, length)
        if len(header) != length:
            self._fail(f"only {len(header)} of the header's {length} bytes could be read: the file was changed")
        return header

    def _refuse_other_formats(self, head: bytes) -> None:
        """Name the formats that people mistake for safetensors."""
        if head.startswith(b"PK\x03\x04"):
            self._fail(f"this is a zip archive, as torch.save writes it (a pickle); {_CONVERT}")
        if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
            self._fail(f"this is a pickle, as torch.save writes it; {_CONVERT}")
        if head.startswith(_LFS_MAGIC):
            self._fail("this is a Git LFS pointer: the real file has not been pulled; run 'git lfs pull'")

    def _parse(self, header: bytes) -> dict[str, object]:
        """The header as a JSON object, with nothing in it that JSON or safetensors would refuse."""
        try:
            text = header.decode("utf-8")
        except UnicodeDecodeError as error:
            self._fail(f"header is not UTF-8 at its byte {error.start}; damaged")
        # Both are counted in strings too: an upper bound is enough to bound memory before anything is built.
        values = header.count(b",") + header.count(b"[") + header.count(b"{")
        if values > MAX_VALUES:
            self._fail(f"header holds about {values} JSON values, more than the {MAX_VALUES} that are supported")
        self._check_depth(header, text)
        try:
            if _SURROGATE_ESCAPE.search(header):
                # Half a surrogate pair makes a str that no wire can carry; encoding finds it wherever it is.
                json.dumps(json.loads(text, object_pairs_hook=list), ensure_ascii=False).encode()
            document = json.loads(
                text,
                object_pairs_hook=self._object,
                parse_int=_integer,
                parse_float=_finite,
                parse_constant=_refuse_constant,
            )
        except FormatError:
            raise
        except json.JSONDecodeError as error:
            self._fail(f"header is not valid JSON: {error.msg} at its character {error.pos}")
        except UnicodeEncodeError:
            self._fail("header is not valid JSON: half a surrogate pair in a string")
        except RecursionError:
            self._fail(f"header nests JSON deeper than {MAX_DEPTH} levels")
        except ValueError as error:
            self._fail(f"header is not valid JSON: {error}")
        # It begins with a brace, so that it is an object; this is for the type checker and for the next change.
        if not isinstance(document, dict):
            self._fail("header is not a JSON object")
        return document

    def _check_depth(self, header: bytes, text: str) -> None:
        """Refuse deep nesting before a recursive parser sees it."""
        # Three passes empty the brackets of every plain header; only odd ones pay for the exact scan.
        brackets = header.translate(None, _NOT_BRACKETS)
        for _ in range(3):
            brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if not brackets:
            return
        depth = 0
        for token in _TOKENS.finditer(text):
            first = text[token.start()]
            if first in "[{":
                depth += 1
                if depth > MAX_DEPTH:
                    self._fail(f"header nests JSON deeper than {MAX_DEPTH} levels")
            elif first != '"':
                depth -= 1

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    self._fail(f"header has the key {_shorten(key)} twice in one object; which one holds is undefined")
                seen.add(key)
        return result

    def _metadata(self, value: object) -> dict[str, str] | None:
        if value is None:
            return None
        if not isinstance(value, dict):
            self._fail(f"{_METADATA} must be an object of strings, not {_shorten(value)}")
        size = 0
        for key, text in value.items():
            if not isinstance(text, str):
                self._fail(f"{_METADATA} key {_shorten(key)} must be a string, not {_shorten(text)}")
            size += len(key.encode()) + len(text.encode())
        if size > MAX_METADATA_BYTES:
            self._fail(f"{_METADATA} holds {size} bytes, more than the {MAX_METADATA_BYTES} that are supported")
        return value

    def _tensor(self, name: str, entry: object) -> TensorSpec:
        """One tensor, its offset still relative to the data; whether spans fit together is checked later."""
        if len(name) > MAX_NAME_BYTES // 4 and len(name.encode()) > MAX_NAME_BYTES:
            self._fail(f"tensor {_shorten(name)}: name is longer than {MAX_NAME_BYTES} bytes")
        if not isinstance(entry, dict):
            self._fail(f"tensor {_shorten(name)}: its entry must be an object, not {_shorten(entry)}")
        try:
            dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        except KeyError:
            missing = next(key for key in _ENTRY_KEYS if key not in entry)
            self._fail(f"tensor {_shorten(name)}: its entry has no {missing!r}")
        if not isinstance(dtype, str):
            self._fail(f"tensor {_shorten(name)}: dtype must be a string, not {_shorten(dtype)}")
        bits = DTYPE_BITS.get(dtype)
        if bits is None:
            self._fail(f"tensor {_shorten(name)}: dtype {_shorten(dtype)} is not one that safetensors 0.8 knows")
        dimensions = self._shape(name, shape)
        begin, end = self._offsets(name, offsets)
        total = math.prod(dimensions) * bits
        if total % 8:
            self._fail(
                f"tensor {_shorten(name)}: {dtype} of shape {_shorten(shape)} takes {total} bits, "
                f"which is not a whole number of bytes"
            )
        if end - begin != total // 8:
            self._fail(
                f"tensor {_shorten(name)}: data_offsets [{begin}, {end}] hold {end - begin} bytes, "
                f"but {dtype} of shape {_shorten(shape)} needs {total // 8}"
            )
        return TensorSpec(name, dtype, dimensions, begin, end - begin)

    def _shape(self, name: str, shape: object) -> tuple[int, ...]:
        if not isinstance(shape, list):
            self._fail(f"tensor {_shorten(name)}: shape must be a list, not {_shorten(shape)}")
        if len(shape) > MAX_DIMENSIONS:
            self._fail(f"tensor {_shorten(name)}: shape has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
        product = 1
        for dimension in shape:
            # `type`, not isinstance: true and false are ints to Python.
            if type(dimension) is not int or not 0 <= dimension < _INT_LIMIT:
                self._fail(
                    f"tensor {_shorten(name)}: shape {_shorten(shape)} holds {_shorten(dimension)}, "
                    f"which is not a whole number from 0 to 2**63 - 1"
                )
            product *= dimension
            if product >= _INT_LIMIT:
                self._fail(f"tensor {_shorten(name)}: shape {_shorten(shape)} overflows: 2**63 elements or more")
        return tuple(shape)

    def _offsets(self, name: str, offsets: object) -> tuple[int, int]:
        if not isinstance(offsets, list) or len(offsets) != 2:
            self._fail(f"tensor {_shorten(name)}: data_offsets must be a list of two numbers, not {_shorten(offsets)}")
        begin, end = offsets
        if type(begin) is not int or type(end) is not int or not (0 <= begin < _INT_LIMIT and 0 <= end < _INT_LIMIT):
            self._fail(
                f"tensor {_shorten(name)}: data_offsets {_shorten(offsets)} must be whole numbers from 0 to 2**63 - 1"
            )
        if begin > end:
            self._fail(f"tensor {_shorten(name)}: data_offsets [{begin}, {end}] end before they begin")
        return begin, end

    def _check_cover(self, spans: list[TensorSpec], data_bytes: int) -> None:
        """The tensors must follow one another without a hole, from the data's begin to the file's end."""
        position = 0
        previous = ""
        for spec in spans:
            end = spec.offset + spec.length
            if end > data_bytes:
                self._fail(
                    f"tensor {_shorten(spec.name)}: data_offsets [{spec.offset}, {end}] reach past the end of the data "
                    f"at {data_bytes} bytes; the file is truncated"
                )
            if spec.offset < position:
                self._fail(
                    f"tensor {_shorten(spec.name)}: data_offsets [{spec.offset}, {end}] overlap tensor "
                    f"{_shorten(previous)}, which ends at {position}"
                )
            if spec.offset > position:
                self._fail(
                    f"tensor {_shorten(spec.name)}: data_offsets [{spec.offset}, {end}] leave a hole "
                    f"of {spec.offset - position} bytes at {position}"
                )
            position, previous = end, spec.name
        if position != data_bytes:
            self._fail(f"{data_bytes - position} trailing bytes after the last tensor, which belong to no tensor")


def _integer(text: str) -> int | float:
    # As serde reads numbers: what 64 bits cannot hold, and -0, are floats, so that neither passes for a dimension.
    if len(text) > 20 or text == "-0":
        return _finite(text)
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is out of range")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON value")
