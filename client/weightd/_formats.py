"""The formats of checkpoint files: one table, for the client that finds files and for the daemon that reads them.

Each row has a reader in `weightd_daemon/formats/registry.py`. "To add a format" in docs/architecture.md lists the rest.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Format(NamedTuple):
    """A format: the name of its module, how names of its files end, and the bytes that they begin with."""

    name: str
    suffix: str
    magic: bytes
    """Empty where a file of the format begins with anything."""


GGUF: Final = Format("gguf", ".gguf", b"GGUF")
SAFETENSORS: Final = Format("safetensors", ".safetensors", b"")

FORMATS: Final = (GGUF, SAFETENSORS)
"""What begins with anything is last."""
SUFFIXES: Final = tuple(row.suffix for row in FORMATS)
MAGIC_BYTES: Final = max(len(row.magic) for row in FORMATS)
"""How many bytes of a file say its format."""


def format_of(begin: bytes) -> Format:
    """Return the format of a file that begins with these MAGIC_BYTES bytes."""
    return next(row for row in FORMATS if begin.startswith(row.magic))
