"""Estimates how near two checkpoints are whose tensors agree in name, shape and dtype, but not in their bytes.

Full fine-tunes share hardly a tensor, and most of their elements. weightd does not save these bytes; the estimate says
what a lossless difference would take: XOR, then the bytes of the elements by their significance, then zstd's level 1.

Tensors that are equal are known by their digests and are not read. Of the others' bytes, put one behind the other,
evenly spaced blocks are compared, so that each tensor counts by its size, and the same files give the same figures.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from itertools import accumulate, combinations
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from weightd.plan_report import NearDuplicate
from weightd.types import DTYPE_BITS
from weightd_daemon.core.plan_compare import label

from .planned_files import TensorPlace, reopened

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from weightd_daemon.core.plan import PlannedTensor

    from .planned_files import PlannedCheckpoints, PlannedFile

SAMPLED_BYTES: Final = 64 << 20
"""Most bytes that are read of a pair, of both checkpoints together."""
MOST_PAIRS: Final = 100
_BLOCK: Final = 64 << 10
_FRAME: Final = 1 << 20
"""Bytes that are compressed at a time."""


class TensorPair(NamedTuple):
    """One tensor of two checkpoints, with other bytes in each: where they lie, and the bytes of an element."""

    first: TensorPlace
    second: TensorPlace
    element: int


class _Block(NamedTuple):
    pair: TensorPair
    offset: int
    length: int


def missing_extra() -> str:
    """What to install so that `estimate` can be called; empty if nothing is missing."""
    try:
        import numpy
        import zstandard
    except ImportError:
        return "near duplicates need numpy and zstandard: pip install '.[plan]' in weightd's checkout"
    del numpy, zstandard
    return ""


def candidates(
    checkpoints: PlannedCheckpoints, tensors: Mapping[str, Sequence[PlannedTensor]]
) -> list[tuple[str, str]]:
    """The pairs of checkpoints whose tensors agree in component, name, dtype and shape; the largest checkpoints first.

    `tensors` have their digests. Left out are pairs with equal bytes throughout, and checkpoints that are not in files.
    """
    alike: dict[frozenset[Any], list[str]] = defaultdict(list)
    contents: dict[frozenset[Any], int] = {}
    content: dict[str, int] = {}
    size: dict[str, int] = {}
    for name, places in checkpoints.tensors.items():
        size[name] = sum(tensor.length for tensor in places)
        if size[name] and all(isinstance(tensor.identity, TensorPlace) for tensor in places):
            alike[frozenset(map(label, places))].append(name)
            bytes_of = frozenset((label(tensor), tensor.identity) for tensor in tensors[name] if tensor.length)
            content[name] = contents.setdefault(bytes_of, len(contents))
    return [
        (first, second)
        for names in sorted(alike.values(), key=lambda names: -size[names[0]])
        for first, second in combinations(names, 2)
        if content[first] != content[second]
    ]


def estimate(
    names: tuple[str, str],
    checkpoints: PlannedCheckpoints,
    tensors: Mapping[str, Sequence[PlannedTensor]],
    most_bytes: int = SAMPLED_BYTES,
) -> NearDuplicate:
    """Compare a pair of candidates. Needs the extra `plan`. Errors: those of opening the files and reading them."""
    import numpy
    import zstandard

    differing = _differing(names, checkpoints, tensors)
    compressor = zstandard.ZstdCompressor(level=1)
    sampled = compressed = 0
    waiting: dict[int, list[Any]] = defaultdict(list)
    elements = equal = 0

    def compress(element: int) -> int:
        """Compress what waits of one size of elements: all their first bytes, then all their second ones, ..."""
        planes = numpy.concatenate(waiting.pop(element)).reshape(-1, element).T
        return len(compressor.compress(planes.tobytes()))

    for element, left, right in _read(_blocks(differing, most_bytes // 2), checkpoints.files):
        difference = numpy.bitwise_xor(numpy.frombuffer(left, numpy.uint8), numpy.frombuffer(right, numpy.uint8))
        sampled += len(left)
        equal += int(numpy.count_nonzero(~difference.reshape(-1, element).any(axis=1)))
        elements += len(left) // element
        waiting[element].append(difference)
        if sum(map(len, waiting[element])) >= _FRAME:
            compressed += compress(element)
    for element in list(waiting):
        compressed += compress(element)

    total = sum(tensor.length for tensor in tensors[names[0]])
    every = sum(tensor.length // _element(tensor.dtype) for tensor in tensors[names[0]])
    changed = sum(pair.first.length for pair in differing)
    changed_elements = sum(pair.first.length // pair.element for pair in differing)
    return NearDuplicate(
        *names,
        equal_elements=1 - changed_elements * (1 - equal / elements) / every,
        delta_ratio=changed * compressed / sampled / total,
        sampled_bytes=2 * sampled,
    )


def _element(dtype: str) -> int:
    """Bytes of an element; 1 for elements of less, and for GGUF's blocks."""
    return max(1, DTYPE_BITS.get(dtype, 8) // 8)


def _differing(
    names: tuple[str, str], checkpoints: PlannedCheckpoints, tensors: Mapping[str, Sequence[PlannedTensor]]
) -> list[TensorPair]:
    """The tensors of a pair that have other bytes in each."""
    first, second = (
        {
            label(tensor): (place.identity, tensor)
            for place, tensor in zip(checkpoints.tensors[name], tensors[name], strict=True)
        }
        for name in names
    )
    found = []
    for key, (place, tensor) in first.items():
        other, twin = second[key]
        if tensor.length and tensor.identity != twin.identity:
            assert isinstance(place, TensorPlace), place
            assert isinstance(other, TensorPlace), other
            found.append(TensorPair(place, other, _element(tensor.dtype)))
    return found


def _blocks(differing: Sequence[TensorPair], most_bytes: int) -> Iterator[_Block]:
    """All bytes of the tensors in blocks, or evenly spaced blocks of at most `most_bytes` together.

    The spaced ones are taken of all tensors put one behind the other, and go on in the next tensor where one ends:
    blocks cut short there would make small tensors count for less than their bytes.
    """
    ends = list(accumulate(pair.first.length for pair in differing))
    total = ends[-1]
    if total <= most_bytes:
        for pair in differing:
            length = pair.first.length
            yield from (_Block(pair, offset, min(_BLOCK, length - offset)) for offset in range(0, length, _BLOCK))
        return
    taken = most_bytes // _BLOCK
    for number in range(taken):
        start = (2 * number + 1) * total // (2 * taken) - _BLOCK // 2
        for at in range(bisect_right(ends, start), len(differing)):
            pair = differing[at]
            begin = ends[at] - pair.first.length
            if begin >= start + _BLOCK:
                break
            first = -(-max(start - begin, 0) // pair.element) * pair.element
            last = min(start + _BLOCK - begin, pair.first.length) // pair.element * pair.element
            if first < last:
                yield _Block(pair, first, last - first)


def _read(blocks: Iterable[_Block], files: Sequence[PlannedFile]) -> Iterator[tuple[int, bytes, bytes]]:
    """The bytes of blocks, by pairs of files: size of an element, then of both checkpoints."""
    by_files: dict[tuple[int, int], list[_Block]] = defaultdict(list)
    for block in blocks:
        by_files[block.pair.first.file, block.pair.second.file].append(block)
    for (first, second), some in by_files.items():
        with reopened(files[first]) as left, reopened(files[second]) as right:
            for pair, offset, length in some:
                contents = bytearray(length), bytearray(length)
                left.read_into(memoryview(contents[0]), pair.first.offset + offset)
                right.read_into(memoryview(contents[1]), pair.second.offset + offset)
                yield pair.element, bytes(contents[0]), bytes(contents[1])
