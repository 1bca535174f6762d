"""What `weightd plan` runs, as `python -m weightd_daemon.planning`: what sharing would save, read from files alone.

A composition root beside app.py, without a daemon: it reads files as the loader does, and the digest index as a daemon
left it. It answers in lines of JSON on standard output: {"done", "total"} in bytes while it hashes, at the end {"plan"}
or {"error", "message"}. It goes by digests; whether bytes are equal is compared only when they are loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from weightd._files import open_regular, show
from weightd.errors import FormatError, InvalidReferenceError, WeightdError
from weightd.resolve import open_sources, resolve

from .config import ConfigError, load
from .core.digest import new_hasher
from .core.plan import PlannedTensor, make_plan, recurring
from .edges.digest_index import known_digests
from .formats import workload
from .loader.source import Source

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from weightd.types import TensorSpec

    Advance = Callable[[int, int], None]
    Digests = dict[tuple[int, int], bytes]

MAX_CHECKPOINTS = 1000
_PIECE = 1 << 20
_PROGRESS_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1


class _File(NamedTuple):
    checkpoint: str
    component: str
    source: Source


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


def plan(
    references: Sequence[str],
    manifests: Sequence[str] = (),
    *,
    state_dir: Path | None = None,
    threads: int = 1,
    advance: Advance = lambda done, total: None,
) -> dict[str, Any]:
    """The plan for these references and workload manifests, as JSON shows it.

    `advance` is called with the bytes that are hashed and those to be hashed, from any thread. Errors: those of a
    reference and of a file; InvalidReferenceError for a checkpoint that is described twice, and for too many.
    """
    checkpoints = _Checkpoints()
    with contextlib.ExitStack() as stack:
        files = _open(references, stack)
        sources = [file.source for file in files]
        known = _known(sources, state_dir)
        read = _hash(sources, known, threads, advance)
        for file, digests in zip(files, known, strict=True):
            for spec in file.source.layout().tensors:
                identity = digests.get((spec.offset, spec.length))
                tensor = PlannedTensor(file.component, spec.name, spec.length, identity)
                checkpoints.add(file.checkpoint, file.source.name, tensor)
            checkpoints.tensors.setdefault(file.checkpoint, [])  # a file may be empty
            file.source.check_unchanged()
    for manifest in manifests:
        _describe(Path(manifest), checkpoints)
    if len(checkpoints.tensors) > MAX_CHECKPOINTS:
        raise InvalidReferenceError(
            f"{len(checkpoints.tensors)} checkpoints are more than {MAX_CHECKPOINTS}; plan fewer at a time"
        )
    found = asdict(make_plan(checkpoints.tensors))
    return {**{key: found.pop(key) for key in list(found)[:4]}, "read_bytes": read, **found}


def _open(references: Sequence[str], stack: contextlib.ExitStack) -> list[_File]:
    """Every file of the references, each reference once."""
    resolved = {found.name: found for found in map(resolve, references)}
    files = []
    for name, each in resolved.items():
        opened = stack.enter_context(open_sources(each))
        for (component, _, path), descriptor in zip(each.sources, opened.fds, strict=True):
            files.append(_File(name, component, Source(show(path), descriptor)))
    return files


def _known(sources: Sequence[Source], state_dir: Path | None) -> list[Digests]:
    """What the digest index knows of each file, by offset and length of its tensors."""
    trusted = [source.identity for source in sources if source.trusted]
    known = known_digests(state_dir, trusted) if state_dir and trusted else {}
    return [dict(known.get(source.identity, {})) if source.trusted else {} for source in sources]


def _hash(sources: Sequence[Source], known: list[Digests], threads: int, advance: Advance) -> int:
    """Add the digests of tensors that may equal another. Returns the bytes read."""
    lengths = recurring(spec.length for source in sources for spec in source.layout().tensors)
    wanted = [
        (source, digests, spec)
        for source, digests in zip(sources, known, strict=True)
        for spec in source.layout().tensors
        if spec.length in lengths and (spec.offset, spec.length) not in digests
    ]
    total = sum(spec.length for _, _, spec in wanted)
    done = 0
    counting = threading.Lock()
    local = threading.local()

    def digest(item: tuple[Source, Digests, TensorSpec]) -> bytes:
        nonlocal done
        source, _, spec = item
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(bytearray(_PIECE))
        hasher = new_hasher()
        for offset in range(0, spec.length, _PIECE):
            piece = local.buffer[: min(_PIECE, spec.length - offset)]
            source.read_into(piece, spec.offset + offset)
            hasher.update(piece)
            with counting:
                done += len(piece)
                advance(done, total)
        return hasher.digest()

    with ThreadPoolExecutor(threads) as pool:
        for (_, digests, spec), found in zip(wanted, pool.map(digest, wanted), strict=True):
            digests[spec.offset, spec.length] = found
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
            identity: Hashable = (content, dtype, shape)
            checkpoints.add(checkpoint, f"{label}: {file}", PlannedTensor(component, name, length, identity))


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
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # dies with whoever asked
    options = _parser().parse_args(arguments)
    answers = _Answers()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # all files are open at a time
    try:
        found = plan(
            options.references,
            options.manifest,
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
    parser.add_argument("--manifest", action="append", default=[])
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
