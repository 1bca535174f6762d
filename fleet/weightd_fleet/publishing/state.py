"""The state folder of a fleet's node: what was published here, so that an agent can serve it.

    manifests/HEX       the encoded manifest of `b3:HEX`
    blobs/HEX           bytes that are no tensor, by their BLAKE3: frames of files, and small files
    sources/HEX.json    where the tensors of `b3:HEX` lie: {"reference", "files": [{"component", "file", "path",
                        "identity": [device, inode, size, mtime_ns, ctime_ns]}]}

The manifest is written last: where it is, the rest is. Files are replaced whole, never changed, and belong to the user
who publishes. An agent takes tensors from a source only while the file's identity is the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from weightd._references.files import open_regular, show
from weightd.errors import FormatError, InvalidReferenceError, NotFoundError, WeightdError
from weightd_fleet.core.digests import blob_digest, is_fleet_name
from weightd_fleet.core.encoding import MAX_MANIFEST_BYTES
from weightd_fleet.core.manifest import FleetManifest

if TYPE_CHECKING:
    from collections.abc import Iterable

_MAX_BLOB_BYTES: Final = 256 << 20
_MAX_SOURCES_BYTES: Final = 16 << 20


def state_folder(said: str | None = None) -> Path:
    """The folder that was said, or of WEIGHTD_FLEET_STATE_DIR, or the user's own; for root /var/lib/weightd-fleet."""
    if folder := said or os.environ.get("WEIGHTD_FLEET_STATE_DIR"):
        return Path(folder)
    if home := os.environ.get("XDG_STATE_HOME"):
        return Path(home) / "weightd-fleet"
    return Path("/var/lib/weightd-fleet" if os.geteuid() == 0 else Path.home() / ".local/state/weightd-fleet")


class PublishedState:
    """The state folder at a path, which is made when something is written there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def folder(self) -> Path:
        """Where the state is."""
        return self._folder

    def names(self) -> list[str]:
        """The names of all that was published here, sorted."""
        with contextlib.suppress(FileNotFoundError):
            listed = sorted(f"b3:{name}" for name in os.listdir(self._folder / "manifests"))
            return [name for name in listed if is_fleet_name(name)]
        return []

    def put(self, manifest: FleetManifest, blobs: Iterable[bytes], sources: dict[str, Any]) -> Path:
        """Keep a manifest, the bytes of its blobs that are no tensors, and where its tensors lie.

        Returns the manifest's path. Errors: InvalidReferenceError (the manifest is too long), WeightdError (the folder
        cannot be written).
        """
        if len(manifest.encoded) > MAX_MANIFEST_BYTES:
            raise InvalidReferenceError(
                f"the manifest has {len(manifest.encoded)} bytes, over the limit of {MAX_MANIFEST_BYTES}; "
                "publish the checkpoint's components apart"
            )
        digits = _digits(manifest.name)
        for blob in blobs:
            self._write("blobs", blob_digest(blob).hex(), blob)
        self._write("sources", f"{digits}.json", json.dumps(sources).encode(), anew=True)
        return self._write("manifests", digits, manifest.encoded)

    def manifest(self, name: str) -> FleetManifest:
        """The manifest of a checkpoint that was published here. Errors: NotFoundError, FormatError (it was changed)."""
        path = self._folder / "manifests" / _digits(name)
        manifest = FleetManifest.decode(self._read(path, MAX_MANIFEST_BYTES, name))
        if manifest.name != name:
            raise FormatError(f"{show(path)}: is the manifest of {manifest.name}; remove it and publish again")
        return manifest

    def blob(self, digest: bytes) -> bytes:
        """The bytes of a frame or a small file. Errors: NotFoundError, FormatError (they were changed)."""
        path = self._folder / "blobs" / digest.hex()
        content = self._read(path, _MAX_BLOB_BYTES, f"blob {digest.hex()}")
        if blob_digest(content) != digest:
            raise FormatError(f"{show(path)}: is not what its name says; remove it and publish again")
        return content

    def stamps(self) -> frozenset[tuple[object, ...]]:
        """What tells whether a manifest, or where tensors lie, has come, gone or changed: then it is another set."""
        found: set[tuple[object, ...]] = set()
        for part in ("manifests", "sources"):
            with contextlib.suppress(FileNotFoundError), os.scandir(self._folder / part) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                        status = entry.stat()
                        times = status.st_mtime_ns, status.st_ctime_ns
                        found.add((part, entry.name, status.st_ino, status.st_size, *times))
        return frozenset(found)

    def sources(self, name: str) -> dict[str, Any]:
        """Where the tensors of a checkpoint lie. Errors: NotFoundError, FormatError (not as `put` wrote it)."""
        path = self._folder / "sources" / f"{_digits(name)}.json"
        try:
            found = json.loads(self._read(path, _MAX_SOURCES_BYTES, name))
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{show(path)}: is not JSON; publish the checkpoint again") from error
        if not isinstance(found, dict) or not isinstance(found.get("files"), list):
            raise FormatError(f"{show(path)}: lists no files; publish the checkpoint again")
        return found

    def _read(self, path: Path, most: int, what: str) -> bytes:
        try:
            descriptor, status = open_regular(path)
        except NotFoundError:
            raise NotFoundError(f"{what}: not published on this node ({show(self._folder)}); publish it") from None
        with open(descriptor, "rb") as file:
            content = file.read(min(status.st_size, most) + 1)  # it allocates what is asked for
        if len(content) > most:
            raise FormatError(f"{show(path)}: has more than {most} bytes; remove it and publish again")
        return content

    def _write(self, part: str, name: str, content: bytes, *, anew: bool = False) -> Path:
        """Write a file whole. One that is there already is kept, unless `anew`: its name says what it holds."""
        folder = self._folder / part
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not anew and (folder / name).is_file():
                return folder / name
            descriptor, temporary = tempfile.mkstemp(prefix=".", dir=folder)
            try:
                with open(descriptor, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(descriptor)
                os.rename(temporary, folder / name)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            raise WeightdError(f"{show(folder)}: cannot be written: {error.strerror}; give --state-dir") from error
        return folder / name


def _digits(name: str) -> str:
    if not is_fleet_name(name):
        raise InvalidReferenceError(f"{name[:80]!r} is not a checkpoint's name in a fleet, b3: and 64 hex digits")
    return name.removeprefix("b3:")
