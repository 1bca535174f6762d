"""The Hugging Face cache, read offline and by huggingface_hub's own rules, without that package."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from ._files import open_regular, show
from .errors import FormatError, InvalidReferenceError, NotFoundError

_REPOSITORY: Final = re.compile(r"[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)?")
_REVISION: Final = re.compile(r"[^\s\\\x00-\x1f\x7f]+")


def _cache_folder() -> Path:
    """Where huggingface_hub keeps repositories, by its own rules."""
    environment = os.environ
    if chosen := environment.get("HF_HUB_CACHE"):
        folder = chosen
    elif home := environment.get("HF_HOME"):
        folder = os.path.join(home, "hub")
    else:
        folder = os.path.join(environment.get("XDG_CACHE_HOME") or "~/.cache", "huggingface", "hub")
    return Path(os.path.abspath(os.path.expandvars(os.path.expanduser(folder))))


def find_snapshot(reference: str) -> tuple[Path, str]:
    """The cached folder of `org/name[@revision]`, and the command that downloads it.

    Errors: InvalidReferenceError (no repository id), NotFoundError (not cached), FormatError (a damaged ref).
    """
    repository, marked, revision = reference.partition("@")
    parts = repository.split("/")
    if repository.endswith((".safetensors", ".gguf")):
        raise NotFoundError(f"{show(reference)}: no such file; check the path")
    # "--" stands for "/" in the cache's folder names, so that hubs forbid it; ".." is forbidden with it.
    if (
        not _REPOSITORY.fullmatch(repository)
        or "--" in repository
        or ".." in repository
        or any(part[0] in ".-" or part[-1] in ".-" for part in parts)
    ):
        raise InvalidReferenceError(
            f"{reference[:200]!r} is neither an existing path nor a repository id; give a path or org/name[@revision]"
        )
    if marked and (not _REVISION.fullmatch(revision) or any(part in ("", ".", "..") for part in revision.split("/"))):
        raise InvalidReferenceError(
            f"{reference[:200]!r}: revision {revision[:200]!r} is not a branch, tag or commit; give org/name@main"
        )
    cache = _cache_folder()
    download = f"hf download {repository}" + (f" --revision {revision}" if marked else "")
    folder = cache / ("models--" + "--".join(parts))
    snapshot = _snapshot(folder, revision if marked else None)
    if snapshot is None:
        raise NotFoundError(f"{reference} is no existing path and not in the cache {show(cache)}; run `{download}`")
    return snapshot, download


def _snapshot(folder: Path, revision: str | None) -> Path | None:
    """The cached snapshot of a revision (main, where None), or None."""
    snapshots = folder / "snapshots"
    commit = _read_ref(folder / "refs" / (revision or "main"))
    if commit is not None and os.path.isdir(snapshots / commit):
        return snapshots / commit
    if revision is not None:
        return snapshots / revision if "/" not in revision and os.path.isdir(snapshots / revision) else None
    if commit is not None:
        return None
    # Downloaded by commit, main never asked for: one snapshot leaves no doubt.
    try:
        found = [path for path in snapshots.iterdir() if os.path.isdir(path)]
    except OSError:
        return None
    return found[0] if len(found) == 1 else None


def _read_ref(path: Path) -> str | None:
    """The commit that a ref's file names; None where there is no such ref."""
    try:
        descriptor, _ = open_regular(path)
    except (NotFoundError, InvalidReferenceError):
        return None
    with open(descriptor, "rb") as file:
        raw = file.read(256).strip()
    if not re.fullmatch(rb"[0-9A-Za-z._-]+", raw) or raw.startswith(b"."):
        raise FormatError(f"{show(path)}: does not hold a commit; download the repository again")
    return raw.decode()
