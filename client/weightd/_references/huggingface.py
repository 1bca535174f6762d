"""Read the Hugging Face cache offline, by huggingface_hub's own rules but without that package.

A contract test (tests/contract/test_huggingface.py) compares with what the package answers. Where a process has it in
memory, its word on where the cache is counts: it reads the environment once, when it is imported.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Final

from weightd._formats import SUFFIXES
from weightd.errors import FormatError, InvalidReferenceError, NotFoundError

from .files import open_regular, show

_REPOSITORY: Final = re.compile(r"(?:[A-Za-z0-9._-]{1,96}/)?[A-Za-z0-9._-]{1,96}")
_REVISION: Final = re.compile(r"[^\s\\\x00-\x1f\x7f]+")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_FOLDER: Final = "models--"


def cache_folder() -> Path:
    """Where huggingface_hub keeps repositories."""
    known = sys.modules.get("huggingface_hub.constants")
    folder = getattr(known, "HF_HUB_CACHE", None)
    return Path(folder if isinstance(folder, str) else _cache_of_environment())


def _cache_of_environment() -> str:
    """By the package's own rules: a variable that is set counts, also if it is empty."""
    environment = os.environ
    default = os.path.join(os.path.expanduser("~"), ".cache")
    home = environment.get("HF_HOME", os.path.join(environment.get("XDG_CACHE_HOME", default), "huggingface"))
    home = os.path.expandvars(os.path.expanduser(home))
    older = environment.get("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub"))
    return os.path.expandvars(os.path.expanduser(environment.get("HF_HUB_CACHE", older)))


def find_snapshot(reference: str) -> tuple[Path, str]:
    """The cached folder of `org/name[@revision]`, and the command that downloads it.

    Errors: InvalidReferenceError (no repository id), NotFoundError (not cached), FormatError (a damaged ref).
    """
    repository, marked, revision = reference.partition("@")
    parts = repository.split("/")
    is_file_name = repository.endswith(SUFFIXES)  # as a repository's may, too
    # "--" stands for "/" in the cache's folder names, so that hubs forbid it; ".." is forbidden with it.
    if (
        not _REPOSITORY.fullmatch(repository)
        or "--" in repository
        or ".." in repository
        or repository.endswith(".git")
        or any(part[0] in ".-" or part[-1] in ".-" for part in parts)
    ):
        if is_file_name:
            raise NotFoundError(f"{show(reference)}: no such file; check the path")
        raise InvalidReferenceError(
            f"{reference[:200]!r} is neither an existing path nor a repository id; give a path or org/name[@revision]"
        )
    if marked and (not _REVISION.fullmatch(revision) or any(part in ("", ".", "..") for part in revision.split("/"))):
        raise InvalidReferenceError(
            f"{reference[:200]!r}: revision {revision[:200]!r} is not a branch, tag or commit; give org/name@main"
        )
    cache = cache_folder()
    download = f"hf download {repository}" + (f" --revision {revision}" if marked else "")
    commit = _commit(cache / (_FOLDER + "--".join(parts)), revision if marked else "main")
    snapshot = cache / (_FOLDER + "--".join(parts)) / "snapshots" / commit if commit else None
    if snapshot is None or not snapshot.is_dir():
        if is_file_name:
            raise NotFoundError(
                f"{show(reference)}: no such file, and no repository in the cache {show(cache)}; check the path, or "
                f"run `{download}`"
            )
        raise NotFoundError(f"{reference} is no existing path and not in the cache {show(cache)}; run `{download}`")
    return snapshot, download


def repository_of(folder: Path) -> str | None:
    """The repository that a folder of the cache keeps, by its name; None for any other folder."""
    parts = folder.name.removeprefix(_FOLDER).split("--")
    is_one = folder.name.startswith(_FOLDER) and len(parts) <= 2 and os.path.isdir(folder / "snapshots")
    return "/".join(parts) if is_one else None


def snapshots_of(folder: Path, repository: str | None) -> list[str]:
    """References of the snapshots in a repository's folder: by its name, where it is in the cache, else by path."""
    try:
        commits = sorted(os.listdir(folder / "snapshots"))
    except OSError:
        return []
    if repository is None:
        return [str(folder / "snapshots" / commit) for commit in commits]
    try:
        main = _commit(folder, "main")
    except FormatError:
        main = None
    return [repository if commit == main else f"{repository}@{commit}" for commit in commits]


def _commit(folder: Path, revision: str) -> str | None:
    """The commit that a revision stands for in a repository's folder; None where that is not known."""
    return revision if _COMMIT.fullmatch(revision) else _read_ref(folder / "refs" / revision)


def _read_ref(path: Path) -> str | None:
    """The commit that a ref's file names; None where there is no such ref."""
    try:
        descriptor, _ = open_regular(path)
    except (NotFoundError, InvalidReferenceError):
        return None
    with open(descriptor, "rb") as file:
        raw = file.read(256)
    # huggingface_hub makes a path of whatever stands there, which could lead anywhere.
    if not re.fullmatch(rb"[0-9A-Za-z._-]+", raw) or raw.startswith(b"."):
        raise FormatError(f"{show(path)}: does not hold a commit; download the repository again")
    return raw.decode()
