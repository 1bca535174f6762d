"""Resolve references, such as in `weightd load REF`, to files. No daemon, no torch, no network.

A reference is the path of a safetensors or GGUF file, the path of a directory, or `org/name[@revision]` in the local
Hugging Face cache. What exists as a path wins over the cache. A path is opened as it was given, as the kernel reads it;
only the name that is shown for it is tidied. Any part of a split GGUF file (`NAME-00001-of-00003.gguf`) stands for all
of its parts, which lie beside it, by the name of the first.

A directory that `model_index.json` makes a pipeline is what its components hold. Any other directory with weights is
those weights, whatever lies below it (see _references/folders.py); one without is what `modules.json` lists.
Where no safetensors files are, there must be one GGUF file, or the parts of one: several are mostly the same weights,
quantised differently. Anything else is no checkpoint, and the error says which ones lie below it.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ._formats import GGUF
from ._references.files import OpenedReference, ReferencedFile, in_order, show, translated
from ._references.folders import DIFFUSERS, TRANSFORMERS, ReferenceChoice, list_files, read_json, shard_of, weights
from ._references.huggingface import find_snapshot
from ._references.index import PICKLES, SUFFIX, is_below
from ._references.survey import checkpoints_below
from .errors import FormatError, InvalidReferenceError, NotFoundError, WeightdError

if TYPE_CHECKING:
    from collections.abc import Iterable

log = logging.getLogger(__name__)

_PIPELINE: Final = "model_index.json"
_MODULES: Final = "modules.json"
_INDEX: Final = re.compile(r".+\.safetensors\.index(?:\.[^.]+)?\.json")
_GGUF_PART: Final = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")
_NO_WEIGHTS: Final = re.compile(r"(?:training_args|optimizer|scheduler|rng_state|scaler)")
"""What a trainer leaves beside weights, as pickles."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A reference's name in the daemon and its files, the weights by component and name, then the indexes.

    `notes` say what was chosen that was not asked for, a line each; `hint` what whoever types may have meant instead.
    """

    name: str
    sources: tuple[ReferencedFile, ...]
    notes: tuple[str, ...] = ()
    hint: str = ""


Reference = str | os.PathLike[str] | Resolved
"""What names a checkpoint: a path, a name, a digest, or files that were chosen already."""


def is_path(reference: str | os.PathLike[str]) -> bool:
    """Whether a reference is taken as a path: a Path object, what looks like a path, and whatever exists."""
    if isinstance(reference, os.PathLike):
        return True
    if reference in (".", "..") or reference.startswith(("/", "./", "../", "~")):
        return True
    return bool(reference) and "\0" not in reference and os.path.lexists(reference)


def reference_name(reference: str | os.PathLike[str], variant: str | None = None) -> str:
    """The name that a reference stands for: a path made absolute, its symlinks kept; anything else unchanged.

    Symlinks are kept so that `/models/current` stays one name, whatever it points to. All parts of a split GGUF file
    stand for the first, so that the checkpoint has one name whichever was given. A variant that was asked for stands in
    front (`fp16:/models/sdxl`), where no path and no repository can have it.
    Errors: InvalidReferenceError (no reference, or a variant that no file name can have).
    """
    if variant is not None and (not variant or not is_below(variant) or "/" in variant):
        raise InvalidReferenceError(f"variant {variant!r}: must be a part of file names, such as fp16")
    name = _checked(reference)
    if is_path(reference):
        folder, last = os.path.split(_tidied(path_of(reference)))
        name = os.path.join(folder, _gguf_parts(last)[0])
    return f"{variant}:{name}" if variant else name


def path_of(reference: str | os.PathLike[str]) -> str:
    """The path to open for a reference that is one: absolute, and otherwise as it was given.

    Errors: NotFoundError (it is relative to a folder that is gone).
    """
    text = _checked(reference)
    if not os.path.lexists(text):  # a file may be called "~"
        text = os.path.expanduser(text)
    if os.path.isabs(text):
        return text
    try:
        return os.path.join(os.getcwd(), text)
    except FileNotFoundError as error:
        raise NotFoundError(f"{show(text)}: is relative, and the current directory is gone; change it") from error


def resolve(reference: str | os.PathLike[str], variant: str | None = None) -> Resolved:
    """Find the files of a reference, which are not opened yet; of a directory, those of a variant where one is given.

    Raises InvalidReferenceError for what cannot be loaded (pickles, several checkpoints, neither a path nor a
    repository id), NotFoundError for what is not there, FormatError for a damaged index, PermissionDeniedError for a
    folder that may not be read.
    """
    name = reference_name(reference, variant)
    chosen = _from_path(path_of(reference), variant) if is_path(reference) else _from_cache(name, reference, variant)
    for source in chosen.sources:
        _require_utf8(f"{source.component}/{source.file}")
    return Resolved(_require_utf8(name), in_order(chosen.sources), chosen.notes, _hint(chosen.sources))


def files_of(reference: str | os.PathLike[str] | Resolved, variant: str | None = None) -> Resolved:
    """The files of a reference, unless they are chosen already. Notes are warnings in the log, the hint is for INFO."""
    if isinstance(reference, Resolved):
        return reference
    resolved = resolve(reference, variant)
    for note in resolved.notes:
        log.warning("%s", note)
    if resolved.hint:
        log.info("%s", resolved.hint)
    return resolved


def folder_of(reference: str | os.PathLike[str]) -> Path:
    """The folder that a reference is: one that exists, as it was given, or a repository's in the cache.

    It is never the parent of what was named. Errors: NotFoundError (no such folder, or not in the cache),
    InvalidReferenceError (a file, or no reference at all), PermissionDeniedError.
    """
    if not is_path(reference):
        return find_snapshot(_checked(reference))[0]
    path = path_of(reference)
    if not stat.S_ISDIR(_mode(path)):
        raise InvalidReferenceError(f"{show(path)}: is a file, where a folder or org/name[@revision] is expected")
    return Path(path)


def single_file(path: str) -> Resolved:
    """The file at a path, whatever it is called: neither other parts nor an index count. It is not looked at yet.

    Errors: InvalidReferenceError (no path), NotFoundError (it is relative to a folder that is gone).
    """
    place = path_of(path)
    name = _require_utf8(_tidied(place))
    return Resolved(name, (ReferencedFile("", os.path.basename(name), Path(place)),))


def open_sources(resolved: Resolved) -> OpenedReference:
    """Open the files of a resolved reference; use the result in a `with` statement."""
    return OpenedReference(resolved.sources, resolved.name)


def _checked(reference: str | os.PathLike[str]) -> str:
    text = os.fspath(reference)
    if not text or "\0" in text:
        raise InvalidReferenceError(f"reference {text!r} is empty or holds a NUL; give a path or org/name[@revision]")
    return text


def _require_utf8(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InvalidReferenceError(f"{name!r}: not valid UTF-8; rename it") from error
    return name


def _tidied(path: str) -> str:
    """An absolute path as it is shown: `x/..` goes only where x is a folder, and no symlink to one."""
    done = "/"
    for part in path.split("/"):
        if part == ".." and (done == "/" or (os.path.basename(done) != ".." and _is_folder_itself(done))):
            done = os.path.dirname(done)
        elif part not in ("", "."):
            done = os.path.join(done, part)
    return done


def _is_folder_itself(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def _mode(path: str) -> int:
    try:
        return os.stat(path).st_mode
    except OSError as error:
        raise translated(Path(path), error) from error


def _hint(sources: tuple[ReferencedFile, ...]) -> str:
    """What to say where a single file was given that calls itself one of several."""
    shard = shard_of(sources[0].file) if len(sources) == 1 else None
    if shard is None or shard[1] < 2:
        return ""
    return f"{show(sources[0].path)}: is shard {shard[0]} of {shard[1]} alone; give its folder for all of them"


# Paths


def _from_path(given: str, variant: str | None) -> ReferenceChoice:
    path = Path(given)
    parts = _gguf_parts(path.name)
    if len(parts) > 1:
        _refuse_variant(path, variant)
        return ReferenceChoice(_all_there(path.parent, parts))
    mode = _mode(given)
    if stat.S_ISDIR(mode):
        return _from_directory(path, variant, f"{show(path)}: neither safetensors nor GGUF files in this directory")
    if not stat.S_ISREG(mode):
        raise InvalidReferenceError(f"{show(path)}: not a regular file; give a safetensors or GGUF file or a directory")
    _refuse_variant(path, variant)
    _refuse_pickle(path)
    if _INDEX.fullmatch(path.name):
        raise InvalidReferenceError(f"{show(path)}: an index, not a checkpoint; give its directory")
    return ReferenceChoice((ReferencedFile("", path.name, path),))


def _refuse_variant(path: Path, variant: str | None) -> None:
    if variant is not None:
        raise InvalidReferenceError(
            f"{show(path)}: is a file, which has no variant {variant}; give it without, or its folder"
        )


def is_pickle(name: str) -> bool:
    """Whether a file's name says that it is a pickle of weights, which can run code and is not loaded."""
    return name.lower().endswith(PICKLES) and not _NO_WEIGHTS.match(name)


def _refuse_pickle(path: Path) -> None:
    if path.suffix.lower() in PICKLES:
        raise InvalidReferenceError(
            f"{show(path)}: a pickle, which can run code and is not loaded; convert it with "
            f"safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True), {path.stem + SUFFIX!r})"
        )


def _from_directory(root: Path, variant: str | None, nothing: str) -> ReferenceChoice:
    """The weights of a directory; `nothing` is the message where there are none."""
    if os.path.isfile(root / _PIPELINE) and (listed := _listed_components(root)):
        if (chosen := _components(root, listed, variant)).sources:
            return chosen
        raise _no_component(root, variant, chosen.notes)  # what lies in the folder itself is not what was asked for
    if (chosen := weights(root, "", variant, (TRANSFORMERS, DIFFUSERS))).sources:
        return chosen
    if os.path.isfile(root / _MODULES) and (chosen := _components(root, _listed_modules(root), variant)).sources:
        return chosen
    if variant is not None:
        raise NotFoundError(f"{show(root)}: has no weights of variant {variant}; leave it out, or download it")
    files = list_files(root)
    if sources := _only_gguf(root, files):
        return ReferenceChoice(sources)
    if below := checkpoints_below(root):
        raise InvalidReferenceError(f"{show(root)}: has no weights of its own; {below}")
    for name in files:
        if is_pickle(name):
            _refuse_pickle(root / name)
    raise NotFoundError(nothing)


def _components(root: Path, names: Iterable[tuple[str, bool]], variant: str | None) -> ReferenceChoice:
    """The weights of a directory's components: (name, whether diffusers' own). Of those that lack a variant, the plain
    ones, as diffusers does, but one must have it. Errors: NotFoundError (a component has other variants only).
    """
    sources: list[ReferencedFile] = []
    notes: list[str] = []
    has_variant = False
    for name, by_diffusers in names:
        rules = (DIFFUSERS, TRANSFORMERS) if by_diffusers else (TRANSFORMERS, DIFFUSERS)
        chosen = weights(root / name, name, variant, rules) if variant else ReferenceChoice()
        has_variant = has_variant or bool(chosen.sources)
        if not chosen.sources:
            chosen = weights(root / name, name, None, rules, plain=variant is not None)
            if variant and not chosen.sources and any(file.endswith(SUFFIX) for file in list_files(root / name)):
                raise NotFoundError(
                    f"{show(root / name)}: has no weights of variant {variant}, and no plain ones; download them, or "
                    "ask for another variant"
                )
            if variant and chosen.sources:
                notes.append(f"{show(root / name)}: has no weights of variant {variant}; its plain ones are taken")
        sources += chosen.sources
        notes += chosen.notes
        if not chosen.sources and any(is_pickle(file) for file in list_files(root / name)):
            notes.append(f"{show(root / name)}: is left out, for its weights are pickles; convert them to safetensors")
    return ReferenceChoice(tuple(sources), tuple(notes)) if has_variant or not variant else ReferenceChoice()


def _no_component(root: Path, variant: str | None, notes: tuple[str, ...]) -> WeightdError:
    """The error where no component of a pipeline has weights, or none of a variant."""
    if variant is not None:
        return NotFoundError(f"{show(root)}: has no weights of variant {variant}; leave it out, or download it")
    if notes:
        return InvalidReferenceError(f"{show(root)}: has no weights that can be loaded: {'; '.join(notes)}")
    if below := checkpoints_below(root):
        return InvalidReferenceError(f"{show(root)}: no component of {_PIPELINE} has weights; {below}")
    return NotFoundError(f"{show(root)}: no component of {_PIPELINE} has weights; download them")


def _listed_components(root: Path) -> list[tuple[str, bool]]:
    """The components that model_index.json lists, each of which has its folder, and whether it is diffusers' own."""
    path = root / _PIPELINE
    document = read_json(path)
    if not isinstance(document, dict):
        raise FormatError(f"{show(path)}: not a JSON object; download it again")
    found = []
    for name, value in sorted(document.items()):
        is_one = isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
        if is_one and not name.startswith("_"):
            found.append((_component(root, path, name), value[0] == "diffusers"))
    return found


def _listed_modules(root: Path) -> list[tuple[str, bool]]:
    """The modules that modules.json lists (sentence-transformers), but the folder itself."""
    path = root / _MODULES
    document = read_json(path)
    paths = (
        [one.get("path") if isinstance(one, dict) else None for one in document]
        if isinstance(document, list)
        else [None]
    )
    if not all(isinstance(one, str) for one in paths):
        raise FormatError(f"{show(path)}: not a list of modules with paths; download it again")
    return [(_component(root, path, one), False) for one in sorted({one for one in paths if one})]


def _component(root: Path, path: Path, name: str) -> str:
    if not is_below(name):
        raise FormatError(f"{show(path)}: component {name[:200]!r} leads out of the folder; the file is not trusted")
    if not os.path.isdir(root / name):
        raise NotFoundError(
            f"{show(path)}: lists component {name!r}, but there is no such folder beside it; download it all"
        )
    return name


# GGUF


def _gguf_parts(name: str) -> list[str]:
    """The names of all parts of the split GGUF file that `name` is one of, in order; of any other name itself."""
    match = _GGUF_PART.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return [name]
    stem, count = match["stem"], match["count"]
    return [f"{stem}-{number:05}-of-{count}{GGUF.suffix}" for number in range(1, int(count) + 1)]


def _all_there(folder: Path, parts: list[str]) -> tuple[ReferencedFile, ...]:
    """The sources of a GGUF file's parts, all of which must be in their folder."""
    for number, part in enumerate(parts, start=1):
        if not os.path.exists(folder / part):
            raise NotFoundError(f"{show(folder / part)}: part {number} of {len(parts)} is missing; download it")
    return tuple(ReferencedFile("", part, folder / part) for part in parts)


def _only_gguf(root: Path, files: list[str]) -> tuple[ReferencedFile, ...]:
    """The one GGUF file of a directory, or its parts; empty where there is none."""
    found = {
        parts[0]: parts for parts in (_gguf_parts(n) for n in files if n.endswith(GGUF.suffix) and n != GGUF.suffix)
    }
    if len(found) > 1:
        listed = ", ".join(map(show, list(found)[:10]))
        more = f" and {len(found) - 10} more" if len(found) > 10 else ""
        raise InvalidReferenceError(f"{show(root)}: holds several GGUF files ({listed}{more}); give one of them")
    return tuple(source for parts in found.values() for source in _all_there(root, parts))


# The Hugging Face cache


def _from_cache(name: str, reference: str | os.PathLike[str], variant: str | None) -> ReferenceChoice:
    snapshot, download = find_snapshot(os.fspath(reference))
    return _from_directory(
        snapshot,
        variant,
        f"{name}: its snapshot {show(snapshot)} holds neither safetensors nor GGUF files; run `{download}`",
    )
