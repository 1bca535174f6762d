"""Selects the tensors to load from a checkpoint's files. If two files have the same tensor, an index decides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from weightd._references.index import MAX_JSON_BYTES
from weightd.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from weightd.types import TensorSpec

    from .source import LoaderSource

    ReadIndex = Callable[[str], Mapping[str, str] | None]
    """Reads the index of a component: the file of each tensor. None where there is no index."""

MAX_INDEX_BYTES: Final = MAX_JSON_BYTES
"""How many bytes the indexes of a load that are read may have together."""


def called(component: str, file: str) -> str:
    """What messages call a file of a checkpoint: "component/file", or "file" where there is no component."""
    return f"{component}/{file}" if component else file


def indexes(sources: Mapping[str, LoaderSource]) -> ReadIndex:
    """What reads the indexes of a load, given by component. It raises FormatError and InvalidReferenceError."""
    size = 0

    def read(component: str) -> Mapping[str, str] | None:
        nonlocal size
        source = sources.get(component)
        if source is None:
            return None
        size += source.identity.size
        if size > MAX_INDEX_BYTES:
            limit = f"over the limit of {MAX_INDEX_BYTES} bytes that the indexes of a load may have together"
            raise FormatError(f"{source.name}: {limit}; download it again, or load fewer components at a time")
        return source.weight_map()

    return read


def owned(files: Sequence[tuple[str, str, Sequence[TensorSpec]]], read_index: ReadIndex) -> list[Sequence[TensorSpec]]:
    """The tensors of each file that count, given as (component, name of the file, tensors), by the components' indexes.

    All of a file's do, but those whose name another file of its component has, too. For these the index says whose it
    is; only there it is read, and no two are in memory at a time. Errors: FormatError (it does not say, or names a file
    that has no such tensor), and those of reading an index.
    """
    holders: dict[str, dict[str, list[str]]] = {}
    for component, file, tensors in files:
        names = holders.setdefault(component, {})
        for tensor in tensors:
            names.setdefault(tensor.name, []).append(file)
    owners: dict[tuple[str, str], str] = {}
    for component, names in holders.items():
        if shared := {name: there for name, there in names.items() if len(there) > 1}:
            owners |= _owners(component, shared, read_index(component))
    if not owners:
        return [tensors for _, _, tensors in files]
    return [
        tuple(tensor for tensor in tensors if owners.get((component, tensor.name), file) == file)
        for component, file, tensors in files
    ]


def _owners(
    component: str, shared: Mapping[str, Sequence[str]], index: Mapping[str, str] | None
) -> dict[tuple[str, str], str]:
    return {(component, name): _owner(component, name, there, index) for name, there in shared.items()}


def _owner(component: str, name: str, there: Sequence[str], index: Mapping[str, str] | None) -> str:
    where = f" of component {component!r}" if component else ""
    said = index.get(name) if index is not None else None
    if said is not None and said in there:
        return said
    first, second = (called(component, file) for file in there[:2])
    if index is None:
        raise FormatError(f"{second}: tensor {name[:200]!r} is in another file{where} too ({first})")
    says = f"says that it is in {said[:200]!r}" if said is not None else "does not say whose counts"
    raise FormatError(f"{second}: tensor {name[:200]!r} is in another file{where} too, and the index {says}")
