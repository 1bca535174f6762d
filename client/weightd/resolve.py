"""References: what `weightd load REF` may name, turned into files. No daemon, no torch, no network.

A reference is the path of a safetensors or GGUF file, the path of a directory, or `org/name[@revision]` in the local
Hugging Face cache. What exists as a path wins over the cache. Any part of a split GGUF file
(`NAME-00001-of-00003.gguf`) stands for all of its parts, which lie beside it, by the name of the first.

In a directory every folder with weights is a component (the directory itself: ""), as in a Diffusers pipeline. A
folder's weights are the shards of its index where it has one, else all its safetensors files but variants
(`model.fp16.safetensors` beside `model.safetensors`). Where `model_index.json` makes the directory a pipeline and its
components have weights, files beside it are left out: they are the same weights once more, in other layouts.

Only where no folder has safetensors files GGUF files count, and then there must be one, or the parts of one: several
are mostly the same weights, quantised differently, and a folder does not say which are meant.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from ._files import OpenedSources, SourcePath, open_regular, show, translated
from ._huggingface import find_snapshot
from .errors import FormatError, InvalidReferenceError, NotFoundError

MAX_DEPTH: Final = 4
"""Folders below the directory that are looked into."""
MAX_JSON_BYTES: Final = 64 * 1024 * 1024
"""Largest index that is read, in bytes."""

_SUFFIX: Final = ".safetensors"
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PIPELINE: Final = "model_index.json"
_INDEX: Final = re.compile(r"(?P<stem>.+)\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json")
_PREFERRED: Final = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")
_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}$")
_GGUF: Final = ".gguf"
_GGUF_PART: Final = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")


@dataclass(frozen=True, slots=True)
class Resolved:
    """A reference's name in the daemon and its files, sorted by component and file; never empty."""

    name: str
    sources: tuple[SourcePath, ...]


def is_path(reference: str | os.PathLike[str]) -> bool:
    """Whether a reference is taken as a path: a Path object, what looks like a path, and whatever exists."""
    if isinstance(reference, os.PathLike):
        return True
    if reference in (".", "..") or reference.startswith(("/", "./", "../", "~")):
        return True
    return bool(reference) and "\0" not in reference and os.path.lexists(reference)


def reference_name(reference: str | os.PathLike[str]) -> str:
    """The name that a reference stands for: a path made absolute, its symlinks kept; anything else unchanged.

    Symlinks are kept so that `/models/current` stays one name, whatever it points to. All parts of a split GGUF file
    stand for the first, so that the checkpoint has one name whichever was given.
    """
    text = os.fspath(reference)
    if not text or "\0" in text:
        raise InvalidReferenceError(f"reference {text!r} is empty or holds a NUL; give a path or org/name[@revision]")
    if not is_path(reference):
        return text
    folder, name = os.path.split(os.path.abspath(os.path.expanduser(text)))
    return os.path.join(folder, _gguf_parts(name)[0])


def resolve(reference: str | os.PathLike[str]) -> Resolved:
    """Find the files of a reference, which are not opened yet.

    Raises InvalidReferenceError for what cannot be loaded (pickles, several GGUF files, neither a path nor a repository
    id), NotFoundError for what is not there, FormatError for a damaged index, PermissionDeniedError for a folder that
    may not be read.
    """
    name = reference_name(reference)
    sources = _from_path(Path(name)) if is_path(reference) else _from_cache(name)
    for source in sources:
        _require_utf8(f"{source.component}/{source.file}")
    return Resolved(_require_utf8(name), sources)


def folder_of(reference: str | os.PathLike[str]) -> Path:
    """The folder that a reference is: one that exists, as it was given, or a repository's in the cache.

    It is never the parent of what was named. Errors: NotFoundError (no such folder, or not in the cache),
    InvalidReferenceError (a file, or no reference at all), PermissionDeniedError.
    """
    name = reference_name(reference)
    if not is_path(reference):
        return find_snapshot(name)[0]
    path = Path(name)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise translated(path, error) from error
    if not stat.S_ISDIR(mode):
        raise InvalidReferenceError(f"{show(path)}: is a file, and a folder is needed; give the folder that it is in")
    return path


def indexed_files(folder: Path, index: str) -> list[str]:
    """Names of the shards that an index in a folder lists, all of which are there.

    Errors: NotFoundError (a shard is missing), FormatError (the index is damaged, or leads elsewhere).
    """
    try:
        files = tuple(os.listdir(folder))
    except OSError as error:
        raise translated(folder, error) from error
    return _shards(_Folder("", folder, files, ()), index)


def open_sources(resolved: Resolved) -> OpenedSources:
    """Open the files of a resolved reference; use the result in a `with` statement."""
    return OpenedSources(resolved.sources)


def _read_json(path: Path) -> object:
    """Read a JSON file that nobody vouches for."""
    descriptor, status = open_regular(path)
    with open(descriptor, "rb") as file:
        if status.st_size > MAX_JSON_BYTES:
            raise FormatError(f"{show(path)}: {status.st_size} bytes, over the limit of {MAX_JSON_BYTES}; not an index")
        raw = file.read(MAX_JSON_BYTES + 1)  # the file may have grown since
    try:
        document: object = json.loads(raw[:MAX_JSON_BYTES].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{show(path)}: not valid JSON; download it again") from error
    return document


def _require_utf8(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InvalidReferenceError(f"{name!r}: not valid UTF-8; rename it") from error
    return name


# Paths


def _from_path(path: Path) -> tuple[SourcePath, ...]:
    parts = _gguf_parts(path.name)
    if len(parts) > 1:
        return _all_there("", path.parent, parts)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise translated(path, error) from error
    if stat.S_ISDIR(mode):
        return _from_directory(path, f"{show(path)}: neither safetensors nor GGUF files in this directory")
    if not stat.S_ISREG(mode):
        raise InvalidReferenceError(f"{show(path)}: not a regular file; give a safetensors or GGUF file or a directory")
    _refuse_suffix(path)
    if _INDEX.fullmatch(path.name):
        raise InvalidReferenceError(f"{show(path)}: an index, not a checkpoint; give its directory")
    return (SourcePath("", path.name, path),)


def _refuse_suffix(path: Path) -> None:
    if path.suffix.lower() in _PICKLES:
        raise InvalidReferenceError(
            f"{show(path)}: a pickle, which can run code and is not loaded; convert it with "
            f"safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True), {path.stem + _SUFFIX!r})"
        )


class _Folder(NamedTuple):
    """What lies in one folder; both sorted, hidden entries left out."""

    component: str
    path: Path
    files: tuple[str, ...]
    folders: tuple[str, ...]


def _walk(root: Path) -> list[_Folder]:
    """The directory and its subfolders, in order; symlinked folders are followed unless they lead back up."""
    found: list[_Folder] = []

    def visit(path: Path, component: str, depth: int, above: frozenset[tuple[int, int]]) -> None:
        files: list[str] = []
        folders: list[str] = []
        try:
            status = path.stat()
            here = (status.st_dev, status.st_ino)
            if here in above:
                return
            with os.scandir(path) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        # Not entry.is_dir(): that raises for a symlink to itself.
                        (folders if os.path.isdir(entry) else files).append(entry.name)
        except OSError as error:
            raise translated(path, error) from error
        found.append(_Folder(component, path, tuple(sorted(files)), tuple(sorted(folders))))
        if depth < MAX_DEPTH:
            for name in sorted(folders):
                visit(path / name, f"{component}/{name}" if component else name, depth + 1, above | {here})

    visit(root, "", 0, frozenset())
    return found


def _from_directory(root: Path, nothing: str) -> tuple[SourcePath, ...]:
    """The weights of a directory; `nothing` is the message where there are none."""
    folders = _walk(root)
    pipeline = _PIPELINE in folders[0].files and _check_pipeline(folders[0])
    sources = [
        SourcePath(folder.component, name, folder.path / name) for folder in folders for name in _weights(folder)
    ]
    if pipeline and any(source.component for source in sources):
        sources = [source for source in sources if source.component]
    if not sources:
        sources = _only_gguf(root, folders)
    if not sources:
        for folder in folders:
            for name in folder.files:
                _refuse_suffix(folder.path / name)
        raise NotFoundError(nothing)
    return tuple(sorted(sources))


def _check_pipeline(root: _Folder) -> bool:
    """Whether model_index.json lists components; each that it lists must have its folder."""
    path = root.path / _PIPELINE
    document = _read_json(path)
    if not isinstance(document, dict):
        raise FormatError(f"{show(path)}: not a JSON object; download it again")
    components = [
        key
        for key, value in document.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
    ]
    missing = sorted(set(components) - set(root.folders))
    if missing:
        raise NotFoundError(
            f"{show(path)}: lists component {missing[0]!r}, but there is no such folder beside it; "
            f"download the whole pipeline"
        )
    return bool(components)


def _weights(folder: _Folder) -> list[str]:
    """The weight files of one folder."""
    names = [name for name in folder.files if name.endswith(_SUFFIX) and name != _SUFFIX]
    index = _choose_index(folder, names)
    if index is not None:
        return _shards(folder, index)
    stems = {name.removesuffix(_SUFFIX) for name in names}
    stems |= {_SHARD.sub("", stem) for stem in stems}

    def is_variant(name: str) -> bool:
        parts = _SHARD.sub("", name.removesuffix(_SUFFIX)).split(".")
        return any(".".join(parts[:count]) in stems for count in range(1, len(parts)))

    return [name for name in names if not is_variant(name)]


def _choose_index(folder: _Folder, weights: list[str]) -> str | None:
    """The index that lists the folder's weights; one of a variant gives way to a plain index, or to a plain file."""
    plain: list[str] = []
    variants: list[str] = []
    for name in folder.files:
        match = _INDEX.fullmatch(name)
        if match is None:
            continue
        stem, _, variant = match["stem"].partition(".")
        if not (variant or match["variant"]):
            plain.append(name)
        elif stem + _SUFFIX not in weights:
            variants.append(name)
    candidates = plain or variants
    for preferred in _PREFERRED:
        if preferred in candidates:
            return preferred
    if len(candidates) > 1:
        listed = ", ".join(show(name) for name in candidates)
        raise InvalidReferenceError(f"{show(folder.path)}: has several indexes ({listed}); keep one of them")
    return candidates[0] if candidates else None


def _shards(folder: _Folder, index: str) -> list[str]:
    """The files that an index lists; none may lead out of its folder."""
    path = folder.path / index
    document = _read_json(path)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{show(path)}: has no weight_map object with entries; download it again")
    shards: set[str] = set()
    for shard in weight_map.values():
        if not isinstance(shard, str):
            raise FormatError(f"{show(path)}: weight_map holds a value that is not a file name; download it again")
        shards.add(shard)
    present = set(folder.files)
    for shard in sorted(shards):
        if "/" in shard or "\\" in shard or "\0" in shard or shard in ("", ".", ".."):
            raise FormatError(f"{show(path)}: shard {shard[:200]!r} is not a plain file name; the index is not trusted")
        _refuse_suffix(folder.path / shard)
        if not shard.endswith(_SUFFIX):
            raise FormatError(f"{show(path)}: shard {shard[:200]!r} is not a safetensors file; download it again")
        # A dangling symlink is how the Hugging Face cache shows a file whose bytes are gone.
        if shard not in present or not os.path.exists(folder.path / shard):
            raise NotFoundError(
                f"{show(folder.path / shard)}: shard is missing, but {show(path)} lists it; download it"
            )
    return sorted(shards)


# GGUF


def _gguf_parts(name: str) -> list[str]:
    """The names of all parts of the split GGUF file that `name` is one of, in order; of any other name itself."""
    match = _GGUF_PART.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return [name]
    return [f"{match['stem']}-{number:05}-of-{match['count']}.gguf" for number in range(1, int(match["count"]) + 1)]


def _all_there(component: str, folder: Path, parts: list[str]) -> tuple[SourcePath, ...]:
    """The sources of a GGUF file's parts, all of which must be in their folder."""
    for number, part in enumerate(parts, start=1):
        if not os.path.exists(folder / part):
            raise NotFoundError(f"{show(folder / part)}: part {number} of {len(parts)} is missing; download it")
    return tuple(SourcePath(component, part, folder / part) for part in parts)


def _only_gguf(root: Path, folders: list[_Folder]) -> list[SourcePath]:
    """The one GGUF file of a directory, or its parts; empty where there is none."""
    found = {
        folder.path / parts[0]: (folder, parts)
        for folder in folders
        for parts in (_gguf_parts(name) for name in folder.files if name.endswith(_GGUF) and name != _GGUF)
    }
    if len(found) > 1:
        listed = ", ".join(show(str(path.relative_to(root))) for path in list(found)[:10])
        more = f" and {len(found) - 10} more" if len(found) > 10 else ""
        raise InvalidReferenceError(f"{show(root)}: holds several GGUF files ({listed}{more}); give one of them")
    return [source for folder, parts in found.values() for source in _all_there(folder.component, folder.path, parts)]


# The Hugging Face cache


def _from_cache(reference: str) -> tuple[SourcePath, ...]:
    snapshot, download = find_snapshot(reference)
    return _from_directory(
        snapshot,
        f"{reference}: its snapshot {show(snapshot)} holds neither safetensors nor GGUF files; run `{download}`",
    )
