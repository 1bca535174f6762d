"""The loader process: executes one job at a time for the daemon, and dies with the daemon.

It is exec'ed by the daemon, so nothing of the daemon's memory is in it; a corrupt file or a read that hangs ends here.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Self

from weightd import _failpoints
from weightd._limits import LOADER, limit_error
from weightd.errors import ServerError, WeightdError
from weightd.layouts import Arrangement, arrangement
from weightd_daemon.core import digest
from weightd_daemon.core.manifest import ContentTensor
from weightd_daemon.devices.access import open_io
from weightd_daemon.formats.split import check_parts
from weightd_daemon.libc import die_with

from ._proto import loader_pb2 as wire
from .channel import UNFIT, LoaderChannel, LoaderChannelClosedError, failure_of
from .copying import LoaderCopier
from .indexed import called, indexes, owned
from .intake import close_all, receive_files
from .schedule import (  # fmt: skip
    Lane,
    LoaderTensor,
    LoaderUnit,
    arranged,
    homes,
    lanes,
    lanes_in_file,
    most_lanes,
    on_threads,
    parted,
    repeated,
    rows,
    split,
    units,
)
from .slots import LoaderSlot
from .source import LoaderSource
from .verifying import verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from weightd.errors import DeviceError
    from weightd.types import TensorSpec
    from weightd_daemon.devices.segment_io import DeviceSegmentIO

_LAYOUT_BATCH = 500
_PROGRESS_SECONDS = 0.1


def main(arguments: list[str], new_hasher: digest.NewHasher = digest.new_hasher) -> int:
    """Serve jobs until the daemon hangs up. Returns the exit code."""
    control, descriptors, parent = (int(argument) for argument in arguments)
    if not die_with(parent):  # also by kill -9
        return 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the daemon's terminal is the daemon's to handle
    channel = LoaderChannel(socket.socket(fileno=control), socket.socket(fileno=descriptors))
    with contextlib.suppress(LoaderChannelClosedError, ConnectionError, BrokenPipeError):
        while True:
            if not _do(channel, new_hasher):
                signal.pause()  # the daemon kills; if we went first, it could fail to send and never read what we said
            channel.forget_segments()
            channel.send(wire.ToDaemon(idle=wire.Idle()))
    return 0


def _do(channel: LoaderChannel, new_hasher: digest.NewHasher) -> bool:
    """Do the next job; its failure is an answer, not the end of the process. False where it cannot do another."""
    try:
        _work(channel, channel.receive(), new_hasher)
    except WeightdError as error:
        channel.send(wire.ToDaemon(failed=failure_of(error)))
        return not isinstance(error, UNFIT) and not channel.broken  # another thread may have failed to receive, too
    except (LoaderChannelClosedError, ConnectionError):
        raise
    except Exception as error:  # noqa: BLE001  # the boundary of the process: whatever broke is reported as this load's
        limit = limit_error(error, "loading", LOADER) if isinstance(error, OSError) else None
        if limit is not None:
            channel.send(wire.ToDaemon(failed=failure_of(limit)))
            return False
        bug = ServerError(f"loader: {type(error).__name__}: {error}")
        channel.send(wire.ToDaemon(failed=failure_of(bug)))
        return False
    return True


def _work(channel: LoaderChannel, message: wire.ToLoader, new_hasher: digest.NewHasher) -> None:
    with contextlib.ExitStack() as stack:
        if message.HasField("load"):
            load = message.load
            # Taken before anything can fail: the next job would take it for its own.
            intake = stack.enter_context(socket.socket(fileno=channel.receive_descriptor()))
            io = stack.enter_context(contextlib.closing(_open_io(channel, load)))
            stack.enter_context(_LoadJob(channel, io, load, new_hasher)).run(intake)
        elif message.HasField("verify"):
            job = message.verify
            io = stack.enter_context(contextlib.closing(_open_io(channel, job)))
            verify(channel, io, job, new_hasher)
        else:
            raise ServerError(f"the daemon sent {message.WhichOneof('body')} where a job was due")


def _open_io(channel: LoaderChannel, job: wire.Load | wire.Verify) -> DeviceSegmentIO:
    """Access to the segments of a job. If the device has no room for what that takes, the daemon is asked for more."""

    def ask_for_room(error: DeviceError) -> None:
        channel.call(wire.ToDaemon(full=wire.Full(call=error.metadata.get("call", ""))))

    return open_io(job.kind, job.device, channel.segments, ask_for_room)


class _LoadJob:
    """One load: receive descriptors, read the headers, copy, recheck."""

    def __init__(
        self, channel: LoaderChannel, io: DeviceSegmentIO, job: wire.Load, new_hasher: digest.NewHasher
    ) -> None:
        self._channel = channel
        self._io = io
        self._job = job
        self._new_hasher = new_hasher
        self._stack = contextlib.ExitStack()
        self._sources: list[LoaderSource] = []
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
        names = [called(source.component, source.file) for source in self._job.sources]
        files: list[int | LoaderSource] = []
        self._stack.callback(close_all, files)
        receive_files(intake, names, files)
        _failpoints.reach("loader.files")
        self._channel.send(wire.ToDaemon(received=wire.Received()))
        self._sources = [
            file if isinstance(file, LoaderSource) else LoaderSource(name, file)
            for name, file in zip(names, files, strict=True)
        ]
        tensors = self._lay_out()
        wanted, usual = (
            self._arrangement(tensors, split(self._job.group_sizes, self._job.group_tensors)),
            self._arrangement(tensors),
        )
        fused = wanted.groups
        components = [source.component for source in self._job.sources]
        home = homes(components, [source.identity.size for source in self._sources])
        in_file = lanes_in_file(tensors, fused, usual.groups, self._job.lanes, home)
        laid_out = wire.LaidOut(
            lanes=most_lanes(arranged(tensors, fused), in_file, home),
            groups=wanted.asked,
            ignored_groups=wanted.ignored,
        )
        answer = self._channel.call(wire.ToDaemon(laid_out=laid_out)).laid_out
        known = frozenset(answer.known)
        new = [tensor for tensor in tensors if tensor.number not in known]
        work = lanes(units(arranged(new, fused)), in_file, home)
        chosen = frozenset(answer.sample)
        sampled = [tensor for tensor in tensors if tensor.number in chosen]
        shared = self._is_shared(lanes(units(sampled), in_file, home))
        again: frozenset[int] = frozenset()
        if answer.hash_first or shared:
            copier, again = self._hash_first(work)
        else:
            copier = self._copier(work)
        total = sum(unit.length for lane in work for unit in lane)
        progress = self._counting("copying", total)
        for part in parted(work, again) if again else (work,):
            in_rows = rows(part, self._job.threads)
            copier.expect(in_rows)
            on_threads(in_rows, progress(copier.copy), copier.reserve)
        self._read = total  # once, however often it took: this is what was not known to be resident
        for source in self._sources:
            source.check_unchanged()
        self._finish(copier)

    def _lay_out(self) -> list[LoaderTensor]:
        """Read all headers and report them; returns the tensors that have bytes, sorted by file and offset."""
        tensors: list[LoaderTensor] = []
        index = first = 0
        files = list(zip(self._job.sources, self._sources, strict=True))
        weights = [(said.component, said.file, source) for said, source in files if not said.is_index]
        read_index = indexes({said.component: source for said, source in files if said.is_index})
        layouts = [source.layout() for _, _, source in weights]
        counted = owned(
            [(c, file, found.tensors) for (c, file, _), found in zip(weights, layouts, strict=True)], read_index
        )
        # Before any is sent: a list that the daemon has no room for is not to be there at all.
        count = wire.Counted(
            tensors=sum(map(len, counted)),
            name_bytes=sum(len(spec.name.encode(errors="replace")) for specs in counted for spec in specs),
            total_bytes=sum(spec.length for specs in counted for spec in specs),
        )
        self._channel.call(wire.ToDaemon(counted=count))
        for number, specs in enumerate(counted):
            self._send_file(self._sources[number], layouts[number].metadata)
            for start in range(0, len(specs), _LAYOUT_BATCH):
                batch = _columns(number, specs[start : start + _LAYOUT_BATCH])
                self._channel.send(wire.ToDaemon(tensors=batch))
            in_header = {spec.name: first + at for at, spec in enumerate(layouts[number].tensors)}
            first += len(in_header)
            for spec in specs:
                if spec.length:
                    tensors.append(LoaderTensor(index, number, spec))
                    self._in_headers[index] = in_header[spec.name]
                index += 1
        for source in self._sources[len(counted) :]:
            self._send_file(source, None)
        check_parts([(source.name, layout) for (_, _, source), layout in zip(weights, layouts, strict=True)])
        return tensors

    def _send_file(self, source: LoaderSource, metadata: dict[str, str] | None) -> None:
        file = wire.File(
            **source.identity._asdict(),
            trusted=source.trusted,
            metadata=metadata or {},
            has_metadata=metadata is not None,
        )
        self._channel.send(wire.ToDaemon(file=file))

    def _arrangement(self, tensors: list[LoaderTensor], asked: Iterable[Sequence[int]] = ()) -> Arrangement:
        """The tensors, by their numbers, that are to lie one behind the other: as the client asks, else by names.

        The client counts what the headers have; of tensors that two files have, only one is among these.
        """
        components = [source.component for source in self._job.sources]
        named = [ContentTensor(components[file], s.name, s.dtype, s.shape, file, s.length) for _, file, s, _ in tensors]
        numbers = {self._in_headers[tensor.number]: tensor.number for tensor in tensors}
        found = arrangement(named, list(numbers), asked)
        return found._replace(groups=tuple(tuple(numbers[one] for one in group) for group in found.groups))

    def _is_shared(self, sample: list[Lane]) -> bool:
        """Whether some tensors of a sample may be resident; then everything is to be hashed first."""
        if not sample:
            return False
        digests = self._hash(sample)
        return self._channel.call(wire.ToDaemon(sampled=_digests(digests))).sampled.hash_first

    def _hash_first(self, work: list[Lane]) -> tuple[LoaderCopier, frozenset[int]]:
        """Hash everything, then ask which digests have a candidate; only the others need memory.

        Nor do those that come again in this load: they are returned, to be compared when the first of them has its
        blob. So none takes the place of an earlier one in a row.
        """
        digests = self._hash(work)
        hashed = wire.Hashed(digests=_digests(digests), lanes=len(work))
        matched = frozenset(self._channel.call(wire.ToDaemon(hashed=hashed)).hashed.matched)
        again = repeated(work, digests) - matched
        return self._copier(work, digests, matched | again), again

    def _hash(self, work: list[Lane]) -> dict[int, bytes]:
        """The digest of each tensor, by its number."""
        digests: dict[int, bytes] = {}
        hasher = self._copier([])

        def step(unit: LoaderUnit) -> None:
            digests.update(hasher.hash(unit))

        total = sum(unit.length for lane in work for unit in lane)
        in_rows = rows(work, self._job.threads)
        hasher.expect(in_rows)
        on_threads(in_rows, self._counting("hashing", total)(step))
        return digests

    def _copier(
        self, work: list[Lane], digests: dict[int, bytes] | None = None, matched: frozenset[int] = frozenset()
    ) -> LoaderCopier:
        copier = LoaderCopier(
            self._channel, self._io, self._sources, self._new_hasher, digests=digests, matched=matched, lanes=work
        )
        self._stack.callback(copier.close)
        return copier

    def _counting(
        self, phase: str, total: int
    ) -> Callable[[Callable[[LoaderUnit], object]], Callable[[LoaderUnit], None]]:
        """Makes of what is done with a unit the same with a report: the bytes of this phase that are done with."""
        done = 0
        counting = threading.Lock()

        def reporting(do: Callable[[LoaderUnit], object]) -> Callable[[LoaderUnit], None]:
            def step(unit: LoaderUnit) -> None:
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
            self._channel.send(wire.ToDaemon(progress=wire.Progress(phase=phase, done=done, total=total)))

    def _finish(self, copier: LoaderCopier) -> None:
        """Compare with what other loads sealed meanwhile, until there is nothing left to compare."""
        _failpoints.reach("loader.finish")
        done = wire.Finish(read=self._read)
        while (pairs := self._channel.call(wire.ToDaemon(finish=done)).finish).placed:
            done = wire.Finish(read=self._read, placed=pairs.placed, sealed=pairs.sealed)
            first = zip(pairs.placed_segments, pairs.placed_offsets, pairs.lengths, strict=True)
            second = zip(pairs.sealed_segments, pairs.sealed_offsets, pairs.lengths, strict=True)
            for one, other in zip(
                itertools.starmap(LoaderSlot, first), itertools.starmap(LoaderSlot, second), strict=True
            ):
                done.equal.append(copier.recheck(one.size, one, other))


def _columns(file: int, specs: Sequence[TensorSpec]) -> wire.Tensors:
    return wire.Tensors(
        file=file,
        names=[spec.name for spec in specs],
        dtypes=[spec.dtype for spec in specs],
        ranks=[len(spec.shape) for spec in specs],
        dimensions=[dimension for spec in specs for dimension in spec.shape],
        offsets=[spec.offset for spec in specs],
        lengths=[spec.length for spec in specs],
    )


def _digests(digests: dict[int, bytes]) -> wire.Digests:
    tensors = sorted(digests)
    return wire.Digests(tensors=tensors, digests=b"".join(digests[tensor] for tensor in tensors))
