"""Find the checkpoints below folders, each its own, for `weightd plan --scan`.

Which files make a checkpoint, and by which name it is known, is decided by `resolve` alone; this module walks. Whatever
is passed over is reported with the reason. Hidden files and folders are not looked at. A folder is looked into once, by
whatever links it can be reached, so that links in a circle end the walk.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from ._formats import GGUF, SUFFIXES
from ._references.files import show, translated
from ._references.folders import shard_of
from ._references.huggingface import cache_folder, repository_of, snapshots_of
from ._references.survey import COMPOSED, SIGNS
from .errors import InvalidReferenceError, NotFoundError, WeightdError
from .plan_report import SkippedPath
from .resolve import Resolved, folder_of, is_path, is_pickle, path_of, resolve

if TYPE_CHECKING:
    from collections.abc import Iterable

MOST_CHECKPOINTS: Final = 1000
"""How many checkpoints a scan returns; further ones are reported as skipped."""
_NOT_MODELS: Final = ("datasets--", "spaces--")
"""Beginnings of folders in the Hugging Face cache that keep no models."""


class Scan(NamedTuple):
    """The checkpoints below the folders, in the order of their paths, and what was skipped."""

    found: list[Resolved]
    skipped: list[SkippedPath]


def scan(folders: Iterable[str | os.PathLike[str]] = ()) -> Scan:
    """Find the checkpoints below `folders`; without any, those in the Hugging Face cache.

    Errors: NotFoundError (no such folder), InvalidReferenceError (it is none), PermissionDeniedError.
    """
    walk = _Walk()
    roots = [Path(path_of(folder)) for folder in folders]
    for root in roots or [_cache()]:
        try:
            if not stat.S_ISDIR(root.stat().st_mode):
                raise InvalidReferenceError(f"{show(root)}: is a file, where a folder to scan is expected")
            os.listdir(root)
        except OSError as error:
            raise translated(root, error) from error
        walk.below(root)
    return Scan(walk.found, walk.skipped)


def _cache() -> Path:
    folder = cache_folder()
    if not folder.is_dir():
        raise NotFoundError(f"{show(folder)}: there is no Hugging Face cache; give the folders to scan")
    return folder


class _Walk:
    """Depth first, by name; folders that are reached by a link last, so that they keep their own names."""

    def __init__(self) -> None:
        self.found: list[Resolved] = []
        self.skipped: list[SkippedPath] = []
        self._seen: dict[tuple[int, int], Path] = {}
        self._names: set[str] = set()

    def below(self, root: Path) -> None:
        """Enter the checkpoints in a folder and below it."""
        waiting, linked = [root], list[Path]()
        while waiting or linked:
            folder = waiting.pop() if waiting else linked.pop(0)
            for sub in reversed(self._look(folder)):
                (linked if sub.is_symlink() else waiting).append(sub)

    def _look(self, folder: Path) -> list[Path]:
        """Enter the checkpoints of one folder. Returns the folders in it that are to be looked into."""
        try:
            status, names = folder.stat(), _entries(folder)
        except OSError as error:
            self._skip(folder, str(translated(folder, error)))
            return []
        before = self._seen.setdefault((status.st_dev, status.st_ino), folder)
        if before != folder:
            self._skip(folder, f"is the same folder as {show(before)}")
            return []
        if (repository := repository_of(folder)) is not None:
            return self._repository(folder, repository)
        if folder.name.startswith(_NOT_MODELS) and "snapshots" in names:
            self._skip(folder, "is a dataset or a space of the Hugging Face cache, not a model")
            return []
        return self._folder(str(folder), folder, names)

    def _repository(self, folder: Path, repository: str) -> list[Path]:
        """Enter the snapshots of a repository in the Hugging Face cache."""
        # Where a path has the repository's name, that is what the name would stand for.
        here = not is_path(repository) and os.path.realpath(folder.parent) == os.path.realpath(cache_folder())
        references = snapshots_of(folder, repository if here else None)
        if not references:
            self._skip(folder, "has no snapshot; download the repository again")
        below = []
        for reference in references:
            try:
                snapshot = folder_of(reference)
                names = _entries(snapshot)
            except (WeightdError, OSError) as error:
                self._skip(reference, str(error))
                continue
            before = len(self.found)
            more = self._folder(reference, snapshot, names)
            if len(self.found) == before:  # otherwise what lies below belongs to this checkpoint
                below += more
        return below

    def _folder(self, reference: str, folder: Path, names: dict[str, bool]) -> list[Path]:
        """Enter what a folder is, or each file in it. Returns the folders in it that are to be looked into."""
        files = sorted(name for name, is_folder in names.items() if not is_folder)
        folders = [folder / name for name in sorted(names) if names[name]]
        if not any(name.endswith(SIGNS) or name in COMPOSED for name in files):
            if pickle := next((name for name in files if is_pickle(name)), None):
                self._add(str(folder / pickle))  # which is refused, with advice
            return folders
        try:
            resolved = resolve(reference)
        except InvalidReferenceError as error:
            # Several checkpoints in one folder: those that are a file each, or the parts of one, can be loaded by name.
            if len(loose := _loose(files)) < 2:
                self._skip(reference, str(error))
            for name in loose:
                self._add(str(folder / name))
        except WeightdError as error:
            self._skip(reference, str(error))
        else:
            self._enter(resolved)
            self._left_over(folder, files, resolved)
        return [] if any(name in COMPOSED for name in files) else folders

    def _left_over(self, folder: Path, files: list[str], resolved: Resolved) -> None:
        """Enter or report weights in a folder that are not what is loaded from it."""
        taken = {source.path.name for source in resolved.sources if not source.component}
        for name in _loose(files):
            if name.endswith(GGUF.suffix) and name not in taken:
                self._add(str(folder / name))
            elif name not in taken and not any(source.component for source in resolved.sources):
                self._skip(folder / name, f"is not among the files that {show(resolved.name)} is loaded from")

    def _add(self, reference: str) -> None:
        try:
            self._enter(resolve(reference))
        except WeightdError as error:
            self._skip(reference, str(error))

    def _enter(self, resolved: Resolved) -> None:
        if resolved.name in self._names:  # another part of the same split file, or a folder that is given twice
            return
        if len(self.found) == MOST_CHECKPOINTS:
            self._skip(resolved.name, f"is beyond the {MOST_CHECKPOINTS} checkpoints of a plan; scan fewer folders")
            return
        self._names.add(resolved.name)
        self.found.append(resolved)

    def _skip(self, path: Path | str, reason: str) -> None:
        shown = show(path)
        self.skipped.append(SkippedPath(shown, reason.removeprefix(f"{shown}: ")))


def _entries(folder: Path) -> dict[str, bool]:
    """The names in a folder but hidden ones, and whether each is a folder. Errors: OSError."""
    with os.scandir(folder) as entries:
        # Not entry.is_dir(): that raises for a symlink to itself.
        return {entry.name: os.path.isdir(entry) for entry in entries if not entry.name.startswith(".")}


def _loose(files: Iterable[str]) -> list[str]:
    """Files that are a checkpoint each, or parts of a split one, which stand for all of it; no shards."""
    return [name for name in files if name.endswith(SUFFIXES) and name not in SUFFIXES and shard_of(name) is None]
