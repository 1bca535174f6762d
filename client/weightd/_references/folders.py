"""Select the weight files of one folder, by the rules of the frameworks that wrote them.

transformers and diffusers each know a file by its name, or an index beside it. What they would pass over counts after
that: the index, the whole set of shards or the single file of another name. Nothing below the folder counts, but the
shards that an index lists there.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final, NamedTuple

from weightd.errors import FormatError, InvalidReferenceError, NotFoundError

from .files import ReferencedFile, open_regular, show, translated
from .index import MAX_JSON_BYTES, SUFFIX, parse_json, weight_map

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

_SHARD: Final = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]+)-of-(?P<count>[0-9]+)(?P<rest>(?:\.[^.]+)*)")
_OTHER_INDEX: Final = re.compile(r"(?P<stem>.+)\.safetensors\.index\.json")
_LISTED: Final = 10
"""How many names an error lists."""


class ReferenceRule(NamedTuple):
    """How a reference's weights are found: one framework's file names, and whether an index is looked for first."""

    weights: str
    index_first: bool

    def names(self, variant: str | None) -> tuple[str, ...]:
        """The names that it looks for; the first one that is there wins."""
        one, index = _with_variant(self.weights, variant), _with_variant(f"{self.weights}.index.json", variant)
        if not self.index_first:
            return one, index
        # An older form of diffusers has the variant in the middle of an index's name; diffusers still reads it.
        return index, *([f"{self.weights}.{variant}.index.json"] if variant else []), one


TRANSFORMERS: Final = ReferenceRule("model.safetensors", index_first=False)
DIFFUSERS: Final = ReferenceRule("diffusion_pytorch_model.safetensors", index_first=True)


class ReferenceChoice(NamedTuple):
    """The weight files chosen for a reference, and notes for the caller about the choice, a line each."""

    sources: tuple[ReferencedFile, ...] = ()
    notes: tuple[str, ...] = ()


def weights(
    folder: Path, component: str, variant: str | None, rules: Sequence[ReferenceRule], *, plain: bool = False
) -> ReferenceChoice:
    """The weights of one folder, by the first of the rules that finds any, else by other names; empty where none are.

    `plain` is for who has asked for a variant that is not there: then nothing counts that may be another variant.
    Errors: InvalidReferenceError (several checkpoints), NotFoundError (a shard is missing, or the folder), FormatError
    (a damaged index), PermissionDeniedError.
    """
    for rule in rules:
        if name := weights_name(folder, rule, variant):
            return ReferenceChoice(sources_of(folder, component, name))
    files = list_files(folder)
    groups = _groups(files)
    if variant is not None:
        return ReferenceChoice(
            _picked(folder, component, [group for group in groups if group.stem.endswith(f".{variant}")])
        )
    if plain:
        files = [name for name in files if "." not in name.removesuffix(".index.json").removesuffix(SUFFIX)]
        groups = [group for group in groups if "." not in group.stem]
    indexes = [name for name in files if _OTHER_INDEX.fullmatch(name)]
    if len(indexes) > 1:
        raise _several(folder, "indexes", indexes, "keep one of them")
    if indexes:
        return ReferenceChoice(sources_of(folder, component, indexes[0]))
    of_frameworks = tuple(rule.weights.removesuffix(SUFFIX) + "." for rule in rules)
    sets = [group for group in groups if group.total and not group.stem.startswith(of_frameworks)]
    if sets:
        return ReferenceChoice(_picked(folder, component, sets))
    for rule in () if plain else rules:
        only = only_variant(folder, rule)
        if only and (name := weights_name(folder, rule, only)):
            return ReferenceChoice(sources_of(folder, component, name), (variant_note(folder, only),))
    stems = {group.stem for group in groups}
    return ReferenceChoice(
        _picked(folder, component, [group for group in groups if not _is_variant(group.stem, stems)])
    )


def weights_name(folder: Path, rule: ReferenceRule, variant: str | None) -> str | None:
    """The file or the index that a framework loads from a folder; None where it finds neither."""
    return next((name for name in rule.names(variant) if os.path.isfile(folder / name)), None)


def sources_of(folder: Path, component: str, name: str) -> tuple[ReferencedFile, ...]:
    """A file, or the shards of an index, all of which must be there, and the index itself.

    Errors: NotFoundError (a shard is missing), FormatError (the index is damaged, or leads elsewhere).
    """
    if name.endswith(SUFFIX):
        return (ReferencedFile(component, name, folder / name),)
    path = folder / name
    shards = sorted(set(weight_map(show(path), _read(path)).values()))
    for shard in shards:
        # A dangling symlink is how the Hugging Face cache shows a file whose bytes are gone.
        if not os.path.exists(folder / shard):
            raise NotFoundError(f"{show(folder / shard)}: shard is missing, but {show(path)} lists it; download it")
    found = [ReferencedFile(component, shard, folder / shard) for shard in shards]
    return (*found, ReferencedFile(component, name, path, is_index=True))


def only_variant(folder: Path, rule: ReferenceRule) -> str | None:
    """The variant of which alone a folder has weights; None where it has none.

    Errors: InvalidReferenceError (several variants), PermissionDeniedError, NotFoundError (no such folder).
    """
    stem, suffix = map(re.escape, os.path.splitext(rule.weights))
    pattern = re.compile(rf"{stem}\.(?P<one>.+){suffix}|{stem}{suffix}\.index\.(?P<index>.+)\.json")
    matches = map(pattern.fullmatch, list_files(folder))
    variants = {match["one"] or match["index"] for match in matches if match}
    found = sorted(variant for variant in variants if not _SHARD.fullmatch(variant))
    if len(found) > 1:
        raise InvalidReferenceError(
            f"{show(folder)}: has {rule.weights} only as variants ({_listed(found)}); say which with --variant, "
            "or variant="
        )
    return found[0] if found else None


def variant_note(folder: Path, variant: str) -> str:
    """What is said where a variant is taken that nobody has asked for."""
    return f"{show(folder)}: has weights of the variant {variant} only, which are taken"


def not_there(folder: Path, rule: ReferenceRule, variant: str | None, below: str = "") -> NotFoundError:
    """The error where a folder has no weights of a variant; `below` says what lies there instead."""
    one, *_, index = sorted(rule.names(variant), key=len)
    kind = f" of variant {variant}" if variant else ""
    more = f"; {below}" if below else ""
    return NotFoundError(f"{show(folder)}: has neither {one} nor {index}, the weights{kind} that would be loaded{more}")


def list_files(folder: Path) -> list[str]:
    """Names of what is no folder, sorted; hidden ones are left out. Errors: NotFoundError, PermissionDeniedError."""
    try:
        with os.scandir(folder) as entries:
            # Not entry.is_dir(): that raises for a symlink to itself.
            return sorted(e.name for e in entries if not e.name.startswith(".") and not os.path.isdir(e))
    except OSError as error:
        raise translated(folder, error) from error


def read_json(path: Path) -> object:
    """A JSON file that nobody vouches for. Errors: FormatError, NotFoundError, InvalidReferenceError."""
    return parse_json(show(path), _read(path))


def _read(path: Path) -> bytes:
    descriptor, status = open_regular(path)
    with open(descriptor, "rb") as file:
        if status.st_size > MAX_JSON_BYTES:
            raise FormatError(f"{show(path)}: {status.st_size} bytes, over the limit of {MAX_JSON_BYTES}; not an index")
        return file.read(MAX_JSON_BYTES + 1)  # the file may have grown since


def _with_variant(name: str, variant: str | None) -> str:
    """`model.fp16.safetensors`, `model.safetensors.index.fp16.json`."""
    stem, suffix = os.path.splitext(name)
    return f"{stem}.{variant}{suffix}" if variant else name


def shard_of(name: str) -> tuple[int, int] | None:
    """The number and the count that the name of a shard says; None for any other name."""
    match = _SHARD.fullmatch(name.removesuffix(SUFFIX))
    return (int(match["number"]), int(match["count"])) if match and name.endswith(SUFFIX) else None


class _Group(NamedTuple):
    """A file, or shards that differ in their number alone: their common name, how many a whole set has (0 for a file)
    and those that are there, by number.
    """

    stem: str
    total: int
    parts: dict[int, str]


def _groups(files: Iterable[str]) -> list[_Group]:
    """The safetensors files among these."""
    found: dict[tuple[str, str], _Group] = {}
    for name in files:
        if name.endswith(SUFFIX) and name != SUFFIX:
            match = _SHARD.fullmatch(name.removesuffix(SUFFIX))
            if match and int(match["count"]):
                group = _Group(match["stem"] + match["rest"], int(match["count"]), {})
                found.setdefault((group.stem, match["count"]), group).parts[int(match["number"])] = name
            else:
                found[name, ""] = _Group(name.removesuffix(SUFFIX), 0, {1: name})
    return list(found.values())


def _picked(folder: Path, component: str, groups: list[_Group]) -> tuple[ReferencedFile, ...]:
    """The one whole set of shards, else the one file; nothing where no group is.

    Errors: NotFoundError (a shard is missing), InvalidReferenceError (several).
    """
    sets = [group for group in groups if group.total]
    for stem in ("model", "diffusion_pytorch_model"):
        sets = [group for group in sets if group.stem == stem] or sets
    whole = [group for group in sets if _missing(folder, group) is None] if sets else groups
    if len(whole) > 1:
        names = [group.parts[min(group.parts)] for group in whole]
        advice = f"give one of them, as {show(folder / names[0])}"
        if any(group.total > 1 for group in whole):  # one shard would be loaded alone
            advice = "move each set of shards to a folder of its own, or add the index of the one that you mean"
        raise _several(folder, "checkpoints", names, advice)
    if sets and not whole:
        group = sets[0]
        raise NotFoundError(
            f"{show(folder)}: shard {_missing(folder, group)} of {group.total} is missing beside "
            f"{show(group.parts[min(group.parts)])}, and no index says otherwise; download it"
        )
    return tuple(
        ReferencedFile(component, name, folder / name) for group in whole for _, name in sorted(group.parts.items())
    )


def _missing(folder: Path, group: _Group) -> int | None:
    """The number of the first shard that is not there."""
    numbers = range(1, group.total + 1)
    return next((n for n in numbers if n not in group.parts or not os.path.exists(folder / group.parts[n])), None)


def _is_variant(stem: str, stems: set[str]) -> bool:
    """Whether a file is another's variant: `model.fp16` beside `model`."""
    parts = stem.split(".")
    return any(".".join(parts[:count]) in stems for count in range(1, len(parts)))


def _several(folder: Path, what: str, names: Sequence[str], advice: str) -> InvalidReferenceError:
    return InvalidReferenceError(f"{show(folder)}: has several {what} ({_listed(names)}); {advice}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(show, names[:_LISTED])) + more
