"""The index of a sharded checkpoint (`model.safetensors.index.json`): a map from each tensor to its file."""

from __future__ import annotations

import json
from typing import Final

from weightd._formats import SAFETENSORS
from weightd.errors import FormatError, InvalidReferenceError

MAX_JSON_BYTES: Final = 64 * 1024 * 1024
"""Largest index that is read, in bytes."""
MAX_VALUES: Final = 2_000_000
"""Most JSON values in it: each takes tens of bytes of memory, however short it is written."""
SUFFIX: Final = SAFETENSORS.suffix
PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def parse_json(label: str, raw: bytes) -> object:
    """A JSON document that nobody vouches for; `label` names it in errors. Errors: FormatError."""
    if len(raw) > MAX_JSON_BYTES:
        raise FormatError(f"{label}: over the limit of {MAX_JSON_BYTES} bytes; not an index")
    # Counted in strings too: an upper bound is enough to bound memory before anything is built.
    values = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if values > MAX_VALUES:
        raise FormatError(f"{label}: holds about {values} JSON values, more than the {MAX_VALUES} that are supported")
    try:
        document: object = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{label}: not valid JSON; download it again") from error
    return document


def weight_map(label: str, raw: bytes) -> dict[str, str]:
    """The file of each tensor, by name; every file is a safetensors file in the index's folder or below it.

    Errors: FormatError (damaged, or it leads out of its folder), InvalidReferenceError (its files are pickles).
    """
    document = parse_json(label, raw)
    found = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(found, dict) or not found:
        raise FormatError(f"{label}: has no weight_map object with entries; download it again")
    for file in found.values():
        if not isinstance(file, str):
            raise FormatError(f"{label}: weight_map holds a value that is not a file name; download it again")
    for file in sorted(set(found.values())):
        if not is_below(file):
            raise FormatError(f"{label}: shard {file[:200]!r} leads out of the folder; the index is not trusted")
        if file.lower().endswith(PICKLES):
            raise InvalidReferenceError(
                f"{label}: lists {file[:200]!r}, a pickle, which can run code and is not loaded"
            )
        if not file.endswith(SUFFIX):
            raise FormatError(f"{label}: shard {file[:200]!r} is not a safetensors file; download it again")
    return found


def is_below(path: str) -> bool:
    """Whether a relative path, as a file says it, stays below its folder by its own parts, whatever links do."""
    return "\\" not in path and "\0" not in path and not any(part in ("", ".", "..") for part in path.split("/"))
