"""Hostile headers of checkpoint files."""

from __future__ import annotations

import json
import struct

from support import gguf_files, malformed
from support.gguf_files import (
    ARRAY,
    FLOAT32,
    INT64,
    STRING,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    array,
    key,
    string,
    u32,
    u64,
)
from support.malformed import build, entry

from .ideas import ODD_NUMBERS, HostileInput, Ideas, bits, cuts, padded


def safetensors() -> Ideas:
    """Of safetensors files."""
    for name, (data, fault) in malformed.CORPUS.items():
        yield HostileInput(name, data, fault)
    two = build({"a": entry(), "b": entry("F32", (1,), (2, 6)), "__metadata__": {"k": "v"}}, b"abcdef")
    yield from cuts(two)
    yield from padded(two)
    yield from bits(two, 12)
    for name, number in ODD_NUMBERS.items():
        yield HostileInput(f"dimension_{name}", build({"a": entry(shape=[number])}, b"ab"), f"a dimension is {number}")
        yield HostileInput(f"begin_{name}", build({"a": entry(offsets=[number, 2])}, b"ab"), f"an offset is {number}")
        yield HostileInput(f"end_{name}", build({"a": entry(offsets=[0, number])}, b"ab"), f"an end is {number}")
        length = number & (2**64 - 1)
        yield HostileInput(f"length_{name}", struct.pack("<Q", length) + b"{}", f"the header's length is {length}")
    wrapping = {"a": entry(shape=[2], offsets=[2**64 - 1, 2**64 + 1])}
    yield HostileInput("offsets_that_wrap", build(wrapping, b"ab"), "begin and end wrap around 64 bits to -1 and 1")
    for text in ("1e0", "0x2", "+2", "2.", ".2", "2e", "1_0", "\u0662", "\uff11"):
        raw = f'{{"a":{{"dtype":"U8","shape":[{text}],"data_offsets":[0,2]}}}}'.encode()
        yield HostileInput(f"number_{raw[28:34].hex()}", build(raw, b"ab"), f"a dimension is written {text}")
    for name, raw in (("vertical_tab", b"\x0b"), ("no_break_space", b"\xc2\xa0"), ("comment", b"//\n"), ("nul", b"\0")):
        yield HostileInput(f"space_{name}", build(b'{"a":' + raw + json.dumps(entry()).encode() + b"}", b"ab"),
                           f"{name} where JSON has white space")  # fmt: skip
    for name, escape in (
        ("low_then_high", "\\udc00\\ud800"),
        ("cut", "\\u12"),
        ("unknown", "\\x41"),
        ("nul", "\\u0000"),
    ):
        raw = f'{{"{escape}":{json.dumps(entry())}}}'.encode()
        yield HostileInput(f"escape_{name}", build(raw, b"ab"), f"the name is written {escape}")
    overlong = b'{"a\xc0\xaf":' + json.dumps(entry()).encode() + b"}"
    yield HostileInput("utf8_overlong", build(overlong, b"ab"), "an overlong sequence of UTF-8")
    yield HostileInput("utf8_surrogate", build(overlong.replace(b"\xc0\xaf", b"\xed\xa0\x80"), b"ab"), "CESU-8")


def gguf() -> Ideas:
    """Of GGUF files."""
    for name, (data, fault) in gguf_files.CORPUS.items():
        yield HostileInput(name, data, fault)
    keys = [key("s", STRING, "v"), key("a", ARRAY, array(STRING, ["x", "y"])), key("f", FLOAT32, 1.5)]
    valid = gguf_files.whole({"a": (0, (2,), bytes(8)), "b": (8, (1, 32), bytes(34))}, keys)
    yield from cuts(valid)
    yield from bits(valid, 24)
    for name, number in ODD_NUMBERS.items():
        wide = u64(number & (2**64 - 1))
        dimension = string("a") + u32(1) + wide + u32(0) + u64(0)
        lied = string("k") + u32(ARRAY) + u32(UINT8) + wide
        yield HostileInput(
            f"dimension_is_{name}", gguf_files.build([dimension], data=bytes(8)), f"a dimension is {number}"
        )
        yield HostileInput(f"array_{name}", gguf_files.build(keys=[lied]), f"an array says to have {number} elements")
        yield HostileInput(f"text_{name}", gguf_files.build(keys=[string("k") + u32(STRING) + wide]),
                           f"a text says to have {number} bytes")  # fmt: skip
        yield HostileInput(f"tensors_{name}", b"GGUF" + u32(3) + wide + u64(0), f"it says to have {number} tensors")
        yield HostileInput(f"keys_{name}", b"GGUF" + u32(3) + u64(0) + wide, f"it says to have {number} keys")
        yield HostileInput(f"alignment_u64_{name}", gguf_files.build(keys=[key("general.alignment", UINT64, int.from_bytes(wide, "little"))]),
                           f"the alignment is {number}, as a uint64")  # fmt: skip
    nested = array(ARRAY, [array(ARRAY, [array(UINT8, [0, 1])])])
    yield HostileInput(
        "array_of_arrays", gguf_files.build(keys=[key("k", ARRAY, nested)]), "an array of arrays of arrays"
    )
    for name, kind, content in (("text", STRING, "2"), ("float", FLOAT32, 2.0), ("negative", INT64, -1)):
        split = [key("split.no", UINT16, 0), key("split.count", kind, content)]
        yield HostileInput(f"split_count_{name}", gguf_files.build(keys=split), f"the number of parts is a {name}")
    yield HostileInput("parts_65535", gguf_files.build(keys=[key("split.no", UINT16, 65535), key("split.count", UINT16, 2),
                                                            key("split.tensors.count", UINT32, 1)]), "part 65535 of 2")  # fmt: skip
