"""Files of the user's cache folder that keep groups of tensors from one load to the next.

Each file has the groups of one structure of checkpoint, as numbers of tensors, so it contains no name. The folder is a
cache that anything may damage: only a file and a folder of this user that nobody else may write to are read, up to a
bound, and a file that is no such list counts as absent. A file is replaced by rename and never written to in place, and
several processes may add to it at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Groups = list[tuple[int, ...]]

MAX_FILE_BYTES = 1 << 20
"""The most that a file may have: about 200,000 tensors, as many as a load request may name."""

MAX_FILES = 256
"""Beyond that the files that were used longest ago are removed."""

_FORMAT = 1
_OURS = re.compile(r"[0-9a-f]{64}\.json|\.[0-9a-f]{64}\.[0-9a-f]{16}")
_LOCK_SECONDS = 1.0
_LOCK_PAUSE_SECONDS = 0.01


class UnusableFileError(Exception):
    """A file or its folder that is not used; the message names it and says why."""


def folder() -> Path:
    """Where the files are: `$XDG_CACHE_HOME/weightd/groups`, by default below `~/.cache`.

    Errors: UnusableFileError (this user has no home folder).
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # the XDG specification has relative paths ignored
        cache = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(cache):
        raise UnusableFileError("there is no home folder, and XDG_CACHE_HOME is not set")
    return Path(cache, "weightd", "groups")


def exist() -> bool:
    """Whether there may be anything to read: a look at the folder, without opening a file."""
    try:
        with os.scandir(folder()) as entries:
            return any(_OURS.fullmatch(entry.name) for entry in entries)
    except (OSError, UnusableFileError):
        return False


def read(key: str, tensors: int) -> Groups:
    """The groups of a structure of so many tensors, newest first; empty where there is no file.

    Errors: UnusableFileError, OSError.
    """
    try:
        with _opened(folder()) as at:
            return _read(at, key, tensors)
    except FileNotFoundError:
        return []


def add(key: str, tensors: int, groups: Sequence[Sequence[int]]) -> Groups:
    """Put groups before those that the file has, less what has a tensor in common with them. Returns what it had.

    A damaged file is replaced, and then had nothing. Errors: UnusableFileError, OSError (a full disk).
    """
    path = folder()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _opened(path) as at, _locked(at):
        try:
            known = _read(at, key, tensors)
        except FileNotFoundError:
            known = []
        except UnusableFileError:
            known = []
        merged = _merged(groups, known)
        if merged != known:
            _replace(at, key, merged)
            _prune(at, f"{key}.json")
    return known


def _merged(groups: Sequence[Sequence[int]], known: Groups) -> Groups:
    """Both, each tensor in one group; what was said first goes first, as far as a file can hold it."""
    merged: Groups = []
    taken: set[int] = set()
    length = len(_encoded([]))
    for group in (*map(tuple, groups), *known):
        length += 2 + sum(len(str(number)) + 1 for number in group)  # as `_encoded` writes it, with a comma
        if length > MAX_FILE_BYTES:
            break
        if taken.isdisjoint(group):
            taken.update(group)
            merged.append(group)
    if set(merged) == set(known):
        return known
    return merged


def _encoded(groups: Groups) -> bytes:
    return json.dumps({"format": _FORMAT, "groups": groups}, separators=(",", ":")).encode()


# -- files -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of the folder: whoever replaces the path meanwhile changes nothing. Errors: as `read`."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    at = os.open(path, flags)
    try:
        _require_ours(os.fstat(at), str(path))
        yield at
    finally:
        os.close(at)


def _require_ours(status: os.stat_result, name: str) -> None:
    """Errors: UnusableFileError (another user's, or others may write to it)."""
    if status.st_uid != os.geteuid():
        raise UnusableFileError(f"{name} belongs to uid {status.st_uid}, not to this process's user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnusableFileError(f"{name} may be written to by others (mode {stat.S_IMODE(status.st_mode):04o})")


def _read(at: int, key: str, tensors: int) -> Groups:
    """Errors: FileNotFoundError, UnusableFileError, OSError."""
    name = f"{key}.json"
    try:  # without O_NONBLOCK a FIFO would stop us here
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise UnusableFileError(f"{name} is no file") from None
        raise
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise UnusableFileError(f"{name} is no file")
        _require_ours(status, name)
        with open(file, "rb", closefd=False) as opened:
            encoded = opened.read(MAX_FILE_BYTES + 1)
        groups = _decoded(encoded, tensors, name)
        with contextlib.suppress(OSError):  # of a cache that is read-only
            os.utime(file)  # used now: others are removed before it
    finally:
        os.close(file)
    return groups


def _decoded(encoded: bytes, tensors: int, name: str) -> Groups:
    """Errors: UnusableFileError."""
    if len(encoded) > MAX_FILE_BYTES:
        raise UnusableFileError(f"{name} has more than {MAX_FILE_BYTES} bytes")
    try:
        found = json.loads(encoded)
    except (ValueError, RecursionError):
        raise UnusableFileError(f"{name} is damaged") from None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise UnusableFileError(f"{name} is of another format")
    groups = found.get("groups")
    if not isinstance(groups, list) or not all(
        isinstance(group, list) and all(type(number) is int and 0 <= number < tensors for number in group)
        for group in groups
    ):
        raise UnusableFileError(f"{name} is damaged")
    return [tuple(group) for group in groups]


def _replace(at: int, key: str, groups: Groups) -> None:
    draft = f".{key}.{os.urandom(8).hex()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(draft, flags, 0o600, dir_fd=at), "wb") as opened:
        try:
            opened.write(_encoded(groups))
            opened.flush()
            os.replace(draft, f"{key}.json", src_dir_fd=at, dst_dir_fd=at)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(draft, dir_fd=at)
            raise


def _prune(at: int, keep: str) -> None:
    """Remove files beyond MAX_FILES; drafts of processes that were killed count, too."""
    found = []
    for name in os.listdir(at):
        if name != keep and _OURS.fullmatch(name):
            with contextlib.suppress(OSError):
                found.append((os.stat(name, dir_fd=at, follow_symlinks=False).st_mtime_ns, name))
    found.sort(reverse=True)
    for _, name in found[MAX_FILES - 1 :]:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=at)


@contextlib.contextmanager
def _locked(at: int) -> Iterator[None]:
    """Keep other processes from adding meanwhile; not for ever, and not where the file system has no locks.

    Without the lock a file is whole, too; of two processes that add at once, one's groups may be forgotten until its
    next load.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(at, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                break
            time.sleep(_LOCK_PAUSE_SECONDS)
            continue
        except OSError:
            break
        break
    yield  # the lock ends with the descriptor of the folder
