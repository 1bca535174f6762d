"""Finds resident checkpoints by what a load knows of its content, without a walk through all of them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from weightd.types import SourceFile

    from .checkpoint import Checkpoint, CheckpointKey

KNOWN_SOURCES = 8
"""Lists of files that are known to be one checkpoint, the newest: copies and touched files bring one each."""

_Files = tuple["SourceFile", ...]


class CheckpointIndex:
    """The resident checkpoints by their lists of files (`Checkpoint.sources`), by their figures, and by their last use.

    A place is a device and a sharing domain.
    """

    def __init__(self) -> None:
        self._by_files: dict[_Files, dict[CheckpointKey, Checkpoint]] = {}
        self._figures: Counter[tuple[str, str, int, int]] = Counter()
        self._by_use: dict[CheckpointKey, Checkpoint] = {}

    def enter(self, checkpoint: Checkpoint) -> None:
        """A checkpoint is resident."""
        self._figures[_figures(checkpoint)] += 1
        self._by_use[checkpoint.key] = checkpoint
        self.add_sources(checkpoint, ())

    def strike(self, checkpoint: Checkpoint) -> None:
        """A checkpoint is no longer resident."""
        figures = _figures(checkpoint)
        self._figures[figures] -= 1
        if not self._figures[figures]:
            del self._figures[figures]
        del self._by_use[checkpoint.key]
        for files in checkpoint.sources:
            self._forget(files, checkpoint)

    def has_figures(self, place: tuple[str, str], total_bytes: int, tensors: int) -> bool:
        """Whether a checkpoint of so many bytes and tensors is resident at a place."""
        return (*place, total_bytes, tensors) in self._figures

    # -- by last use -----------------------------------------------------------------------------------------------

    def use(self, checkpoint: Checkpoint) -> None:
        """A checkpoint has become the most recently used."""
        del self._by_use[checkpoint.key]
        self._by_use[checkpoint.key] = checkpoint

    def by_use(self) -> Iterator[Checkpoint]:
        """Every resident checkpoint, least recently used first. None may come, go or be used meanwhile."""
        return iter(self._by_use.values())

    # -- by files --------------------------------------------------------------------------------------------------

    def loaded_from(self, place: tuple[str, str], files: _Files) -> Checkpoint | None:
        """The checkpoint at a place that is known to be in these files."""
        there = self._by_files.get(files, {})
        return next((checkpoint for key, checkpoint in there.items() if key[:2] == place), None)

    def add_sources(self, checkpoint: Checkpoint, sources: Iterable[_Files]) -> None:
        """A checkpoint is known to be in these lists of files as well."""
        checkpoint.sources += sources
        for files in checkpoint.sources:
            self._by_files.setdefault(files, {})[checkpoint.key] = checkpoint

    def claim(self, checkpoint: Checkpoint, files: _Files) -> list[CheckpointKey]:
        """From now on these files mean this content, whatever they were thought to be before they were read again.

        Returns the checkpoints that they no longer mean.
        """
        content = checkpoint.key.content_digest
        others = [one for key, one in self._by_files.get(files, {}).items() if key.content_digest != content]
        for other in others:
            other.sources[:] = [kept for kept in other.sources if kept != files]
            self._forget(files, other)
        if files not in checkpoint.sources:
            self.add_sources(checkpoint, [files])
            for oldest in checkpoint.sources[:-KNOWN_SOURCES]:
                self._forget(oldest, checkpoint)
            del checkpoint.sources[:-KNOWN_SOURCES]
        return [other.key for other in others]

    def _forget(self, files: _Files, checkpoint: Checkpoint) -> None:
        there = self._by_files.get(files, {})
        there.pop(checkpoint.key, None)  # a checkpoint may have a list twice
        if not there:
            self._by_files.pop(files, None)


def _figures(checkpoint: Checkpoint) -> tuple[str, str, int, int]:
    return *checkpoint.key[:2], checkpoint.total_bytes, checkpoint.tensor_count
