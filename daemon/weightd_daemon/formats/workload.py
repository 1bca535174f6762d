"""Workload manifests: descriptions of checkpoints without their bytes. JSON, plain or gzipped:

    {"PIPELINE/COMPONENT/model.safetensors": [{"name": …, "dtype": …, "shape": […], "content": …}, …], …}

Tensors whose content, dtype and shape are equal have equal bytes, in whatever file they stand; all others differ. A
file's first folder is its checkpoint, and further folders are its component; a file in no folder is a checkpoint.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import zlib
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from weightd.errors import FormatError
from weightd.types import DTYPE_BITS

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_BYTES: Final = 64 << 20
"""The longest manifest, unpacked; one of 9,000 tensors has 1.6 MB."""
MAX_VALUES: Final = 4_000_000
MAX_TENSORS: Final = 500_000
MAX_DIMENSIONS: Final = 64
MAX_TEXT_BYTES: Final = 4096

_GZIP_MAGIC: Final = b"\x1f\x8b"
_KEYS: Final = frozenset({"name", "dtype", "shape", "content"})
_BYTES_LIMIT: Final = 2**63
_SURROGATE: Final = re.compile(r"[\ud800-\udfff]")
"""Half a pair, which JSON may hold and no wire can carry."""


class WorkloadFormatTensor(NamedTuple):
    """A tensor in a workload file; `length` is bytes. Equal bytes are equal in `content`, `dtype` and `shape`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: str
    length: int


def placed(file: str) -> tuple[str, str]:
    """The checkpoint and the component that a file of a manifest belongs to."""
    first, *rest = file.split("/")
    return first, "/".join(rest[:-1])


def read_workload(label: str, raw: bytes) -> dict[str, list[WorkloadFormatTensor]]:
    """The tensors of each file, by its relative path. `label` is what messages call the manifest.

    Raises FormatError for anything but a whole, well-formed manifest.
    """
    return _Reader(label).read(raw)


class _Reader:
    """One manifest's checks; it exists so that every message can name the manifest."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._tensors = 0

    def _fail(self, fault: str) -> NoReturn:
        raise FormatError(f"{self._label}: {fault}; give a workload manifest as docs/operations.md describes it")

    def read(self, raw: bytes) -> dict[str, list[WorkloadFormatTensor]]:
        text = self._unpack(raw)
        # Counted in strings too: an upper bound is enough to bound memory before anything is built.
        values = text.count(b",") + text.count(b"[") + text.count(b"{")
        if values > MAX_VALUES:
            self._fail(f"holds about {values} JSON values, more than the {MAX_VALUES} that are supported")
        try:
            document = json.loads(text.decode("utf-8"), object_pairs_hook=self._object)
        except FormatError:
            raise
        except (ValueError, RecursionError):
            self._fail("not valid JSON")
        if not isinstance(document, dict) or not document:
            self._fail("not a JSON object with files")
        return {
            self._path(file): [self._tensor(file, row) for row in self._rows(file, rows)]
            for file, rows in document.items()
        }

    def _unpack(self, raw: bytes) -> bytes:
        if raw.startswith(_GZIP_MAGIC):
            try:
                with gzip.GzipFile(fileobj=io.BytesIO(raw)) as packed:
                    raw = packed.read(MAX_BYTES + 1)
            except (OSError, EOFError, zlib.error) as error:
                raise FormatError(f"{self._label}: damaged gzip data ({error}); download it again") from error
        if len(raw) > MAX_BYTES:
            self._fail(f"longer than {MAX_BYTES} bytes")
        return raw

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            self._fail("has a key twice in one object")
        return result

    def _path(self, file: str) -> str:
        if any(part in ("", ".", "..") for part in file.split("/")):
            self._fail(f"{_quoted(file)} is not a plain relative path")
        return self._text(file, "a file's path")

    def _rows(self, file: str, rows: object) -> Iterable[object]:
        if not isinstance(rows, list):
            self._fail(f"{_quoted(file)} must have a list of tensors")
        self._tensors += len(rows)
        if self._tensors > MAX_TENSORS:
            self._fail(f"lists more than the {MAX_TENSORS} tensors that are supported")
        return rows

    def _tensor(self, file: str, row: object) -> WorkloadFormatTensor:
        if not isinstance(row, dict) or not row.keys() >= _KEYS:
            self._fail(f"{_quoted(file)}: a tensor must be an object with {', '.join(sorted(_KEYS))}")
        name = self._text(row["name"], f"{_quoted(file)}: a tensor's name")
        where = f"{_quoted(file)}: tensor {_quoted(name)}"
        dtype = self._text(row["dtype"], f"{where}: dtype")
        if dtype not in DTYPE_BITS:
            self._fail(f"{where}: dtype {_quoted(dtype)} is not known")
        shape = row["shape"]
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
            self._fail(f"{where}: shape must be a list of at most {MAX_DIMENSIONS} numbers")
        # `type`, not isinstance: true and false are ints to Python.
        if any(type(dimension) is not int or not 0 <= dimension < _BYTES_LIMIT for dimension in shape):
            self._fail(f"{where}: shape must hold whole numbers from 0 to 2**63 - 1")
        bits = math.prod(shape) * DTYPE_BITS[dtype]
        if bits % 8 or bits // 8 >= _BYTES_LIMIT:
            self._fail(f"{where}: takes {bits} bits, not a whole number of bytes below 2**63")
        return WorkloadFormatTensor(
            name, dtype, tuple(shape), self._text(row["content"], f"{where}: content"), bits // 8
        )

    def _text(self, value: object, what: str) -> str:
        if not isinstance(value, str) or _SURROGATE.search(value) or len(value.encode()) > MAX_TEXT_BYTES:
            self._fail(f"{what} must be text of at most {MAX_TEXT_BYTES} bytes")
        return value


def _quoted(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}..."
