"""Which files beside a checkpoint's weights travel with them: configuration, tokenizer, indexes, cards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from weightd._formats import SUFFIXES
from weightd._references.files import open_regular, show, translated
from weightd._references.index import PICKLES
from weightd.errors import FormatError, InvalidReferenceError
from weightd_fleet.core.digests import blob_digest
from weightd_fleet.core.manifest_checks import MAX_FILES, MAX_SMALL_BYTES, MAX_SMALL_FILE_BYTES
from weightd_fleet.core.manifest_rows import SmallFile

from .hub import HubCheck, blob_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_MAX_DEPTH: Final = 8
_OTHER_WEIGHTS: Final = (".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite", ".npz", ".mlmodel", ".engine")
"""Weights of other frameworks, which are no part of the checkpoint."""


class ReadSmallFile(NamedTuple):
    """A small file and its content."""

    row: SmallFile
    content: bytes


def read_small_files(
    folder: Path, weights: Collection[str], *, from_hub: bool
) -> tuple[list[ReadSmallFile], list[str]]:
    """The small files below a folder, and notes on those that are left out, a line each.

    `weights` are the paths of the checkpoint's own files. Hidden files count in a hub's revision only, and folders that
    are links never. Of files that are links, those count that lead to a file in the folder, or to a blob of the
    revision: others could be any file of the user's. Errors: those of opening a file or a folder; FormatError (other
    bytes than the hub's); InvalidReferenceError (too many files, or bytes in them).
    """
    found: list[ReadSmallFile] = []
    notes: list[str] = []
    total = 0
    for path in _files(folder, 0, hidden=from_hub):
        name = str(path.relative_to(folder))
        if name in weights or name.lower().endswith((*SUFFIXES, *PICKLES, *_OTHER_WEIGHTS)):
            continue
        blob = blob_of(path, folder) if from_hub else ""
        if not blob and not _is_below(path, folder):
            notes.append(f"{show(path)}: is left out, for it is a link to a file outside of the checkpoint")
            continue
        content = _read(path)
        if content is None:
            notes.append(f"{show(path)}: is left out, for it has more than {MAX_SMALL_FILE_BYTES} bytes")
            continue
        total += len(content)
        if len(found) == MAX_FILES or total > MAX_SMALL_BYTES:
            raise InvalidReferenceError(
                f"{show(folder)}: holds more than {MAX_FILES} files beside the weights, or more than "
                f"{MAX_SMALL_BYTES} bytes of them; publish a folder that holds the checkpoint alone"
            )
        check = HubCheck(blob, len(content))
        check.update(content)
        check.finish(path)
        found.append(ReadSmallFile(SmallFile(name, len(content), blob_digest(content), blob), content))
    return found, notes


def _files(folder: Path, depth: int, *, hidden: bool) -> Iterator[Path]:
    """The files below a folder, in order."""
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise translated(folder, error) from error
    for entry in listed:
        if entry.is_dir(follow_symlinks=False):
            if depth < _MAX_DEPTH and not entry.name.startswith("."):
                yield from _files(Path(entry.path), depth + 1, hidden=hidden)
        elif os.path.isfile(entry.path) and (hidden or not entry.name.startswith(".")):
            yield Path(entry.path)


def _is_below(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder, whatever links lead to it."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _read(path: Path) -> bytes | None:
    """A file's content; None if it is too long."""
    descriptor, status = open_regular(path)
    with open(descriptor, "rb") as file:
        if status.st_size > MAX_SMALL_FILE_BYTES:
            return None
        content = file.read(MAX_SMALL_FILE_BYTES + 1)
    if len(content) != status.st_size:
        raise FormatError(f"{show(path)}: changed while it was read; publish it again")
    return content
