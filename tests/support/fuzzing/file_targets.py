"""Headers of checkpoint files, compared with what the formats' own packages make of them.

What a package accepts and weightd refuses must be one of the differences that `daemon/weightd_daemon/formats` states.
Each is a rule here: a pattern of weightd's error. The reverse must not be.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from pathlib import Path

import gguf
import numpy as np
import safetensors
from safetensors import SafetensorError

from weightd.errors import FormatError
from weightd.types import FileLayout
from weightd_daemon.formats import gguf as our_gguf
from weightd_daemon.formats import safetensors as our_safetensors

from .target import Target

SAFETENSORS_STRICTER = {
    "a key twice in one object": r"has the key .* twice in one object",
    "white space before the brace": r"header begins with b'[ \\]",
    "an entry as an array": r"its entry must be an object, not \[",
    "a dtype as an object": r"dtype must be a string, not an object",
    "63 bits for dimensions and elements": r"not a whole number from 0 to 2\*\*63 - 1|overflows: 2\*\*63 elements",
    "limits": r"more than (the )?\d+|longer than \d+ bytes|deeper than \d+ levels",
}
"""What safetensors accepts and weightd refuses, by patterns of weightd's error."""

GGUF_STRICTER = {
    "versions and byte order": r": is big-endian|: GGUF version \d+ is not supported",
    "UTF-8 in keys, names and values": r" is not UTF-8",
    "empty keys, and keys and names twice": r"key \d+ is empty|is there twice",
    "types that neither GGUF nor ggml has": r"which GGUF does not have|(gguf|version of weightd) does not know",
    "the alignment": r"key 'general\.alignment'",
    "one of several files": r"key 'split\.",
    "tensors one behind the other": r"its offset is \d+ instead of",
    "rows of whole blocks": r"are no whole number of",
    "63 bits for bytes": r"2\*\*63",
    "limits": r"more than (the )?\d+|deeper than \d+ levels",
}
"""What GGUFReader accepts and weightd refuses, likewise: it checks next to nothing, and counts on numpy."""

_LOOPS = re.compile(r"reach(es)? (past|to) ")
"""Faults of length: the package may loop over a count that no file has room for, so it is not asked."""

_folder = tempfile.TemporaryDirectory(prefix="weightd-fuzz-")
_gguf_path = Path(_folder.name) / "m.gguf"


def stricter(rules: dict[str, str], error: FormatError) -> list[str]:
    """The rules by which weightd may refuse what a package accepts."""
    return [name for name, pattern in rules.items() if re.search(pattern, str(error))]


def read_safetensors(file: bytes) -> FileLayout:
    """A safetensors file's layout, which is the package's. Errors: FormatError."""
    try:
        layout = our_safetensors.read_layout("x", len(file), lambda offset, length: file[offset : offset + length])
    except FormatError as error:
        if not stricter(SAFETENSORS_STRICTER, error):
            try:
                safetensors.deserialize(file)
            except SafetensorError:
                raise error from None
            raise AssertionError(f"safetensors accepts what weightd refuses, by no rule: {error}") from error
        raise
    theirs = dict(safetensors.deserialize(file))  # a SafetensorError here is a fault
    assert {spec.name for spec in layout.tensors} == set(theirs)
    for spec in layout.tensors:
        other = theirs[spec.name]
        assert (spec.dtype, list(spec.shape)) == (other["dtype"], other["shape"])
        assert file[spec.offset : spec.offset + spec.length] == bytes(other["data"])
    return layout


def read_gguf(file: bytes) -> FileLayout:
    """A GGUF file's layout, which is the package's. Errors: FormatError."""
    try:
        layout = our_gguf.read_layout("x", len(file), lambda offset, length: file[offset : offset + length])
    except FormatError as error:
        if not _LOOPS.search(str(error)) and not stricter(GGUF_STRICTER, error) and _gguf_accepts(file):
            raise AssertionError(f"gguf accepts what weightd refuses, by no rule: {error}") from error
        raise
    if _beyond_the_package(file, layout):
        return layout
    theirs = _gguf_reader(file)  # an error here is a fault
    assert len(layout.tensors) == len(theirs.tensors)
    for spec, other in zip(layout.tensors, theirs.tensors, strict=True):
        assert (spec.name, spec.dtype.removeprefix("GGML_")) == (other.name, other.tensor_type.name)
        assert spec.shape == tuple(other.shape.tolist()[::-1])
        assert (spec.offset, spec.length) == (other.data_offset, other.n_bytes)
        assert file[spec.offset : spec.offset + spec.length] == other.data.tobytes()
    assert layout.metadata is not None
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            _check_value(layout.metadata[name], field)
    return layout


def _check_value(text: str, field: gguf.ReaderField) -> None:
    try:
        content = field.contents()
    except UnicodeDecodeError:  # strings in arrays are not decoded by weightd
        assert re.match(r"\[\d+ string\] xxh3_128:", text)
        return
    if (
        field.types.count(gguf.GGUFValueType.ARRAY) > 1
    ):  # the package flattens arrays of arrays, and counts the innermost
        assert re.match(r"\[\d+ array\] xxh3_128:", text)
    elif isinstance(content, list):
        assert text.startswith(f"[{len(content)} {field.types[-1].name.lower()}] xxh3_128:") or not content
    else:
        assert text == (content if isinstance(content, str) else str(content).lower())


def _beyond_the_package(file: bytes, layout: FileLayout) -> bool:
    """What weightd accepts and gguf 0.19 stumbles over: a BF16 scalar, and keys of its own ("GGUF.version")."""
    return b"GGUF." in file[8:] or any(not spec.shape and spec.dtype == "BF16" for spec in layout.tensors)


def _gguf_reader(file: bytes) -> gguf.GGUFReader:
    _gguf_path.write_bytes(file)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return gguf.GGUFReader(_gguf_path)


def _gguf_accepts(file: bytes) -> bool:
    try:
        _gguf_reader(file)
    except Exception:  # noqa: BLE001  # it raises whatever numpy raises
        return False
    return True


SAFETENSORS = Target(read_safetensors, (FormatError,), ("weightd_daemon.formats.safetensors",))
GGUF = Target(read_gguf, (FormatError,), ("weightd_daemon.formats.gguf",))
