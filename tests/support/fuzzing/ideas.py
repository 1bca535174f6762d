"""Ideas for hostile inputs: each a name, the bytes, and what is hostile about them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class HostileInput(NamedTuple):
    """An input of the corpus: its file's name, its bytes, and what it tries."""

    name: str
    data: bytes
    idea: str


Ideas = Iterator[HostileInput]

ODD_NUMBERS: dict[str, int] = {
    "minus_one": -1,
    "zero": 0,
    "int32": 2**31,
    "uint32": 2**32,
    "double_mantissa": 2**53 + 1,
    "int63": 2**63 - 1,
    "int64": 2**63,
    "uint64": 2**64 - 1,
    "uint65": 2**64,
}
"""Numbers at whose edges arithmetic, fields and doubles end."""

ODD_VALUES: dict[str, Any] = {
    **ODD_NUMBERS,
    "null": None,
    "true": True,
    "half": 0.5,
    "nan": float("nan"),
    "infinity": float("inf"),
    "empty_text": "",
    "digits": "1",
    "surrogate": "\ud800",
    "control": "\x1b[2J\n",
    "long_text": "n" * 2000,
    "empty_list": [],
    "nested_list": [[[]]],
    "empty_object": {},
}
"""Values of the wrong kind or size, for JSON and TOML."""


def cuts(valid: bytes, at: Sequence[float] = (0, 0.01, 0.1, 0.5, 0.9)) -> Ideas:
    """A valid input that ends too early, at shares of its length and one byte before its end."""
    for share in at:
        yield HostileInput(f"cut_at_{share:g}".replace(".", "_"), valid[: int(len(valid) * share)], "it ends too early")
    yield HostileInput("cut_last_byte", valid[:-1], "its last byte is missing")


def padded(valid: bytes) -> Ideas:
    """A valid input with something behind it or before it."""
    yield HostileInput("trailing_zero", valid + b"\0", "a zero byte behind it")
    yield HostileInput("trailing_text", valid + b"{}", "text behind it")
    yield HostileInput("twice", valid * 2, "all of it twice")
    yield HostileInput("leading_zero_byte", b"\0" + valid, "a zero byte before it")


def noise() -> Ideas:
    """What belongs to no format."""
    yield HostileInput("empty", b"", "nothing at all")
    yield HostileInput("zeros", bytes(256), "zeros")
    yield HostileInput("ones", b"\xff" * 256, "bytes of ones")
    yield HostileInput("text", b"GET / HTTP/1.1\r\n\r\n", "another protocol")
    yield HostileInput("pickle", b"\x80\x04cos\nsystem\n.", "a pickle")
    yield HostileInput("varint_without_end", b"\x80" * 64, "a varint that does not end")


def bits(valid: bytes, count: int) -> Ideas:
    """A valid input with one bit changed, at places spread over it."""
    for number in range(count):
        at = number * len(valid) // count
        changed = bytearray(valid)
        changed[at] ^= 1 << number % 8
        yield HostileInput(f"bit_{number}", bytes(changed), f"bit {number % 8} of byte {at} is changed")


def values(
    body: Any, paths: Mapping[str, Sequence[Any]], choose: Sequence[str], encode: Callable[[Any], bytes]
) -> Ideas:
    """A body with one value replaced, or removed, at each of some paths."""
    for name, path in paths.items():
        for odd in (*choose, "absent"):
            changed = copy.deepcopy(body)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            if odd == "absent":
                del inner[path[-1]]
            else:
                inner[path[-1]] = ODD_VALUES[odd]
            yield HostileInput(f"{name}_{odd}", encode(changed), f"{name} is {odd.replace('_', ' ')}")


def json_bytes(body: Any) -> bytes:
    """JSON as Python writes it: half surrogates, NaN and infinity included."""
    return json.dumps(body).encode()
