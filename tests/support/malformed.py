"""Malformed checkpoint files, each with a fragment that its error message must contain, and builders for more."""

from __future__ import annotations

import json
import struct
from typing import Any, Final


def build(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of a header (JSON, or bytes as they are) and data; `length` lies about the header's length."""
    raw = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: object = "U8", shape: object = (2,), offsets: object = (0, 2)) -> dict[str, Any]:
    """A tensor's entry in a header; the default is valid for two bytes of data."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def tensor(raw: str, data: bytes = b"ab") -> bytes:
    """A file whose only tensor, "a", has an entry of this raw JSON."""
    return build(b'{"a":' + raw.encode() + b"}", data)


VALID: Final = build({"a": entry()}, b"ab")
"""The smallest valid neighbour of the files below."""

_ENTRY: Final = '{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
_TAIL: Final = '"dtype":"U8","shape":[2],"data_offsets":[0,2]}'


def _nested(depth: int) -> str:
    return "[" * depth + "]" * depth


CORPUS: Final[dict[str, tuple[bytes, str]]] = {
    # The frame: what stands before the header.
    "empty": (b"", "file is empty"),
    "one_byte": (b"\x10", "1 bytes, too few"),
    "seven_bytes": (VALID[:7], "7 bytes, too few"),
    "only_length": (VALID[:8], "past the file's end"),
    "length_zero": (build(b"", b"abcdefgh"), "header length is 0"),
    "length_zero_then_brace": (build(b"{}", length=0), "header length is 0"),
    "length_over_cap": (build(b"{}", length=100_000_001), "over the limit of 100000000"),
    "length_all_ones": (build(b"{}", length=2**64 - 1), "over the limit of 100000000"),
    "length_past_end": (build({"a": entry()}, length=4096), "past the file's end"),
    "length_one_past_end": (build(b"{}", length=3), "past the file's end"),
    "header_cut": (VALID[:30], "past the file's end"),
    # Other formats.
    "zip_pickle": (b"PK\x03\x04" + bytes(60), "safetensors.torch.save_file(torch.load("),
    "raw_pickle": (b"\x80\x02}q\x00." + bytes(20), "this is a pickle"),
    "git_lfs_pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 90868376\n",
        "git lfs pull",
    ),
    "html_page": (b"<!DOCTYPE html><html><body>404</body></html>", "over the limit"),
    "zeros": (bytes(64), "header length is 0"),
    # The header as text.
    "leading_space": (build(b' {"a":' + _ENTRY.encode() + b"}", b"ab"), "begins with b' '"),
    "byte_order_mark": (build(b"\xef\xbb\xbf{}"), "begins with"),
    "array_header": (build(b"[]"), "begins with b'['"),
    "string_header": (build(b'"a"'), "begins with"),
    "not_utf8": (build(b'{"\xff\xfe":' + _ENTRY.encode() + b"}", b"ab"), "not UTF-8"),
    "cut_json": (build(b'{"a":' + _ENTRY.encode(), b"ab"), "not valid JSON"),
    "open_string": (build(b'{"a\\"\\"\\"\\"'), "not valid JSON"),
    "second_value": (build(b'{"a":' + _ENTRY.encode() + b"}{}", b"ab"), "not valid JSON: Extra data"),
    "nul_padding": (build(b'{"a":' + _ENTRY.encode() + b"}\0\0", b"ab"), "not valid JSON"),
    "raw_control_character": (build(b'{"a\x01":' + _ENTRY.encode() + b"}", b"ab"), "not valid JSON"),
    "lone_surrogate_name": (build(b'{"a\\ud800":' + _ENTRY.encode() + b"}", b"ab"), "surrogate"),
    "lone_surrogate_metadata": (
        build(b'{"__metadata__":{"k":"\\udc00"},"a":' + _ENTRY.encode() + b"}", b"ab"),
        "surrogate",
    ),
    "deep_arrays": (tensor('{"x":' + _nested(5000) + "," + _TAIL), "deeper than 127"),
    "deep_objects": (build(b'{"a":' * 200 + b"1" + b"}" * 200), "deeper than 127"),
    "deep_unclosed": (build(b'{"a":' + b"[" * 100_000), "deeper than 127"),
    "nan": (tensor('{"x":NaN,' + _TAIL), "NaN is not a JSON value"),
    "infinity": (tensor('{"x":-Infinity,' + _TAIL), "-Infinity is not a JSON value"),
    "float_out_of_range": (tensor('{"x":1e999,' + _TAIL), "out of range"),
    "integer_of_10000_digits": (tensor('{"x":' + "9" * 10_000 + "," + _TAIL), "out of range"),
    "leading_zero": (tensor('{"dtype":"U8","shape":[02],"data_offsets":[0,2]}'), "not valid JSON"),
    # Duplicate keys.
    "tensor_twice": (build(f'{{"a":{_ENTRY},"a":{_ENTRY}}}'.encode(), b"ab"), "the key 'a' twice"),
    "tensor_twice_escaped": (build(f'{{"a":{_ENTRY},"\\u0061":{_ENTRY}}}'.encode(), b"ab"), "the key 'a' twice"),
    "dtype_twice": (tensor('{"dtype":"U8",' + _TAIL), "the key 'dtype' twice"),
    "metadata_key_twice": (build(b'{"__metadata__":{"k":"v","k":"w"}}'), "the key 'k' twice"),
    "metadata_twice": (build(b'{"__metadata__":{},"__metadata__":{}}'), "the key '__metadata__' twice"),
    # Metadata.
    "metadata_list": (build({"__metadata__": []}), "__metadata__ must be an object of strings, not []"),
    "metadata_string": (build({"__metadata__": "pt"}), "__metadata__ must be an object of strings, not 'pt'"),
    "metadata_number": (build({"__metadata__": {"format": 1}}), "key 'format' must be a string, not 1"),
    "metadata_nested": (
        build({"__metadata__": {"format": {"a": "b"}}}),
        "key 'format' must be a string, not an object",
    ),
    "metadata_null_value": (build({"__metadata__": {"format": None}}), "key 'format' must be a string, not null"),
    # A tensor's entry.
    "entry_null": (tensor("null"), "entry must be an object, not null"),
    "entry_number": (tensor("7"), "entry must be an object, not 7"),
    "entry_array": (tensor('["U8",[2],[0,2]]'), "entry must be an object, not ['U8', a list, a list]"),
    "entry_empty": (tensor("{}"), "has no 'dtype'"),
    "no_shape": (tensor('{"dtype":"U8","data_offsets":[0,2]}'), "has no 'shape'"),
    "no_offsets": (tensor('{"dtype":"U8","shape":[2]}'), "has no 'data_offsets'"),
    "dtype_unknown": (build({"a": entry("F128")}, b"ab"), "dtype 'F128' is not one"),
    "dtype_lower_case": (build({"a": entry("u8")}, b"ab"), "dtype 'u8' is not one"),
    "dtype_number": (build({"a": entry(8)}, b"ab"), "dtype must be a string, not 8"),
    "dtype_object": (tensor('{"dtype":{"U8":null},"shape":[2],"data_offsets":[0,2]}'), "dtype must be a string"),
    "dtype_huge": (build({"a": entry("F" * 100_000)}, b"ab"), "FFFF'... is not one"),
    "shape_null": (build({"a": entry(shape=None)}, b"ab"), "shape must be a list, not null"),
    "shape_number": (build({"a": entry(shape=2)}, b"ab"), "shape must be a list, not 2"),
    "shape_negative": (build({"a": entry(shape=[-2])}, b"ab"), "holds -2"),
    "shape_two_negatives": (build({"a": entry(shape=[-1, -2])}, b"ab"), "holds -1"),
    "shape_minus_zero": (tensor('{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}', b""), "holds -0.0"),
    "shape_float": (build({"a": entry(shape=[2.0])}, b"ab"), "holds 2.0"),
    "shape_bool": (build({"a": entry(shape=[True], offsets=[0, 1])}, b"a"), "holds true"),
    "shape_string": (build({"a": entry(shape=["2"])}, b"ab"), "holds '2'"),
    "shape_nested": (build({"a": entry(shape=[[2]])}, b"ab"), "shape [a list] holds"),
    "shape_beyond_63_bits": (build({"a": entry(shape=[2**63])}, b"ab"), "not a whole number from 0 to 2**63 - 1"),
    "shape_beyond_64_bits": (build({"a": entry(shape=[2**64 + 2])}, b"ab"), "not a whole number from 0 to 2**63 - 1"),
    "shape_overflow": (build({"a": entry(shape=[2**32, 2**32])}, b"ab"), "overflows"),
    "shape_overflow_to_two": (build({"a": entry(shape=[2**33, 2**31, 2])}, b"ab"), "overflows"),
    "shape_overflow_then_zero": (build({"a": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}), "overflows"),
    "shape_65_dimensions": (build({"a": entry(shape=[1] * 64 + [2])}, b"ab"), "65 dimensions"),
    "name_5000_bytes": (build({"n" * 5000: entry()}, b"ab"), "longer than 4096 bytes"),
    "offsets_null": (build({"a": entry(offsets=None)}, b"ab"), "list of two numbers, not null"),
    "offsets_one": (build({"a": entry(offsets=[0])}, b"ab"), "list of two numbers, not [0]"),
    "offsets_three": (build({"a": entry(offsets=[0, 2, 2])}, b"ab"), "list of two numbers, not [0, 2, 2]"),
    "offsets_negative": (build({"a": entry(offsets=[-2, 0])}, b"ab"), "[-2, 0] must be whole numbers"),
    "offsets_float": (build({"a": entry(offsets=[0, 2.0])}, b"ab"), "[0, 2.0] must be whole numbers"),
    "offsets_bool": (build({"a": entry(shape=[1], offsets=[False, True])}, b"a"), "[false, true] must be whole"),
    "offsets_huge": (build({"a": entry(offsets=[0, 10**400])}, b"ab"), "out of range"),
    "offsets_backwards": (build({"a": entry(offsets=[2, 0])}, b"ab"), "[2, 0] end before they begin"),
    # Lengths.
    "too_few_bytes": (
        build({"a.b": entry("F32", [4], [0, 12])}, bytes(12)),
        "tensor 'a.b': data_offsets [0, 12] hold 12 bytes, but F32 of shape [4] needs 16",
    ),
    "too_many_bytes": (build({"a": entry("F16", [1], [0, 4])}, bytes(4)), "hold 4 bytes, but F16 of shape [1] needs 2"),
    "scalar_without_bytes": (build({"a": entry("F32", [], [0, 0])}), "shape [] needs 4"),
    "empty_with_bytes": (build({"a": entry("F32", [0], [0, 4])}, bytes(4)), "shape [0] needs 0"),
    "f4_odd": (build({"a": entry("F4", [3], [0, 2])}, b"ab"), "takes 12 bits"),
    "f6_misaligned": (build({"a": entry("F6_E2M3", [3], [0, 3])}, b"abc"), "takes 18 bits"),
    # How the tensors lie together.
    "past_end": (build({"a": entry(shape=[4], offsets=[0, 4])}, b"ab"), "past the end of the data at 2 bytes"),
    "far_past_end": (
        build({"a": entry(shape=[2**62], offsets=[0, 2**62])}, b"ab"),
        "past the end of the data at 2 bytes",
    ),
    "no_data": (build({"a": entry()}), "past the end of the data at 0 bytes"),
    "overlap": (
        build({"a": entry(shape=[3], offsets=[0, 3]), "b": entry(shape=[2], offsets=[2, 4])}, b"abcd"),
        "tensor 'b': data_offsets [2, 4] overlap tensor 'a'",
    ),
    "same_bytes_twice": (build({"a": entry(), "b": entry()}, b"ab"), "overlap tensor 'a'"),
    "contained": (
        build({"a": entry(shape=[4], offsets=[0, 4]), "b": entry(shape=[1], offsets=[1, 2])}, b"abcd"),
        "overlap tensor 'a'",
    ),
    "empty_inside_another": (build({"a": entry(), "z": entry(shape=[0], offsets=[1, 1])}, b"ab"), "overlap tensor 'a'"),
    "hole_first": (build({"a": entry(offsets=[1, 3])}, b"abc"), "hole of 1 bytes at 0"),
    "hole_between": (build({"a": entry(), "b": entry(offsets=[5, 7])}, b"abcdefg"), "hole of 3 bytes at 2"),
    "trailing_bytes": (build({"a": entry()}, b"abc"), "1 trailing bytes"),
    "trailing_bytes_without_tensors": (build(b"{}", b"abc"), "3 trailing bytes"),
    "hostile_name": (
        build({"\x1b[2J\n" + "x" * 1000: entry("F32")}, b"ab"),
        "tensor '\\x1b[2J\\nxxx",
    ),
}
"""Files by name: their bytes, and what the message of the FormatError must contain."""
