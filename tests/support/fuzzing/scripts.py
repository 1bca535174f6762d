"""Scripts: several frames, each with a number of descriptors, as the bytes of one input."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_HEAD = struct.Struct("<HB")


class ScriptFrame(NamedTuple):
    """A frame, and how many descriptors travel with it."""

    data: bytes
    descriptors: int = 0


def script(frames: Iterable[ScriptFrame | bytes]) -> bytes:
    """The input that `frames_of` reads as these frames."""
    parts = []
    for frame in frames:
        data, descriptors = frame if isinstance(frame, ScriptFrame) else (frame, 0)
        parts.append(_HEAD.pack(len(data), descriptors) + data)
    return b"".join(parts)


def frames_of(data: bytes) -> Iterator[ScriptFrame]:
    """The frames of an input; any bytes are some, and the last may be cut."""
    position = 0
    while position + _HEAD.size <= len(data):
        length, descriptors = _HEAD.unpack_from(data, position)
        position += _HEAD.size
        yield ScriptFrame(data[position : position + length], descriptors)
        position += length
