"""Publish a reference: read its files once, make its manifest, and keep it in the state folder."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from weightd._references.files import show
from weightd.errors import FormatError
from weightd.resolve import folder_of, is_path, open_sources, path_of, resolve
from weightd_daemon.answers import THREADS
from weightd_daemon.loader.indexed import indexes, owned
from weightd_daemon.loader.source import LoaderSource
from weightd_fleet.core.manifest import FleetManifest
from weightd_fleet.core.manifest_rows import HubOrigin, TensorRow, WeightFile

from .hub import HubCheck, blob_of, origin_of
from .small_files import read_small_files
from .weight_files import ReadWeightFile, read_weight_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightd.resolve import Resolved
    from weightd.types import TensorSpec

    from .state import PublishedState

    Advance = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class PublishedCheckpoint:
    """A published checkpoint; sizes are bytes. `checked_files` are those whose digests a hub's cache knew."""

    digest: str
    name: str
    origin: HubOrigin | None
    files: int
    tensors: int
    total_bytes: int
    small_files: int
    small_bytes: int
    checked_files: int
    manifest: str


class _OpenFile(NamedTuple):
    """An opened file with tensors. `counted` are the names of its tensors that an index leaves to it."""

    component: str
    file: str
    path: Path
    source: LoaderSource
    tensors: Sequence[TensorSpec]
    counted: frozenset[str]
    hub_blob: str


def publish(
    reference: str,
    state: PublishedState,
    *,
    variant: str | None = None,
    advance: Advance = lambda done, total: None,
    note: Callable[[str], None] = lambda line: None,
) -> PublishedCheckpoint:
    """Publish a reference. `advance` is called with the bytes read and those to be read, from any thread; `note` with
    what was chosen or left out that nobody asked for, a line each.

    Errors: those of a reference and of a file; FormatError also for files that are not what the hub has.
    """
    resolved = resolve(reference, variant)
    for line in (*resolved.notes, resolved.hint):
        if line:
            note(line)
    folder = _folder_of(reference)
    origin = origin_of(folder) if folder else None
    with open_sources(resolved) as opened:
        files = _open_files(resolved, opened.fds, folder if origin else None)
        read = _read_all(files, advance)
        small, left_out = (
            read_small_files(folder, {_path(file) for file in files}, from_hub=origin is not None)
            if folder
            else ([], [])
        )
    for line in left_out:
        note(line)
    if folder and origin:
        unchecked = [file.path for file in files if not file.hub_blob]
        unchecked += [folder / each.row.path for each in small if not each.row.hub_blob]
        for path in unchecked:
            note(f"{show(path)}: is no link to a blob of the hub's cache, and was not compared")
    manifest = FleetManifest.of(
        [_file_row(file, content) for file, content in zip(files, read, strict=True)],
        [row for file, content in zip(files, read, strict=True) for row in _tensor_rows(file, content)],
        [each.row for each in small],
        origin,
    )
    blobs = [content.frame for content in read] + [each.content for each in small]
    path = state.put(manifest, blobs, _sources(resolved.name, files))
    return PublishedCheckpoint(
        digest=manifest.name,
        name=resolved.name,
        origin=origin,
        files=len(files),
        tensors=sum(row.counts for row in manifest.tensors),
        total_bytes=manifest.tensor_bytes,
        small_files=len(small),
        small_bytes=sum(each.row.length for each in small),
        checked_files=sum(bool(file.hub_blob) for file in files) + sum(bool(each.row.hub_blob) for each in small),
        manifest=str(path),
    )


def _folder_of(reference: str) -> Path | None:
    """The folder that a reference stands for; None for a file, which travels alone."""
    if is_path(reference) and not Path(path_of(reference)).is_dir():
        return None
    return folder_of(reference)


def _open_files(resolved: Resolved, descriptors: Sequence[int], revision: Path | None) -> list[_OpenFile]:
    """The files with tensors; `revision` is the folder of a hub's cache that they lie in."""
    sources = [
        (where, LoaderSource(show(where.path), descriptor))
        for where, descriptor in zip(resolved.sources, descriptors, strict=True)
    ]
    weights = [(where, source) for where, source in sources if not where.is_index]
    read_index = indexes({where.component: source for where, source in sources if where.is_index})
    layouts = [(where.component, where.file, source.layout().tensors) for where, source in weights]
    counted = owned(layouts, read_index)
    return [
        _OpenFile(
            where.component,
            where.file,
            where.path,
            source,
            source.layout().tensors,
            frozenset(tensor.name for tensor in tensors),
            blob_of(where.path, revision) if revision else "",
        )
        for (where, source), tensors in zip(weights, counted, strict=True)
    ]


def _read_all(files: Sequence[_OpenFile], advance: Advance) -> list[ReadWeightFile]:
    """Read every file once, a few at a time."""
    total = sum(file.source.identity.size for file in files)
    done = 0
    counting = threading.Lock()

    def add(count: int) -> None:
        nonlocal done
        with counting:
            done += count
            advance(done, total)

    def read(file: _OpenFile) -> ReadWeightFile:
        check = HubCheck(file.hub_blob, file.source.identity.size)
        found = read_weight_file(file.source, file.tensors, check, add)
        check.finish(file.path)
        return found

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(read, files))


def _path(file: _OpenFile) -> str:
    return f"{file.component}/{file.file}" if file.component else file.file


def _file_row(file: _OpenFile, content: ReadWeightFile) -> WeightFile:
    return WeightFile(
        file.component,
        file.file,
        file.source.identity.size,
        len(content.frame),
        content.frame_digest,
        file.hub_blob,
    )


def _tensor_rows(file: _OpenFile, content: ReadWeightFile) -> list[TensorRow]:
    names = {tensor.name for tensor in file.tensors}
    if len(names) != len(file.tensors):
        raise FormatError(f"{file.source.name}: has two tensors of one name")
    return [
        TensorRow(
            file.component,
            file.file,
            tensor.name,
            tensor.dtype,
            tuple(tensor.shape),
            tensor.offset,
            tensor.length,
            digest,
            counts=tensor.name in file.counted,
        )
        for tensor, digest in zip(file.tensors, content.digests, strict=True)
    ]


def _sources(reference: str, files: Sequence[_OpenFile]) -> dict[str, Any]:
    return {
        "reference": reference,
        "files": [
            {
                "component": file.component,
                "file": file.file,
                "path": str(file.path.absolute()),  # a cache may be set by a relative path
                "identity": list(file.source.identity),
            }
            for file in files
        ],
    }
