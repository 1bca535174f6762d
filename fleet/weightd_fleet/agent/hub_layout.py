"""A revision in the cache of huggingface_hub: blobs by their digests, and a folder of links for the revision.

models--ORG--NAME/blobs/DIGEST
models--ORG--NAME/snapshots/COMMIT/PATH -> ../../blobs/DIGEST
models--ORG--NAME/refs/main
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from weightd._references.files import show
from weightd.errors import InvalidReferenceError

if TYPE_CHECKING:
    from weightd_fleet.core.manifest_rows import HubOrigin


class HubRevision:
    """The place of a revision in a cache. Files that the hub has no blob of lie in the revision's folder itself."""

    def __init__(self, cache: Path, origin: HubOrigin) -> None:
        self._home = cache / f"models--{origin.repository.replace('/', '--')}"
        self._commit = origin.commit
        self.folder = self._home / "snapshots" / origin.commit

    def place(self, path: str, hub_blob: str) -> Path:
        """The blob of a file, or where a file without one goes."""
        return self._home / "blobs" / hub_blob if hub_blob else self.folder / path

    def may_replace(self, hub_blob: str) -> bool:
        """A blob may be replaced: its name says what it must hold."""
        return bool(hub_blob)

    def enter(self, path: str, hub_blob: str) -> None:
        """Link a file to its blob. Errors: InvalidReferenceError (something else is in its place), OSError."""
        if not hub_blob:
            return
        link = self.folder / path
        target = os.path.relpath(self._home / "blobs" / hub_blob, link.parent)
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.symlink(target, link)
        except FileExistsError:
            if not link.is_symlink() or os.readlink(link) != target:
                raise InvalidReferenceError(
                    f"{show(link)}: is there with other content than the revision has; remove the revision"
                ) from None

    def finish(self) -> None:
        """Name the revision `main` if the cache has none of that name: so it is found without its commit."""
        refs = self._home / "refs"
        refs.mkdir(parents=True, exist_ok=True)
        try:
            with open(refs / "main", "x") as file:
                file.write(self._commit)
        except FileExistsError:
            pass
