"""Checkpoint file formats: each module turns a file's header into a checked `weightd.types.FileLayout`.

The header is hostile. Every bound is checked before it is used, and every refusal is a `FormatError` that names the
file, the tensor where there is one, the fault, and what it means.
"""

from __future__ import annotations


def label(name: str) -> str:
    """What messages call a file: its name, quoted where that is long or would not print as it is."""
    return name if name.isprintable() and len(name) <= 200 else quote(name, 200)


def quote(text: str | bytes, limit: int = 80) -> str:
    """A piece of a hostile file, quoted, on one line and of bounded length."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}..."
