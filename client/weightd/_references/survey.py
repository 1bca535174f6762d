"""List the checkpoints below a folder that is not a checkpoint itself, for the error message that suggests them.

Whatever cannot be read is passed over, and the search ends after a while: it only helps.
"""

from __future__ import annotations

import os
import shlex
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from weightd._formats import SUFFIXES

from .files import show
from .huggingface import cache_folder, repository_of, snapshots_of
from .index import SUFFIX

if TYPE_CHECKING:
    from pathlib import Path

_DEPTH: Final = 4
_FOLDERS: Final = 2000
"""Most folders that are looked into."""
_LISTED: Final = 5
SIGNS: Final = (*SUFFIXES, f"{SUFFIX}.index.json")
"""How files end that make a folder look like a checkpoint."""
COMPOSED: Final = ("model_index.json", "modules.json")
"""Files that make a folder one checkpoint of components, which lie below it."""


def checkpoints_below(root: Path) -> str:
    """The rest of an error: how many checkpoints a folder holds, and what to type; empty where there are none."""
    found = _Search(root).run()
    if not found:
        return ""
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    listed = " ".join(shlex.quote(show(reference)) for reference in sorted(found)[:_LISTED])
    count = "one checkpoint lies" if len(found) == 1 else f"{len(found)} checkpoints lie"
    return f"{count} below it; give {'it' if len(found) == 1 else 'those that you mean'}, as {listed}{more}"


class _Place(NamedTuple):
    path: Path
    depth: int


class _Search:
    """Breadth first: what is near is listed first, when the search ends early."""

    def __init__(self, root: Path) -> None:
        self._waiting = deque([_Place(root, 0)])
        self._seen: set[tuple[int, int]] = set()
        self._found: list[str] = []

    def run(self) -> list[str]:
        """References of the checkpoints below, but of the folder itself."""
        looked = 0
        while self._waiting and looked < _FOLDERS:
            looked += 1
            self._look(self._waiting.popleft())
        return self._found

    def _look(self, place: _Place) -> None:
        if repository := repository_of(place.path):
            here = os.path.realpath(place.path.parent) == os.path.realpath(cache_folder())
            self._found += snapshots_of(place.path, repository if here else None)
            return
        try:
            status = place.path.stat()
            with os.scandir(place.path) as entries:
                names = {e.name: os.path.isdir(e) for e in entries if not e.name.startswith(".")}
        except OSError:
            return
        if (status.st_dev, status.st_ino) in self._seen:
            return
        self._seen.add((status.st_dev, status.st_ino))
        files = [name for name, is_folder in names.items() if not is_folder]
        if place.depth and any(name.endswith(SIGNS) or name in COMPOSED for name in files):
            self._found.append(str(place.path))
        elif place.depth < _DEPTH:
            folders = sorted(name for name, is_folder in names.items() if is_folder)
            self._waiting += [_Place(place.path / name, place.depth + 1) for name in folders]
