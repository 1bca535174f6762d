"""What must hold of a manifest, wherever it comes from: paths stay below a folder, and tensors fit into their files."""

from __future__ import annotations

import math
import re
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Final, NoReturn

from weightd._references.index import is_below
from weightd.errors import FormatError
from weightd.types import DTYPE_BITS

from .digests import BLOB_BYTES
from .encoding import MAX_NUMBER, MAX_TEXT_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .manifest_rows import HubOrigin, SmallFile, TensorRow, WeightFile

MAX_FILES: Final = 10_000
"""Most files with tensors; and most small files."""
MAX_TENSORS: Final = 1_000_000
MAX_DIMENSIONS: Final = 32
MAX_FRAME_BYTES: Final = 256 << 20
MAX_SMALL_FILE_BYTES: Final = 64 << 20
MAX_SMALL_BYTES: Final = 512 << 20
"""Most bytes of all small files."""
MAX_PART_BYTES: Final = 255
"""Most bytes of one part of a path, on every common filesystem."""

_HUB_BLOB: Final = re.compile(r"|[0-9a-f]{40}|[0-9a-f]{64}")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_REPOSITORY: Final = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]{0,95}/)?[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def check(
    files: Sequence[WeightFile],
    tensors: Sequence[TensorRow],
    small_files: Sequence[SmallFile],
    origin: HubOrigin | None,
) -> None:
    """Check the rows of a manifest, of which the tensors are sorted. Errors: FormatError."""
    if len(files) > MAX_FILES or len(small_files) > MAX_FILES:
        _fail(f"lists more than {MAX_FILES} files")
    if len(tensors) > MAX_TENSORS:
        _fail(f"lists more than {MAX_TENSORS} tensors")
    _check_paths([file.path for file in files] + [small.path for small in small_files])
    _check_origin(origin, [file.hub_blob for file in files] + [small.hub_blob for small in small_files])
    _check_small_files(small_files)
    by_file: dict[tuple[str, str], list[TensorRow]] = {(file.component, file.file): [] for file in files}
    for key, rows in groupby(tensors, lambda row: (row.component, row.file)):
        if key not in by_file:
            _fail(f"has a tensor of the file {key[1][:200]!r}, which it does not list")
        by_file[key] += rows
    for file in files:
        _check_file(file, by_file[file.component, file.file])
    names = [(row.component, row.name) for row in tensors if row.counts]
    if len(set(names)) != len(names):
        _fail("has two tensors of one name in a component")


def _check_paths(paths: Sequence[str]) -> None:
    """Each path names one file below the checkpoint's folder, and none lies below another file."""
    if len(set(paths)) != len(paths):
        _fail("has two files of one path")
    for path in paths:
        if not is_below(path) or max(map(len, _encoded(path).split(b"/"))) > MAX_PART_BYTES:
            _fail(f"the path {path[:200]!r} is none below a folder")
    # Where a slash sorts before all else, what lies below a path comes right behind it. Looking up each folder of each
    # path would take minutes for the deepest paths that fit a manifest.
    for path, following in pairwise(sorted(path.replace("/", "\0") for path in paths)):
        if following.startswith(f"{path}\0"):
            below = following.replace("\0", "/")
            _fail(f"the path {below[:200]!r} lies below another file")


def _check_origin(origin: HubOrigin | None, blobs: Sequence[str]) -> None:
    if any(_HUB_BLOB.fullmatch(blob) is None for blob in blobs):
        _fail("has a name of a hub's blob that is no SHA-1 or SHA-256")
    if origin is None:
        if any(blobs):
            _fail("has names of a hub's blobs, and no revision on a hub")
        return
    if not _REPOSITORY.fullmatch(origin.repository) or "--" in origin.repository or ".." in origin.repository:
        _fail(f"{origin.repository[:200]!r} is not a repository on a hub")
    if not _COMMIT.fullmatch(origin.commit):
        _fail(f"{origin.commit[:200]!r} is not a commit of 40 hex digits")


def _check_small_files(small_files: Sequence[SmallFile]) -> None:
    for small in small_files:
        if not 0 <= small.length <= MAX_SMALL_FILE_BYTES or len(small.digest) != BLOB_BYTES:
            _fail(f"{small.path[:200]!r} has an impossible length or digest")
    if sum(small.length for small in small_files) > MAX_SMALL_BYTES:
        _fail(f"has small files of more than {MAX_SMALL_BYTES} bytes together")


def _check_file(file: WeightFile, rows: Sequence[TensorRow]) -> None:
    """The tensors of a file and its frame come to its size, and no two tensors overlap."""
    label = file.path[:200]
    if len(file.frame) != BLOB_BYTES or not 0 <= file.frame_bytes <= MAX_FRAME_BYTES:
        _fail(f"{label!r} has an impossible frame")
    if not 0 <= file.size <= MAX_NUMBER:
        _fail(f"{label!r} has an impossible size")
    end = 0
    for row in sorted(rows, key=lambda row: (row.offset, row.length)):
        _check_tensor(label, row)
        if row.offset < end or row.offset + row.length > file.size:
            _fail(f"{label!r}: tensor {row.name[:200]!r} overlaps another one or the file's end")
        end = row.offset + row.length
    if sum(row.length for row in rows) + file.frame_bytes != file.size:
        _fail(f"{label!r}: its tensors and its frame do not come to its size")


def _check_tensor(label: str, row: TensorRow) -> None:
    possible = (
        len(_encoded(row.name)) <= MAX_TEXT_BYTES
        and len(_encoded(row.dtype)) <= MAX_PART_BYTES
        and len(row.shape) <= MAX_DIMENSIONS
        and all(0 <= number <= MAX_NUMBER for number in (*row.shape, row.offset, row.length))
        and len(row.digest) == BLOB_BYTES
    )
    bits = DTYPE_BITS.get(row.dtype)
    if not possible or (bits is not None and math.prod(row.shape) * bits != row.length * 8):
        _fail(f"{label!r}: tensor {row.name[:200]!r} has an impossible dtype, shape, place or digest")


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        _fail(f"{text[:200]!r} is not UTF-8")


def _fail(fault: str) -> NoReturn:
    raise FormatError(f"manifest: {fault}; publish the checkpoint again, or drop the peer that sent it")
