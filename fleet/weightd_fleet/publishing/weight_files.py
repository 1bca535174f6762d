"""Reads a file with tensors once, from its first byte to its last, and takes the digests of all that is in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from weightd.errors import FormatError
from weightd_fleet.core.digests import blob_digest, new_hasher
from weightd_fleet.core.manifest_checks import MAX_FRAME_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightd.types import TensorSpec
    from weightd_daemon.loader.source import LoaderSource

    from .hub import HubCheck

_PIECE: Final = 1 << 20


class ReadWeightFile(NamedTuple):
    """What a file holds: the digest of each tensor in the order given, and the frame, all other bytes in order."""

    digests: tuple[bytes, ...]
    frame: bytes

    @property
    def frame_digest(self) -> bytes:
        """BLAKE3 of the frame."""
        return blob_digest(self.frame)


def read_weight_file(
    source: LoaderSource, tensors: Sequence[TensorSpec], check: HubCheck, advance: Callable[[int], None]
) -> ReadWeightFile:
    """Read a file with these tensors, which do not overlap. `advance` is called with the bytes that were read.

    Errors: FormatError (it changes meanwhile, is cut off, or has too many bytes outside its tensors).
    """
    buffer = memoryview(bytearray(_PIECE))
    frame = bytearray()
    digests: dict[int, bytes] = {}

    def pass_over(begin: int, end: int, take: Callable[[memoryview], object]) -> None:
        for offset in range(begin, end, _PIECE):
            piece = buffer[: min(_PIECE, end - offset)]
            source.read_into(piece, offset)
            check.update(piece)
            take(piece)
            advance(len(piece))

    outside = source.identity.size - sum(tensor.length for tensor in tensors)
    if outside > MAX_FRAME_BYTES:
        raise FormatError(
            f"{source.name}: has {outside} bytes outside its tensors, over the limit of {MAX_FRAME_BYTES}"
        )
    position = 0
    for number, tensor in sorted(enumerate(tensors), key=lambda item: (item[1].offset, item[1].length)):
        pass_over(position, tensor.offset, frame.extend)
        hasher = new_hasher()
        position = tensor.offset + tensor.length
        pass_over(tensor.offset, position, hasher.update)
        digests[number] = hasher.digest()
    pass_over(position, source.identity.size, frame.extend)
    source.check_unchanged()
    return ReadWeightFile(tuple(digests[number] for number in range(len(tensors))), bytes(frame))
