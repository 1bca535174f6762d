"""Selects the reader of a format (weightd/_formats.py) by the first bytes of a file, not by the file's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from weightd._formats import GGUF, MAGIC_BYTES, SAFETENSORS, Format, format_of

from . import gguf, safetensors

if TYPE_CHECKING:
    from weightd.types import FileLayout

Read = Callable[[int, int], bytes]
"""Returns `length` bytes from an offset on, or fewer at the file's end."""

READERS: Final[dict[Format, Callable[[str, int, Read], FileLayout]]] = {
    GGUF: gguf.read_layout,
    SAFETENSORS: safetensors.read_layout,
}
"""Reads the layout of a file: its name in messages, its length in bytes, and a way to read it. Errors: FormatError."""


def read_layout(name: str, size: int, read: Read) -> FileLayout:
    """Read a file's layout, whatever its format. Errors: FormatError."""
    return READERS[format_of(read(0, min(MAGIC_BYTES, size)))](name, size, read)
