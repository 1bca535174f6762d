"""Answers what each load asks of the resident checkpoints, without a walk through all of them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from weightd.types import SourceFile

    from .checkpoint import Checkpoint, CheckpointKey

KNOWN_SOURCES = 8
"""Lists of files that are known to be one checkpoint, the newest: copies and touched files bring one each."""

_Files = tuple["SourceFile", ...]


class CheckpointIndex:
    """The resident checkpoints by their lists of files (`Checkpoint.sources`), their figures and their last use.

    And the bytes that they cost each user. A place is a device and a sharing domain. What is said of a checkpoint that
    is not resident any more changes nothing here. `on_pin` is told of resident ones that a user has pinned or unpinned.
    """

    def __init__(self, on_pin: Callable[[Checkpoint], None] = lambda _: None) -> None:
        self._on_pin = on_pin
        self._by_files: dict[_Files, dict[CheckpointKey, Checkpoint]] = {}
        self._figures: Counter[tuple[str, str, int, int]] = Counter()
        self._by_use: dict[CheckpointKey, Checkpoint] = {}
        self._charged: dict[CheckpointKey, set[int | None]] = {}
        """The users whom a checkpoint costs its bytes: its owner, and those who have pinned it."""
        self._bytes: Counter[int | None] = Counter()

    def enter(self, checkpoint: Checkpoint) -> None:
        """A checkpoint is resident."""
        self._figures[_figures(checkpoint)] += 1
        self._by_use[checkpoint.key] = checkpoint
        self._charged[checkpoint.key] = set()
        for uid in (checkpoint.owner, *checkpoint.pins):
            self._charge(checkpoint, uid)
        self.add_sources(checkpoint, ())

    def strike(self, checkpoint: Checkpoint) -> None:
        """A checkpoint is no longer resident."""
        figures = _figures(checkpoint)
        self._figures[figures] -= 1
        if not self._figures[figures]:
            del self._figures[figures]
        del self._by_use[checkpoint.key]
        for uid in self._charged.pop(checkpoint.key):
            self._refund(checkpoint, uid)
        for files in checkpoint.sources:
            self._forget(files, checkpoint)

    def has_figures(self, place: tuple[str, str], total_bytes: int, tensors: int) -> bool:
        """Whether a checkpoint of so many bytes and tensors is resident at a place."""
        return (*place, total_bytes, tensors) in self._figures

    # -- by user ---------------------------------------------------------------------------------------------------

    def pin(self, checkpoint: Checkpoint, uid: int | None) -> None:
        """A user pins a checkpoint."""
        checkpoint.pins.add(uid)
        self._say_pinned(checkpoint)
        self._charge(checkpoint, uid)

    def unpin(self, checkpoint: Checkpoint, uid: int | None) -> None:
        """A user has not pinned a checkpoint any more."""
        checkpoint.pins.discard(uid)
        self._say_pinned(checkpoint)
        if self._is_here(checkpoint) and uid != checkpoint.owner and uid in self._charged[checkpoint.key]:
            self._charged[checkpoint.key].remove(uid)
            self._refund(checkpoint, uid)

    def bytes_of(self, uid: int | None) -> int:
        """Bytes of the checkpoints that a user was first to load, or has pinned; shared ones count in full.

        Their books count, too: a tensor without bytes takes memory of the daemon.
        """
        return self._bytes[uid]

    def _say_pinned(self, checkpoint: Checkpoint) -> None:
        if self._is_here(checkpoint):
            self._on_pin(checkpoint)

    def _charge(self, checkpoint: Checkpoint, uid: int | None) -> None:
        if self._is_here(checkpoint) and uid not in self._charged[checkpoint.key]:
            self._charged[checkpoint.key].add(uid)
            self._bytes[uid] += checkpoint.total_bytes + checkpoint.books_bytes

    def _refund(self, checkpoint: Checkpoint, uid: int | None) -> None:
        self._bytes[uid] -= checkpoint.total_bytes + checkpoint.books_bytes
        if not self._bytes[uid]:
            del self._bytes[uid]

    # -- by last use -----------------------------------------------------------------------------------------------

    def use(self, checkpoint: Checkpoint) -> None:
        """A checkpoint has become the most recently used."""
        if self._is_here(checkpoint):
            self._by_use[checkpoint.key] = self._by_use.pop(checkpoint.key)

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
        for files in checkpoint.sources if self._is_here(checkpoint) else ():
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

    def _is_here(self, checkpoint: Checkpoint) -> bool:
        return self._by_use.get(checkpoint.key) is checkpoint

    def _forget(self, files: _Files, checkpoint: Checkpoint) -> None:
        there = self._by_files.get(files, {})
        there.pop(checkpoint.key, None)  # a checkpoint may have a list twice
        if not there:
            self._by_files.pop(files, None)


def _figures(checkpoint: Checkpoint) -> tuple[str, str, int, int]:
    return *checkpoint.key[:2], checkpoint.total_bytes, checkpoint.tensor_count
