"""Entries of the digest index: which blob held each tensor of a file when the file was read."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from weightd.types import FileIdentity


class LoadedInstance(NamedTuple):
    """A tensor's place in a file that was loaded, and the very blob that held its bytes when the file was read."""

    offset: int
    length: int
    digest: bytes
    variant: int
    blob: int


class LoadedInstanceIndex(Protocol):
    """Interface by which loads look up tensors of files loaded before.

    persistence/digest_index.py implements it.
    """

    async def get(self, files: Iterable[FileIdentity]) -> dict[FileIdentity, list[LoadedInstance]]:
        """What is known of files; those of which nothing is are left out."""

    async def put(self, files: Mapping[FileIdentity, Sequence[LoadedInstance]]) -> None:
        """Remember files."""
