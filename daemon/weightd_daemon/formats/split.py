"""Checks that all parts of a split checkpoint are present, if its files declare parts, as GGUF files do."""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING, NamedTuple

from weightd.errors import FormatError
from weightd.types import FileLayout, FilePart

from . import label

if TYPE_CHECKING:
    from collections.abc import Iterable


def check_parts(files: Iterable[tuple[str, FileLayout]]) -> None:
    """Check that files which say that they are parts of a split checkpoint are all of its parts.

    `files` are the names ("component/file") and layouts of one load. Errors: FormatError.
    """
    components: dict[str, list[_Member]] = {}
    for name, layout in files:
        if layout.part is not None:
            member = _Member(label(name), layout.part, len(layout.tensors))
            components.setdefault(posixpath.dirname(name), []).append(member)
    for members in components.values():
        _check_component(members)


class _Member(NamedTuple):
    """A file that says that it is a part, and how many tensors it has."""

    name: str
    part: FilePart
    tensors: int


def _check_component(members: list[_Member]) -> None:
    name, (_, count, tensors), _ = members[0]
    for other, (_, *totals), _ in members:
        if totals != [count, tensors]:
            raise FormatError(
                f"{other}: is one of {totals[0]} parts with {totals[1]} tensors, but {name} is one of {count} parts "
                f"with {tensors}; they belong to different checkpoints"
            )
    numbers = sorted(member.part.number for member in members)
    if len(numbers) != count or numbers != list(range(len(numbers))):
        shown = ", ".join(str(number + 1) for number in numbers[:20])
        raise FormatError(f"{name}: is one of {count} parts, but those given are {shown}; give all of them, each once")
    found = sum(member.tensors for member in members)
    if found != tensors:
        raise FormatError(f"{name}: says that its {count} parts hold {tensors} tensors, but they hold {found}")
