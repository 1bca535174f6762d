"""What a hub's cache says of a file: the revision that it belongs to, and the digest that its content must have.

huggingface_hub keeps a revision as a folder of symlinks to blobs. A blob is named by the SHA-256 of its content if it
is stored with LFS, otherwise by git's SHA-1 of it.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from weightd._references.files import show
from weightd._references.huggingface import repository_of
from weightd.errors import FormatError
from weightd_fleet.core.manifest_rows import HubOrigin

if TYPE_CHECKING:
    from hashlib import _Hash

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_GIT: Final = re.compile(r"[0-9a-f]{40}")


def origin_of(folder: Path) -> HubOrigin | None:
    """The revision that a folder is in a hub's cache; None for any other folder."""
    snapshots = folder.parent
    if snapshots.name != "snapshots" or not _COMMIT.fullmatch(folder.name):
        return None
    repository = repository_of(snapshots.parent)
    return HubOrigin(repository, folder.name) if repository else None


def blob_of(path: Path, folder: Path) -> str:
    """The name of the blob that a file of a revision's folder is a link to; "" if it is a file of its own."""
    try:
        target = path.parent / os.readlink(path)
    except OSError:
        return ""
    known = _SHA256.fullmatch(target.name) or _GIT.fullmatch(target.name)
    blobs = folder.parent.parent / "blobs"
    return target.name if known and os.path.realpath(target.parent) == os.path.realpath(blobs) else ""


class HubCheck:
    """Checks a file's bytes, which come in order, against the name of its blob. `size` is the file's length."""

    def __init__(self, blob: str, size: int) -> None:
        self._blob = blob
        self._hash: _Hash | None = None
        if _SHA256.fullmatch(blob):
            self._hash = hashlib.sha256()
        elif blob:
            self._hash = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)  # as git names files

    @property
    def wanted(self) -> bool:
        """Whether the hub says what the bytes must be."""
        return self._hash is not None

    def update(self, data: bytes | memoryview) -> None:
        """Add the next bytes."""
        if self._hash is not None:
            self._hash.update(data)

    def finish(self, path: Path) -> None:
        """Errors: FormatError (the bytes are others than the hub's)."""
        if self._hash is not None and self._hash.hexdigest() != self._blob:
            raise FormatError(
                f"{show(path)}: its content is not the hub's, which has the digest {self._blob}; download it again"
            )
