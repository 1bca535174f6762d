"""The program behind `weightd plan` (`python -m weightd_daemon.planning`): computes from files what sharing saves.

A composition root beside app.py, without a daemon: it reads files as the loader does, and the digest index as a daemon
left it. It answers in lines of JSON on standard output: {"note"} for a choice that nobody asked for, {"done", "total"}
in bytes while it hashes, at the end {"plan"} or {"error", "message"}. It goes by digests; whether bytes are equal is
compared only when they are loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from weightd._references.files import open_regular, show
from weightd.errors import FormatError, InvalidReferenceError, WeightdError
from weightd.resolve import open_sources, resolve

from .config.settings import ConfigError, load
from .core.digest import new_hasher
from .core.plan import PlannedTensor, make_plan, recurring
from .formats import workload
from .libc import die_with
from .loader.indexed import indexes, owned
from .loader.source import LoaderSource
from .persistence.digest_index import known_digests

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

    from weightd.resolve import Resolved

    Advance = Callable[[int, int], None]

MAX_CHECKPOINTS = 1000
_PIECE = 1 << 20
_PROGRESS_SECONDS = 0.1


class _Place(NamedTuple):
    """Where a tensor lies: the number of its file, and bytes in there. Its identity, until its digest is known."""

    file: int
    offset: int
    length: int


class _Checkpoints:
    """The tensors of each checkpoint, by its name."""

    def __init__(self) -> None:
        self.tensors: dict[str, list[PlannedTensor]] = {}
        self._names: set[tuple[str, str, str]] = set()

    def add(self, checkpoint: str, file: str, tensor: PlannedTensor) -> None:
        """Enter a tensor of a file. Errors: FormatError (a load would refuse it too)."""
        key = (checkpoint, tensor.component, tensor.name)
        if key in self._names:
            where = f" of component {tensor.component!r}" if tensor.component else ""
            raise FormatError(f"{file}: tensor {tensor.name[:200]!r} is in another file{where} too")
        self._names.add(key)
        self.tensors.setdefault(checkpoint, []).append(tensor)

    def places(self) -> list[_Place]:
        """Where the tensors lie that are in a file."""
        every = (tensor.identity for tensors in self.tensors.values() for tensor in tensors)
        return [identity for identity in every if isinstance(identity, _Place)]

    def known(self, digests: Mapping[Hashable, bytes]) -> dict[str, list[PlannedTensor]]:
        """All of them, with digests for places; a tensor in a file that has no digest is equal to no other."""
        return {
            name: [
                tensor._replace(identity=digests.get(tensor.identity))
                if isinstance(tensor.identity, _Place)
                else tensor
                for tensor in tensors
            ]
            for name, tensors in self.tensors.items()
        }


def plan(
    references: Sequence[str],
    manifests: Sequence[str] = (),
    *,
    variant: str | None = None,
    state_dir: Path | None = None,
    threads: int = 1,
    advance: Advance = lambda done, total: None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The plan for these references, of a variant where one is given, and workload manifests, as JSON shows it.

    `advance` is called with the bytes that are hashed and those to be hashed, from any thread; `note` with what was
    chosen that nobody asked for, a line each. Errors: those of a reference and of a file; InvalidReferenceError for a
    checkpoint that is described twice, and for too many.
    """
    checkpoints = _Checkpoints()
    with contextlib.ExitStack() as stack:
        found_files = {found.name: found for found in (resolve(reference, variant) for reference in references)}
        for line in (line for found in found_files.values() for line in (*found.notes, found.hint) if line):
            note(line)
        sources = _open(found_files.values(), checkpoints, stack)
        for manifest in manifests:
            _describe(Path(manifest), checkpoints)
        if len(checkpoints.tensors) > MAX_CHECKPOINTS:
            raise InvalidReferenceError(
                f"{len(checkpoints.tensors)} checkpoints are more than {MAX_CHECKPOINTS}; plan fewer at a time"
            )
        digests = _known(sources, state_dir)
        read = _hash(sources, checkpoints.places(), digests, threads, advance)
        for source in sources:
            source.check_unchanged()
    found = asdict(make_plan(checkpoints.known(digests)))
    pairs, planned = found.pop("pairs"), found.pop("checkpoints")
    return {**found, "read_bytes": read, "checkpoints": planned, "pairs": pairs}


def _open(references: Iterable[Resolved], checkpoints: _Checkpoints, stack: contextlib.ExitStack) -> list[LoaderSource]:
    """Open every file of the references, and enter what their headers say."""
    sources: list[LoaderSource] = []
    for resolved in references:
        name = resolved.name
        checkpoints.tensors[name] = []  # its files may be empty
        opened = stack.enter_context(open_sources(resolved))
        files = [
            (where, LoaderSource(show(where.path), descriptor))
            for where, descriptor in zip(resolved.sources, opened.fds, strict=True)
        ]
        weights = [(where, source) for where, source in files if not where.is_index]
        read_index = indexes({where.component: source for where, source in files if where.is_index})
        tensors = [(where.component, where.file, source.layout().tensors) for where, source in weights]
        with opened.errors_by_path():
            counted = owned(tensors, read_index)
        for (where, source), specs in zip(weights, counted, strict=True):
            for spec in specs:
                place = _Place(len(sources), spec.offset, spec.length)
                checkpoints.add(name, source.name, PlannedTensor(where.component, spec.name, spec.length, place))
            sources.append(source)
    return sources


def _known(sources: Sequence[LoaderSource], state_dir: Path | None) -> dict[Hashable, bytes]:
    """The digests that the index has."""
    trusted = {number: source.identity for number, source in enumerate(sources) if source.trusted}
    known = known_digests(state_dir, trusted.values()) if state_dir else {}
    return {
        _Place(number, *where): digest
        for number, identity in trusted.items()
        for where, digest in known.get(identity, {}).items()
    }


def _hash(
    sources: Sequence[LoaderSource],
    places: Sequence[_Place],
    digests: dict[Hashable, bytes],
    threads: int,
    advance: Advance,
) -> int:
    """Add the digests of tensors that may equal another. Returns the bytes read."""
    lengths = recurring(place.length for place in places)
    wanted = [place for place in places if place.length in lengths and place not in digests]
    total = sum(place.length for place in wanted)
    done = 0
    counting = threading.Lock()
    local = threading.local()

    def digest(place: _Place) -> bytes:
        nonlocal done
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(bytearray(_PIECE))
        hasher = new_hasher()
        for offset in range(0, place.length, _PIECE):
            piece = local.buffer[: min(_PIECE, place.length - offset)]
            sources[place.file].read_into(piece, place.offset + offset)
            hasher.update(piece)
            with counting:
                done += len(piece)
                advance(done, total)
        return hasher.digest()

    with ThreadPoolExecutor(threads) as pool:
        digests.update(zip(wanted, pool.map(digest, wanted), strict=True))
    return total


def _describe(path: Path, checkpoints: _Checkpoints) -> None:
    """Enter the checkpoints of a workload manifest."""
    label = show(path)
    here: set[str] = set()
    for file, tensors in workload.read_workload(label, _read(path)).items():
        checkpoint, component = workload.placed(file)
        if checkpoint in checkpoints.tensors and checkpoint not in here:
            raise InvalidReferenceError(f"{label}: checkpoint {checkpoint!r} is planned already; rename one of them")
        here.add(checkpoint)
        checkpoints.tensors.setdefault(checkpoint, [])
        for name, dtype, shape, content, length in tensors:
            tensor = PlannedTensor(component, name, length, (content, dtype, shape))
            checkpoints.add(checkpoint, f"{label}: {file}", tensor)


def _read(path: Path) -> bytes:
    try:
        descriptor, _ = open_regular(path)
    except InvalidReferenceError as error:
        raise InvalidReferenceError(f"{show(path)}: not a regular file; give a workload manifest") from error
    with open(descriptor, "rb") as file:
        return file.read(workload.MAX_BYTES + 1)


# -- the process -------------------------------------------------------------------------------------------------------


class _Answers:
    """Lines for whoever asked; of those about progress a few in a second."""

    def __init__(self) -> None:
        self._told = 0.0

    def say(self, answer: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()

    def advance(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._told >= _PROGRESS_SECONDS:
            self._told = now
            self.say({"done": done, "total": total})


def main(arguments: list[str] | None = None) -> int:
    """Answer one question. Returns the exit code: 0 also where the answer is an error."""
    options = _parser().parse_args(arguments)
    if not die_with(options.parent):  # also by kill -9
        return 1
    answers = _Answers()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # all files are open at a time
    try:
        found = plan(
            options.references,
            options.manifest,
            variant=options.variant,
            note=lambda line: answers.say({"note": line}),
            state_dir=_state_dir(options.state_dir),
            threads=max(2, min(4, os.cpu_count() or 1)),  # two also on one core: one reads while the other hashes
            advance=answers.advance,
        )
    except WeightdError as error:
        answers.say({"error": error.reason, "message": str(error)})
    except Exception as error:  # noqa: BLE001  # the boundary of the process: whatever broke is the answer
        if options.debug:
            traceback.print_exc()
        answers.say({"error": "INTERNAL", "message": f"plan: {type(error).__name__}: {error}"})
    else:
        answers.say({"plan": found})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="weightd_daemon.planning", allow_abbrev=False)
    parser.add_argument("--parent", type=int, required=True, help="process that asks; this one dies with it")
    parser.add_argument("--manifest", action="append", default=[])
    parser.add_argument("--variant")
    parser.add_argument("--state-dir")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("references", nargs="*")
    return parser


def _state_dir(said: str | None) -> Path | None:
    """The folder of the digest index; None where the daemon's settings cannot be read: then files are read instead."""
    if said is not None:
        return Path(said)
    try:
        return Path(load(None, {}, os.environ).settings.state_dir)
    except ConfigError:
        return None


if __name__ == "__main__":
    sys.exit(main())
