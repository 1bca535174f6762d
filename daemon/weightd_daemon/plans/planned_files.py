"""Checkpoints that are planned, and the files that they lie in. A file is open only while it is read."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from weightd._references.files import open_regular, show
from weightd.errors import FormatError, WeightdError
from weightd.resolve import open_sources
from weightd_daemon.core.plan import PlannedTensor
from weightd_daemon.loader.indexed import indexes, owned
from weightd_daemon.loader.source import LoaderSource, rested

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from weightd.resolve import Resolved
    from weightd.types import FileIdentity


class PlannedFile(NamedTuple):
    """A file whose header was read. `rested`: a later change of it will show in its identity.

    `trusted` is stricter: on this kind of filesystem the daemon goes by the identity, too.
    """

    path: Path
    identity: FileIdentity
    rested: bool
    trusted: bool


class TensorPlace(NamedTuple):
    """Where a tensor lies: the number of its file, and bytes in there. Its identity, until its digest is known."""

    file: int
    offset: int
    length: int


class PlannedCheckpoints:
    """The tensors of each checkpoint, by its name, and the files that they lie in."""

    def __init__(self) -> None:
        self.tensors: dict[str, list[PlannedTensor]] = {}
        self.files: list[PlannedFile] = []
        self._numbers: dict[FileIdentity, int] = {}

    def add(self, name: str, tensors: Iterable[tuple[str, PlannedTensor]]) -> None:
        """Enter a checkpoint: its tensors, each with what messages call its file.

        Errors: FormatError (two tensors of one name; a load would refuse them too). Then nothing is entered.
        """
        found: dict[tuple[str, str], PlannedTensor] = {}
        for file, tensor in tensors:
            if found.setdefault(tensor[:2], tensor) is not tensor:
                where = f" of component {tensor.component!r}" if tensor.component else ""
                raise FormatError(f"{file}: tensor {tensor.name[:200]!r} is in another file{where} too")
        self.tensors[name] = list(found.values())

    def read(self, resolved: Resolved) -> None:
        """Enter a checkpoint by the headers of its files. A file that several checkpoints have is entered once.

        Errors: those of opening and reading them; FormatError where a load would refuse them too.
        """
        with open_sources(resolved) as opened:
            files = [
                (source, where, LoaderSource(show(source.path), descriptor))
                for source, where, descriptor in zip(resolved.sources, opened.sources, opened.fds, strict=True)
            ]
            weights = [file for file in files if not file[1].is_index]
            read_index = indexes({where.component: source for _, where, source in files if where.is_index})
            specs = [(where.component, where.file, source.layout().tensors) for _, where, source in weights]
            with opened.errors_by_path():
                counted = owned(specs, read_index)
            found = []
            for (reference, where, source), tensors in zip(weights, counted, strict=True):
                number = self._number(reference.path, source)
                for name, dtype, shape, offset, length in tensors:
                    place = TensorPlace(number, offset, length)
                    tensor = PlannedTensor(where.component, name, length, place, dtype, shape)
                    found.append((source.name, tensor))
        self.add(resolved.name, found)

    def _number(self, path: Path, source: LoaderSource) -> int:
        number = self._numbers.setdefault(source.identity, len(self.files))
        if number == len(self.files):
            stays = rested(source.identity, time.time_ns())
            self.files.append(PlannedFile(path, source.identity, stays, source.trusted))
        return number

    def remove_files(self, unreadable: Mapping[int, WeightdError]) -> dict[str, WeightdError]:
        """Remove the checkpoints that need any of these files, by number. Returns why, by name of the checkpoint."""
        reasons: dict[str, WeightdError] = {}
        for name, tensors in self.tensors.items():
            for tensor in tensors:
                if isinstance(tensor.identity, TensorPlace) and tensor.identity.file in unreadable:
                    reasons[name] = unreadable[tensor.identity.file]
                    break
        for name in reasons:
            del self.tensors[name]
        return reasons

    def places(self) -> list[TensorPlace]:
        """Where the tensors lie that are in a file, each once."""
        every = (tensor.identity for tensors in self.tensors.values() for tensor in tensors)
        return list(dict.fromkeys(identity for identity in every if isinstance(identity, TensorPlace)))

    def known(self, digest_of: Callable[[TensorPlace], bytes | None]) -> dict[str, list[PlannedTensor]]:
        """All of them, with digests for places. A tensor without a digest keeps its place: it equals only itself, as
        another checkpoint has it that has the same file.
        """
        return {
            name: [
                tensor.having(digest_of(tensor.identity) or tensor.identity)
                if isinstance(tensor.identity, TensorPlace)
                else tensor
                for tensor in tensors
            ]
            for name, tensors in self.tensors.items()
        }


@contextlib.contextmanager
def reopened(file: PlannedFile) -> Iterator[LoaderSource]:
    """The file for reading, which must be the one whose header was read, and stay so.

    Errors: those of opening it, FormatError (it was changed).
    """
    descriptor, _ = open_regular(file.path)
    with open(descriptor, "rb", buffering=0):
        source = LoaderSource(show(file.path), descriptor)
        if source.identity != file.identity:
            raise FormatError(f"{source.name}: changed since its header was read; try again")
        yield source
        source.check_unchanged()
