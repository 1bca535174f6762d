"""Short names for groups of tensors, for reports: the names of their members, folded into one pattern."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_ALTERNATIVES = 4
"""Parts of a name that a pattern lists; of more it shows the first and the last."""


def fused_name(members: Sequence[str]) -> str:
    """One name for several: `mlp.{gate,up}.weight`, `experts.{0-7}.{w1,w3}`.

    Names that have different numbers of parts are not folded: `a.b and 2 more`.
    """
    split = [member.split(".") for member in members]
    if len({len(parts) for parts in split}) != 1:
        return members[0] if len(members) == 1 else f"{members[0]} and {len(members) - 1} more"
    return ".".join(_folded(list(dict.fromkeys(parts))) for parts in zip(*split, strict=True))


def layers_folded(name: str) -> str:
    """A name with `*` for each number between its dots, so that those of all layers are equal."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def counted(names: Iterable[str], most: int) -> str:
    """The first names, and how many more there are."""
    every = list(names)
    more = len(every) - most
    return ", ".join(every[:most]) + (f" and {more} more" if more > 0 else "")


def _folded(parts: Sequence[str]) -> str:
    """What stands at one place of several names."""
    if len(parts) == 1:
        return parts[0]
    if parts == [str(number) for number in range(len(parts))]:
        return f"{{0-{parts[-1]}}}"
    if len(parts) <= _ALTERNATIVES:
        return f"{{{','.join(parts)}}}"
    return f"{{{parts[0]},…,{parts[-1]}}}"
