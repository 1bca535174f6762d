"""Remember which stored tensors an engine makes one parameter of, and place them in a row at the next load.

A recorded load finds such groups (`Binding.groups`) when the checkpoint is in memory, which is too late for this one:
what is resident is not moved. `remember` keeps them for all checkpoints of the same structure (components, names,
dtypes and shapes of all tensors), in the user's cache folder. `groups_for` is what a load is given:

    attachment = client.attach(path, groups=remembered.groups_for)
    ...
    print(remembered.remember(attachment, binding.groups))

Groups are hints, also those of a file that somebody has changed: they decide where tensors lie and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from . import _group_files, layouts
from ._group_names import counted, fused_name, layers_folded
from ._sizes import size
from .types import ALIGNMENT, DTYPE_BITS, TensorKey

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from ._groups import Members
    from .attachment import Attachment
    from .types import TensorInfo

    T = TypeVar("T", bound=layouts.Named)

log = logging.getLogger(__name__)

_SHOWN = 3
"""Patterns of names that a sentence shows."""
_SALT = b"weightd groups 1\n"


class _Placed(layouts.Named, Protocol):
    """A tensor in memory: `segment` tells segments apart, `offset` is bytes."""

    @property
    def segment(self) -> int: ...
    @property
    def offset(self) -> int: ...


class Row(NamedTuple):
    """A group of tensors that something fuses into one, and whether they lie so in memory.

    `remembered` says that an engine's load found it, and not only the table of `weightd.layouts`. `reason` says why
    its tensors can never lie in a row; it is empty where they can.
    """

    component: str
    name: str
    members: tuple[str, ...]
    nbytes: int
    in_a_row: bool
    remembered: bool
    reason: str


def groups_for(stored: Sequence[layouts.Named]) -> list[list[TensorKey]]:
    """The groups that are remembered for a checkpoint of these tensors; `groups=` of a load. Errors: none."""
    order = _ordered(stored)
    fit, _ = _sorted_out(order, _known(order))
    return [[_key(order[number]) for number in group] for group in fit]


def exist() -> bool:
    """Whether this user has any groups remembered: a look at a folder, where `groups_for` needs the files' headers."""
    return _group_files.exist()


def remember(attachment: Attachment, groups: Iterable[Members]) -> str:
    """Keep groups whose tensors do not lie in a row, for the next load of a checkpoint of this structure.

    Returns a sentence for a report: how much memory is private for that, and what would have it shared; empty where
    there is nothing to say. Groups of tensors that the checkpoint does not have are left out. Errors: none.
    """
    wanted = [_members(group) for group in groups]
    if not wanted:
        return ""
    order = _ordered(attachment._manifest.tensors)
    if any(one.dtype not in DTYPE_BITS for one in order):  # of a GGUF file; such loads take no groups
        return ""
    numbers = {_key(one): number for number, one in enumerate(order)}
    asked = [tuple(numbers.get(member, -1) for member in group) for group in wanted]
    asked = [group for group in asked if min(group, default=-1) >= 0 and not _in_a_row(order, group)]
    if not asked:
        return ""
    fit, unfit = _sorted_out(order, asked)
    known: set[tuple[int, ...]] = set()
    table = _table(order) if unfit else {}
    longer = [group for group in unfit if group in table and not table[group].reason]  # than a load may be asked for
    problem = ""
    try:
        known = set(_group_files.add(_structure(order), len(order), fit)) if fit else known
    except (OSError, _group_files.UnusableFileError) as error:
        problem = str(error)
        log.warning("the order of tensors cannot be remembered: %s", problem)
    cannot = {group: why for group, why in unfit.items() if group not in longer}
    return _sentence(attachment, order, [*fit, *longer], known, cannot, problem)


def rows(tensors: Iterable[_Placed]) -> list[Row]:
    """The groups that the table and remembered loads know among all tensors of a checkpoint, in its order."""
    order = _ordered(tensors)
    table, kept = _table(order), dict.fromkeys(_known(order))
    found = []
    for members in {**table, **kept}:
        every = [order[number] for number in members]
        names = tuple(one.name for one in every)
        name, reason = table.get(members) or (fused_name(names), _unfit(order, members))
        nbytes = sum(one.length for one in every)
        if len(members) > 1:
            row = Row(every[0].component, name, names, nbytes, _in_a_row(order, members), members in kept, reason)
            found.append(row)
    return sorted(found, key=lambda row: (row.component, row.name))


# -- inside ------------------------------------------------------------------------------------------------------------


def _ordered(tensors: Iterable[T]) -> list[T]:
    """Tensors by component and name: their numbers in files and here."""
    return sorted(tensors, key=lambda one: (one.component, one.name))


def _key(tensor: layouts.Named) -> TensorKey:
    return TensorKey(tensor.component, tensor.name)


def _members(group: Members) -> list[TensorKey]:
    return [TensorKey("", member) if isinstance(member, str) else TensorKey(*member) for member in group]


def _structure(order: Sequence[layouts.Named]) -> str:
    """What groups depend on, as 64 hexadecimal digits: every tensor's component, name, dtype and shape."""
    rows = [(one.component, one.name, one.dtype, one.shape) for one in order]
    return hashlib.sha256(_SALT + json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def _known(order: Sequence[layouts.Named]) -> _group_files.Groups:
    """What is remembered of this structure; a file that cannot be used is none, and a line in the log."""
    try:
        return _group_files.read(_structure(order), len(order))
    except (OSError, _group_files.UnusableFileError) as error:
        log.warning("a remembered order of tensors is ignored: %s", error)
        return []


def _in_a_row(order: Sequence[_Placed], group: Iterable[int]) -> bool:
    there = (order[number] for number in group)
    return layouts.adjacent((one.segment, one.offset, one.length) for one in there)


class _Listed(NamedTuple):
    """A group of the table: what is made of it, and why its tensors cannot lie in a row; empty where they can."""

    name: str
    reason: str


def _table(order: Sequence[layouts.Named]) -> dict[tuple[int, ...], _Listed]:
    """The groups of the table by their members."""
    seam = f"one of its tensors has a length that is no multiple of {ALIGNMENT} bytes"
    return {group.members: _Listed(group.name, "" if group.seamless else seam) for group in layouts.groups(order)}


def _unfit(order: Sequence[layouts.Named], group: Sequence[int], taken: Collection[int] = ()) -> str:
    """Why a load cannot be asked for a group; empty where it can."""
    return layouts.unfit({number: order[number] for number in group if order[number].length}, group, taken)


def _sorted_out(
    order: Sequence[layouts.Named], asked: Iterable[tuple[int, ...]]
) -> tuple[list[tuple[int, ...]], dict[tuple[int, ...], str]]:
    """Groups that a load can place in a row, and why it cannot for others."""
    fit: list[tuple[int, ...]] = []
    unfit: dict[tuple[int, ...], str] = {}
    taken: set[int] = set()
    for group in dict.fromkeys(asked):
        if why := _unfit(order, group, taken):
            unfit[group] = why
        else:
            taken.update(group)
            fit.append(group)
    return fit, unfit


def _sentence(
    attachment: Attachment,
    order: Sequence[TensorInfo],
    fit: Sequence[tuple[int, ...]],
    known: set[tuple[int, ...]],
    unfit: Mapping[tuple[int, ...], str],
    problem: str,
) -> str:
    loaded = attachment.loaded
    how = loaded.order if loaded is not None else "resident"
    if loaded is not None and not how and not loaded.unique_bytes:  # it had no groups, and brought nothing
        how = "resident"
    again = [group for group in fit if group in known and how == "requested"]
    later = [group for group in fit if group not in again]
    said = []
    if later:
        why = {
            "resident": "the checkpoint was resident in another order, and nothing in memory is moved",
            "joined": "the checkpoint was loaded by another process, in another order",
        }.get(how, "this load did not know the order yet")
        digest = attachment.content_digest.removeprefix("sha256:")[:12]
        said.append(
            f"{why}: {_named(order, later)} would be shared after `weightd rm {digest}` and a new load, "
            + (f"but their order cannot be remembered: {problem}" if problem else "for which their order is remembered")
            + ("" if problem else ", unless another checkpoint has some of their tensors")
        )
    if again:
        said.append(
            f"{_named(order, again)} stay private although this load asked for their order: another checkpoint has "
            "some of their tensors already, or free memory is in pieces"
        )
    if unfit:
        said.append(f"{_named(order, list(unfit))} cannot be shared: {next(iter(unfit.values()))}")
    return "; ".join(said)


def _named(order: Sequence[TensorInfo], groups: Sequence[tuple[int, ...]]) -> str:
    """Which parameters these are made into, and how many bytes."""
    patterns = Counter(layers_folded(fused_name([order[number].name for number in group])) for group in groups)
    nbytes = sum(order[number].length for group in groups for number in group)
    many = "1 parameter" if len(groups) == 1 else f"{len(groups)} parameters"
    return f"{counted(patterns, _SHOWN)} ({many}, {size(nbytes)})"
