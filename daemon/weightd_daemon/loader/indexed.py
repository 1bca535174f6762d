"""Which tensors of a checkpoint's files count: an index maps names to files, and decides where two files have one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightd.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightd.types import TensorSpec


def owned(
    files: Sequence[tuple[str, str, Sequence[TensorSpec]]], indexes: Mapping[str, Mapping[str, str]]
) -> list[Sequence[TensorSpec]]:
    """The tensors of each file that count, given as (component, name of the file, tensors), by the components' indexes.

    All of a file's do, but those whose name another file of its component has, too. For these the index says whose it
    is. Errors: FormatError (it does not say, or names a file that has no such tensor).
    """
    holders: dict[tuple[str, str], list[str]] = {}
    for component, file, tensors in files:
        for tensor in tensors:
            holders.setdefault((component, tensor.name), []).append(file)
    owners = {key: _owner(*key, there, indexes.get(key[0])) for key, there in holders.items() if len(there) > 1}
    if not owners:
        return [tensors for _, _, tensors in files]
    return [
        tuple(tensor for tensor in tensors if owners.get((component, tensor.name), file) == file)
        for component, file, tensors in files
    ]


def _owner(component: str, name: str, there: Sequence[str], index: Mapping[str, str] | None) -> str:
    where = f" of component {component!r}" if component else ""
    said = index.get(name) if index is not None else None
    if said is not None and said in there:
        return said
    if index is None:
        raise FormatError(f"{there[1]}: tensor {name[:200]!r} is in another file{where} too ({there[0]})")
    says = f"says that it is in {said[:200]!r}" if said is not None else "does not say whose counts"
    raise FormatError(f"{there[1]}: tensor {name[:200]!r} is in another file{where} too, and the index {says}")
