"""The rows of a manifest: files with tensors, the tensors, small files, and the revision that they came from."""

from __future__ import annotations

from typing import NamedTuple


class WeightFile(NamedTuple):
    """A file with tensors: `size` is bytes, `frame` the digest of the `frame_bytes` outside the tensors, in order.

    `hub_blob` is the name that a hub gives to the file's content, "" if it came from none.
    """

    component: str
    file: str
    size: int
    frame_bytes: int
    frame: bytes
    hub_blob: str = ""

    @property
    def path(self) -> str:
        """The file's path below the checkpoint's folder."""
        return f"{self.component}/{self.file}" if self.component else self.file


class TensorRow(NamedTuple):
    """A tensor of a file: `offset` and `length` are bytes in it, `digest` is BLAKE3 of the tensor's bytes.

    A tensor that an index says to be another file's does not count (`counts`): the file has it, the checkpoint has not.
    """

    component: str
    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    digest: bytes
    counts: bool = True


class SmallFile(NamedTuple):
    """A file beside the weights, such as config.json, whose content is one blob of `length` bytes."""

    path: str
    length: int
    digest: bytes
    hub_blob: str = ""


class FilePiece(NamedTuple):
    """A run of a file's bytes at `offset`: a tensor's, or if `row` is None the frame's from `frame_offset` on."""

    offset: int
    length: int
    row: TensorRow | None
    frame_offset: int


class HubOrigin(NamedTuple):
    """The revision on a hub that a checkpoint came from: `org/name`, and 40 hex digits."""

    repository: str
    commit: str
