"""Digests of planned tensors: from the daemon's index, from earlier plans, and by reading the rest."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from weightd.errors import WeightdError
from weightd_daemon.core.digest import new_hasher
from weightd_daemon.core.plan import recurring
from weightd_daemon.loads.instances import LoadedInstance
from weightd_daemon.persistence.digest_index import PersistentDigestIndex, known_digests

from .planned_files import TensorPlace, reopened

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence
    from pathlib import Path

    from weightd.types import FileIdentity

    from .planned_files import PlannedFile

    Advance = Callable[[int, int], None]

_PIECE: Final = 1 << 20
_KEEP_SECONDS: Final = 1.0
_EPOCH: Final = "plan"


class KeptDigests:
    """What plans have hashed, on disk, so that a plan that was ended goes on where it was.

    A digest index of its own, not the daemon's: that has one row for a file, which says where its blobs are.
    """

    def __init__(self, folder: Path) -> None:
        self._index = PersistentDigestIndex(folder, _EPOCH)

    @property
    def problem(self) -> str:
        """Why nothing can be kept; empty while it can."""
        return self._index.problem and f"{self._index.path}: {self._index.problem}"

    def get(self, identities: Collection[FileIdentity]) -> dict[FileIdentity, dict[tuple[int, int], bytes]]:
        """The digests of each of these files by offset and length in bytes, as far as they are known."""

        async def get() -> dict[FileIdentity, dict[tuple[int, int], bytes]]:
            found = await self._index.get(identities)
            return {
                identity: {(each.offset, each.length): each.digest for each in found.get(identity, ())}
                for identity in identities
            }

        return asyncio.run(get())

    def put(self, identity: FileIdentity, digests: Iterable[tuple[TensorPlace, bytes]]) -> None:
        """Keep all digests that are known of a file, in place of those kept before."""
        instances = [LoadedInstance(place.offset, place.length, digest, 0, 0) for place, digest in digests]
        asyncio.run(self._index.put({identity: instances}))

    def close(self) -> None:
        """Close the database."""
        asyncio.run(self._index.close())


class TensorDigests:
    """The digests of tensors in `files`; `read_bytes` were read to find them."""

    def __init__(self, files: Sequence[PlannedFile], kept: KeptDigests | None = None) -> None:
        self.read_bytes = 0
        self._digests: dict[int, dict[TensorPlace, bytes]] = defaultdict(dict)
        self._files = files
        self._kept = kept

    def look_up(self, state_dir: Path | None) -> None:
        """Add what earlier plans and the daemon whose index lies in `state_dir` know of these files."""
        numbers = {file.identity: number for number, file in enumerate(self._files)}
        rested = [file.identity for file in self._files if file.rested]
        trusted = [file.identity for file in self._files if file.trusted]
        for known in (
            self._kept.get(rested) if self._kept else {},
            known_digests(state_dir, trusted) if state_dir else {},
        ):
            for identity, digests in known.items():
                for where, digest in digests.items():
                    place = TensorPlace(numbers[identity], *where)
                    self._digests[place.file][place] = digest

    def get(self, place: TensorPlace) -> bytes | None:
        """The digest of a tensor; None if it is not known."""
        return self._digests[place.file].get(place)

    def read(self, places: Sequence[TensorPlace], threads: int, advance: Advance) -> dict[int, WeightdError]:
        """Hash the tensors that may equal another. Returns the errors of files that cannot be read, by number.

        `advance` is called with the bytes that are hashed and those to be hashed, from any thread.
        """
        lengths = recurring(place.length for place in places)
        wanted: dict[int, list[TensorPlace]] = defaultdict(list)
        for place in places:
            if place.length in lengths and self.get(place) is None:
                wanted[place.file].append(place)
        progress = _Progress(sum(place.length for some in wanted.values() for place in some), advance)
        errors: dict[int, WeightdError] = {}
        with ThreadPoolExecutor(threads) as pool:
            for number, some in sorted(wanted.items()):
                try:
                    self._read_file(number, some, pool, progress)
                except WeightdError as error:
                    errors[number] = error
        self.read_bytes += progress.done
        return errors

    def _read_file(
        self, number: int, places: Sequence[TensorPlace], pool: ThreadPoolExecutor, progress: _Progress
    ) -> None:
        file = self._files[number]
        known = dict(self._digests[number])
        kept = time.monotonic()
        with reopened(file) as source:

            def digest(place: TensorPlace) -> bytes:
                hasher = new_hasher()
                buffer = memoryview(bytearray(min(_PIECE, place.length)))
                for offset in range(0, place.length, _PIECE):
                    piece = buffer[: place.length - offset]
                    source.read_into(piece, place.offset + offset)
                    hasher.update(piece)
                    progress.add(len(piece))
                return hasher.digest()

            for place, found in zip(places, pool.map(digest, places), strict=True):
                known[place] = found
                if time.monotonic() - kept > _KEEP_SECONDS:
                    source.check_unchanged()
                    self._keep(file, known)
                    kept = time.monotonic()
        self._keep(file, known)
        self._digests[number] = known

    def _keep(self, file: PlannedFile, known: dict[TensorPlace, bytes]) -> None:
        if self._kept and file.rested:
            self._kept.put(file.identity, known.items())


class _Progress:
    """Counts bytes, from any thread."""

    def __init__(self, total: int, advance: Advance) -> None:
        self.done = 0
        self._total = total
        self._advance = advance
        self._counting = threading.Lock()

    def add(self, count: int) -> None:
        with self._counting:
            self.done += count
            self._advance(self.done, self._total)
