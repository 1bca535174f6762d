"""The loader process: does one job at a time for the daemon, and dies with it.

It is exec'ed by the daemon, so nothing of the daemon's memory is in it; a corrupt file or a read that hangs ends here.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Self

from weightd._limits import LOADER, limit_error, out_of_descriptors
from weightd._proto.v1 import handles_pb2
from weightd._transport.protocol import MAX_DESCRIPTORS, MAX_FRAME, receive_fds
from weightd.errors import InvalidReferenceError, WeightdError
from weightd.layouts import Arrangement, arrangement
from weightd_daemon.core import digest
from weightd_daemon.core.manifest import Entry
from weightd_daemon.devices.access import open_io
from weightd_daemon.formats.split import check_parts
from weightd_daemon.libc import die_with

from .channel import UNFIT, Channel, Gone, Message, error_to
from .copying import Copier
from .indexed import indexes, owned
from .schedule import (  # fmt: skip
    Lane,
    Tensor,
    Unit,
    arranged,
    homes,
    lanes,
    lanes_in_file,
    most_lanes,
    on_threads,
    parted,
    repeated,
    split,
    units,
)
from .slots import Slot
from .source import Source
from .verifying import verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from weightd_daemon.devices.segment_io import SegmentIO

_LAYOUT_BATCH = 2000
_PROGRESS_SECONDS = 0.1
_INTAKE_SECONDS = 30.0
"""How long a client may take to send a batch of files, and to have room for its confirmation: it must not keep a loader
for nothing."""
_OWN_DESCRIPTORS = 64
"""What a loader needs beside a load's files: its sockets, segments, the batch that it is receiving."""
_HELD_BYTES = 64 << 20
"""Of how many bytes files are read whole, where there are more files than descriptors."""


def main(arguments: list[str], new_hasher: digest.NewHasher = digest.new_hasher) -> int:
    """Serve jobs until the daemon hangs up. Returns the exit code."""
    control, descriptors, parent = (int(argument) for argument in arguments)
    if not die_with(parent):  # also by kill -9
        return 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the daemon's terminal is the daemon's to handle
    channel = Channel(socket.socket(fileno=control), socket.socket(fileno=descriptors))
    with contextlib.suppress(Gone, ConnectionError, BrokenPipeError):
        while True:
            if not _do(channel, new_hasher):
                signal.pause()  # the daemon kills; if we went first, it could fail to send and never read what we said
            channel.forget_segments()
            channel.tell({"op": "idle"})
    return 0


def _do(channel: Channel, new_hasher: digest.NewHasher) -> bool:
    """Do the next job; its failure is an answer, not the end of the process. False where it cannot do another."""
    try:
        _work(channel, channel.receive(), new_hasher)
    except WeightdError as error:
        channel.tell({"op": "failed", **error_to(error)})
        return not isinstance(error, UNFIT) and not channel.broken  # another thread may have failed to receive, too
    except (Gone, ConnectionError):
        raise
    except Exception as error:  # noqa: BLE001  # the boundary of the process: whatever broke is reported as this load's
        limit = limit_error(error, "loading", LOADER) if isinstance(error, OSError) else None
        if limit is not None:
            channel.tell({"op": "failed", **error_to(limit)})
            return False
        channel.tell({"op": "failed", "error": "INTERNAL", "message": f"loader: {type(error).__name__}: {error}"})
        return False
    return True


def _work(channel: Channel, job: Message, new_hasher: digest.NewHasher) -> None:
    with contextlib.ExitStack() as stack:
        intake = None
        if job["job"] == "load":  # taken before anything can fail: the next job would take it for its own
            intake = stack.enter_context(socket.socket(fileno=channel.receive_descriptor()))
        io = stack.enter_context(contextlib.closing(open_io(job["kind"], job["device"], channel.segments)))
        if intake is None:
            verify(channel, io, job, new_hasher)
        else:
            stack.enter_context(Load(channel, io, job, new_hasher)).run(intake)


class Load:
    """One load: receive descriptors, read the headers, copy, recheck."""

    def __init__(self, channel: Channel, io: SegmentIO, job: Message, new_hasher: digest.NewHasher) -> None:
        self._channel = channel
        self._io = io
        self._job = job
        self._new_hasher = new_hasher
        self._stack = contextlib.ExitStack()
        self._sources: list[Source] = []
        self._in_headers: dict[int, int] = {}
        self._read = 0
        self._told = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, intake: socket.socket) -> None:
        """Do it; closes `intake` as soon as it can. Errors: FormatError, InvalidReferenceError, CapacityError,
        ResourceLimitError.
        """
        names: list[str] = self._job["sources"]
        files = self._receive_files(intake, names)
        self._channel.tell({"op": "files"})
        self._sources = [
            file if isinstance(file, Source) else Source(name, file) for name, file in zip(names, files, strict=True)
        ]
        tensors = self._lay_out()
        wanted, usual = self._arrangement(tensors, split(*self._job["groups"])), self._arrangement(tensors)
        fused = wanted.groups
        home = homes(self._job["components"], [source.identity.size for source in self._sources])
        in_file = lanes_in_file(tensors, fused, usual.groups, self._job["lanes"], home)
        answer = self._channel.call(
            "laid_out",
            lanes=most_lanes(arranged(tensors, fused), in_file, home),
            groups=wanted.asked,
            ignored_groups=wanted.ignored,
        )
        known = frozenset[int](answer["known"])
        new = [tensor for tensor in tensors if tensor.number not in known]
        work = lanes(units(arranged(new, fused)), in_file, home)
        chosen = frozenset[int](answer["sample"])
        sampled = [tensor for tensor in tensors if tensor.number in chosen]
        shared = self._is_shared(lanes(units(sampled), in_file, home))
        again: frozenset[int] = frozenset()
        if answer["hash_first"] or shared:
            copier, again = self._hash_first(work)
        else:
            copier = self._copier(work)
        total = sum(unit.length for lane in work for unit in lane)
        progress = self._counting("copying", total)
        for part in parted(work, again) if again else (work,):
            on_threads(part, self._job["threads"], progress(copier.copy), copier.reserve)
        self._read = total  # once, however often it took: this is what was not known to be resident
        for source in self._sources:
            source.check_unchanged()
        self._finish(copier)

    def _receive_files(self, intake: socket.socket, names: list[str]) -> list[int | Source]:
        """Take the files from the client's end of the intake, in confirmed batches.

        Where this process may not have them all open, short ones are read at once and closed.
        """
        files: list[int | Source] = []
        self._stack.callback(_close_all, files)
        count, held = len(names), 0
        scarce = count + _OWN_DESCRIPTORS > resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        try:
            with intake:
                intake.settimeout(_INTAKE_SECONDS)
                while len(files) < count:
                    held += self._receive_batch(intake, names, files, _HELD_BYTES - held if scarce else None)
        except TimeoutError:
            raise InvalidReferenceError(
                f"the client sent {len(files)} of {count} files, and then did nothing for {_INTAKE_SECONDS:.0f} s"
            ) from None
        return files

    def _receive_batch(
        self, intake: socket.socket, names: list[str], files: list[int | Source], hold: int | None
    ) -> int:
        """Add a batch to the files, those of at most `hold` bytes together read and closed. Returns the bytes held."""
        count = len(names)
        try:
            data, received, flags = receive_fds(intake, MAX_FRAME, MAX_DESCRIPTORS)
        except ConnectionError:
            data, received, flags = b"", [], 0
        files += received
        if not data:
            raise InvalidReferenceError(f"the client sent {len(files)} of {count} files and left")
        batch = handles_pb2.IntakeBatch()
        try:
            batch.ParseFromString(data)
        except Exception as error:
            raise InvalidReferenceError("the intake got a frame that is no IntakeBatch") from error
        expected = len(files) - len(received)
        if flags & socket.MSG_CTRUNC and (limit := out_of_descriptors(f"receiving {count} files", LOADER)):
            raise limit
        if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC) or batch.descriptors != len(received):
            raise InvalidReferenceError("descriptors were lost on the way; the frame says how many it carries")
        if batch.first != expected or len(files) > count or not received:
            raise InvalidReferenceError(
                f"the intake got {len(received)} files from {batch.first} on; {expected} of {count} had come"
            )
        held = 0
        for at, descriptor in enumerate(received, start=expected):
            source = None if hold is None else Source(names[at], descriptor, hold=hold - held)
            if source is not None and source.held:
                files[at] = source
                os.close(descriptor)
                held += source.identity.size
        # A client that has left is seen by the next receive; with its last file here it is not needed.
        with contextlib.suppress(ConnectionError):
            intake.send(handles_pb2.IntakeAck(received=len(files)).SerializeToString())
        return held

    def _lay_out(self) -> list[Tensor]:
        """Read all headers and report them; returns the tensors that have bytes, sorted by file and offset."""
        tensors: list[Tensor] = []
        index = first = 0
        files = list(zip(self._job["components"], self._job["files"], self._sources, strict=True))
        weights = [(component, file, source) for component, (file, is_index), source in files if not is_index]
        read_index = indexes({component: source for component, (_, is_index), source in files if is_index})
        layouts = [source.layout() for _, _, source in weights]
        counted = owned(
            [(c, file, found.tensors) for (c, file, _), found in zip(weights, layouts, strict=True)], read_index
        )
        for number, specs in enumerate(counted):
            self._tell_file(self._sources[number], layouts[number].metadata)
            rows = [(t.name, t.dtype, t.shape, t.offset, t.length) for t in specs]
            for start in range(0, len(rows), _LAYOUT_BATCH):
                self._channel.tell({"op": "tensors", "file": number, "rows": rows[start : start + _LAYOUT_BATCH]})
            in_header = {spec.name: first + at for at, spec in enumerate(layouts[number].tensors)}
            first += len(in_header)
            for spec in specs:
                if spec.length:
                    tensors.append(Tensor(index, number, spec))
                    self._in_headers[index] = in_header[spec.name]
                index += 1
        for source in self._sources[len(counted) :]:
            self._tell_file(source, None)
        check_parts([(source.name, layout) for (_, _, source), layout in zip(weights, layouts, strict=True)])
        return tensors

    def _tell_file(self, source: Source, metadata: dict[str, str] | None) -> None:
        self._channel.tell({"op": "file", "identity": source.identity, "trusted": source.trusted, "metadata": metadata})

    def _arrangement(self, tensors: list[Tensor], asked: Iterable[Sequence[int]] = ()) -> Arrangement:
        """The tensors, by their numbers, that are to lie one behind the other: as the client asks, else by names.

        The client counts what the headers have; of tensors that two files have, only one is among these.
        """
        components: list[str] = self._job["components"]
        named = [Entry(components[file], s.name, s.dtype, s.shape, file, s.length) for _, file, s, _ in tensors]
        numbers = {self._in_headers[tensor.number]: tensor.number for tensor in tensors}
        found = arrangement(named, list(numbers), asked)
        return found._replace(groups=tuple(tuple(numbers[one] for one in group) for group in found.groups))

    def _is_shared(self, sample: list[Lane]) -> bool:
        """Whether some tensors of a sample may be resident; then everything is to be hashed first."""
        if not sample:
            return False
        digests = self._hash(sample)
        return bool(self._channel.call("sampled", digests=_in_hexadecimal(digests))["hash_first"])

    def _hash_first(self, work: list[Lane]) -> tuple[Copier, frozenset[int]]:
        """Hash everything, then ask which digests have a candidate; only the others need memory.

        Nor do those that come again in this load: they are returned, to be compared when the first of them has its
        blob. So none takes the place of an earlier one in a row.
        """
        digests = self._hash(work)
        answer = self._channel.call("hashed", digests=_in_hexadecimal(digests), lanes=len(work))
        matched = frozenset[int](answer["matched"])
        again = repeated(work, digests) - matched
        return self._copier(work, digests, matched | again), again

    def _hash(self, work: list[Lane]) -> dict[int, bytes]:
        """The digest of each tensor, by its number."""
        digests: dict[int, bytes] = {}
        hasher = self._copier([])

        def step(unit: Unit) -> None:
            digests.update(hasher.hash(unit))

        total = sum(unit.length for lane in work for unit in lane)
        on_threads(work, self._job["threads"], self._counting("hashing", total)(step))
        return digests

    def _copier(
        self, work: list[Lane], digests: dict[int, bytes] | None = None, matched: frozenset[int] = frozenset()
    ) -> Copier:
        copier = Copier(
            self._channel, self._io, self._sources, self._new_hasher, digests=digests, matched=matched, lanes=work
        )
        self._stack.callback(copier.close)
        return copier

    def _counting(self, phase: str, total: int) -> Callable[[Callable[[Unit], object]], Callable[[Unit], None]]:
        """Makes of what is done with a unit the same with a report: the bytes of this phase that are done with."""
        done = 0
        counting = threading.Lock()

        def reporting(do: Callable[[Unit], object]) -> Callable[[Unit], None]:
            def step(unit: Unit) -> None:
                nonlocal done
                do(unit)
                with counting:
                    done += unit.length
                    self._progress(phase, done, total)

            return step

        self._progress(phase, 0, total)
        return reporting

    def _progress(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._told >= _PROGRESS_SECONDS:
            self._told = now
            self._channel.tell({"op": "progress", "phase": phase, "done": done, "total": total})

    def _finish(self, copier: Copier) -> None:
        """Compare with what other loads sealed meanwhile, until there is nothing left to compare."""
        outcomes: list[tuple[int, int, bool]] = []
        while pairs := self._channel.call("finish", read=self._read, outcomes=outcomes)["pairs"]:
            outcomes = [
                (blob, other, copier.recheck(length, Slot(segment, offset, length), Slot(there, at, length)))
                for blob, segment, offset, other, there, at, length in pairs
            ]


def _in_hexadecimal(digests: dict[int, bytes]) -> list[tuple[int, str]]:
    return [(index, digest.hex()) for index, digest in sorted(digests.items())]


def _close_all(files: list[int | Source]) -> None:
    for file in files:
        if isinstance(file, int):
            os.close(file)
