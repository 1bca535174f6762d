"""safetensors' contract besides values: its errors, numpy arrays, a tensor's header entry, and `prefetch`.

What safetensors raises its callers catch, so each error here is one of weightd's own and what safetensors raises at the
same place. The classes are here, and not made when they are needed, so that they survive pickling. Where safetensors is
not installed nobody can catch its error, and they are weightd's own only.
"""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from ._formats import GGUF
from ._references.files import open_regular, show
from .errors import (
    DeviceMismatchError,
    FormatError,
    InvalidReferenceError,
    NotFoundError,
    PermissionDeniedError,
    WeightdError,
)

try:
    from safetensors import SafetensorError
except ImportError:
    SafetensorError = WeightdError  # type: ignore[misc, assignment]  # a base that each class below has already

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from ._mapping.segments import Memory
    from .types import TensorInfo


class MissingFileError(NotFoundError, FileNotFoundError):
    """There is no such file."""


class UnreadableFileError(PermissionDeniedError, FileNotFoundError):
    """This user may not read the file. safetensors raises FileNotFoundError for whatever it cannot open."""


class UnusableFileError(InvalidReferenceError, FileNotFoundError):
    """The name is not that of a regular file: a directory, a device, a name that is too long."""


class BadFileError(FormatError, SafetensorError):
    """The file is corrupt, has changed while it was read, or has a dtype that torch lacks."""


class MissingDtypeError(BadFileError, TypeError, AttributeError):
    """numpy has no such dtype. safetensors lets numpy's TypeError through for BF16, AttributeError for F8 and F4."""


class MissingTensorError(NotFoundError, SafetensorError):
    """The file has no such tensor, or the plan of a prefetch does not name it."""


class ClosedFileError(InvalidReferenceError, SafetensorError):
    """The file, or the loader of a prefetch, is closed."""


class BadArgumentError(InvalidReferenceError, SafetensorError):
    """A framework, backend or plan that cannot be."""


class MissingPackageError(InvalidReferenceError, ModuleNotFoundError):
    """numpy arrays are asked for, and numpy is not installed."""


class BadIndexError(InvalidReferenceError, SafetensorError, IndexError):
    """An index that numpy refuses. torch's own IndexError and TypeError are raised as they are, by safetensors too."""


class BadDeviceError(DeviceMismatchError, SafetensorError, RuntimeError):
    """The device is not there: SafetensorError where safetensors does not know its name, else torch's RuntimeError."""


_OPENING: dict[type[WeightdError], type[WeightdError]] = {
    InvalidReferenceError: UnusableFileError,
    FormatError: BadFileError,
    DeviceMismatchError: BadDeviceError,
}
_READING: dict[type[WeightdError], type[WeightdError]] = {
    NotFoundError: MissingTensorError,
    InvalidReferenceError: ClosedFileError,
    FormatError: BadFileError,
    DeviceMismatchError: BadDeviceError,
}


class Errors:
    """A `with` block in which weightd's errors become those that safetensors' callers catch as well."""

    def __init__(self, kinds: dict[type[WeightdError], type[WeightdError]]) -> None:
        self._kinds = kinds

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, WeightdError) and type(error) in self._kinds:
            raise self._kinds[type(error)](error.message, error.metadata) from error


opening = Errors(_OPENING)
reading = Errors(_READING)


def refuse_gguf(path: str) -> None:
    """Refuse a file that begins as a GGUF file does; what cannot be read is left to who opens it next.

    Errors: BadArgumentError.
    """
    try:
        descriptor, _ = open_regular(Path(path))
        with open(descriptor, "rb", buffering=0) as file:
            begin = file.read(len(GGUF.magic))
    except (WeightdError, OSError):
        return
    if begin == GGUF.magic:
        raise BadArgumentError(
            f"{show(path)}: a GGUF file, and this function is for safetensors files; use weightd.connect().attach"
        )


def open_locally(name: str, framework: str, device: str, backend: str, error: WeightdError) -> Any:
    """safetensors' own `safe_open`, with a warning for whoever called into the caller's module.

    Errors: `error`, the daemon's, where safetensors is not installed.
    """
    try:
        import safetensors
    except ImportError:
        why = f"{error.message}; fallback='local' needs safetensors, which is not installed: pip install safetensors"
        raise type(error)(why, error.metadata) from error
    level, frame = 2, sys._getframe(1)
    module = frame.f_code.co_filename
    while frame.f_code.co_filename == module and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(f"{name}: loaded privately, it shares no memory: {error}", RuntimeWarning, stacklevel=level)
    return safetensors.safe_open(name, framework=framework, device=device, backend=backend)


# -- numpy -----------------------------------------------------------------------------------------------------------

_NUMPY = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "BF16": "bfloat16",  # this and the following where a package such as ml_dtypes has registered them
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


def require_numpy() -> None:
    """Import numpy, which the extra `torch` does not bring. Errors: MissingPackageError."""
    try:
        import numpy  # noqa: F401  # only whether it is there
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "framework 'np': makes numpy arrays, and numpy is not installed: pip install numpy"
        ) from error


def make_array(memory: Memory | None, info: TensorInfo) -> Any:
    """A numpy array on `memory`, which it keeps; None where it has no bytes. It may be written to (copy-on-write).

    Errors: MissingDtypeError.
    """
    import numpy as np

    try:
        dtype = np.dtype(_NUMPY[info.dtype])
    except (KeyError, TypeError):
        raise MissingDtypeError(
            f"tensor {info.name!r}: numpy has no dtype for {info.dtype}; open it with framework='pt'"
        ) from None
    if memory is None:
        return np.zeros(info.shape, dtype)
    return np.frombuffer(memory, dtype).reshape(info.shape)


def index_array(array: Any, index: Any) -> Any:
    """A part of a numpy array, as an array also where it is one element. Errors: BadIndexError."""
    import numpy as np

    try:
        return np.asarray(array[index])
    except (IndexError, TypeError) as error:
        raise BadIndexError(f"index {index!r} of a tensor of shape {list(array.shape)}: {error}") from error


# -- what a file says of a tensor --------------------------------------------------------------------------------------


class TensorMeta(NamedTuple):
    """A tensor's entry in the file's header: safetensors' dtype name, shape, and begin and end of its bytes.

    The offsets are in bytes, from the begin of the file's data.
    """

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class SafeSlice:
    """What `get_slice` returns: indexed as a tensor is, a slice is a view of shared memory. It outlives the file."""

    def __init__(self, info: TensorInfo, select: Callable[[Any], Any]) -> None:
        self._info = info
        self._select = select

    def get_shape(self) -> list[int]:
        """The tensor's shape."""
        return list(self._info.shape)

    def get_dtype(self) -> str:
        """The tensor's dtype, by safetensors' name."""
        return self._info.dtype

    def __getitem__(self, index: Any) -> Any:
        with reading:
            return self._select(index)


# -- prefetch ----------------------------------------------------------------------------------------------------------


def planned(plan: dict[str, slice | None] | None, infos: dict[str, TensorInfo]) -> dict[str, slice | None]:
    """The tensors that a plan names, in file order, and which of their rows; None for all of a tensor.

    Errors: BadArgumentError, MissingTensorError.
    """
    if plan is None:
        return dict.fromkeys(infos)
    if not isinstance(plan, dict):
        raise TypeError(f"plan: must be a dict of tensor names to slices or None, not {type(plan).__name__}")
    for name, rows in plan.items():
        if not isinstance(name, str):
            raise BadArgumentError(f"prefetch plan: its keys must be tensor names, not {name!r}")
        if name not in infos:
            raise MissingTensorError(f"prefetch plan: the file does not contain tensor {name!r}")
        if rows is not None:
            _check_rows(infos[name], rows)
    if not plan:
        raise BadArgumentError("prefetch plan: it selects no tensors; leave it out to get all")
    return {name: plan[name] for name in infos if name in plan}


def _check_rows(info: TensorInfo, rows: slice) -> None:
    invalid = f"invalid prefetch plan slice of tensor {info.name!r}"
    if not isinstance(rows, slice):
        raise BadArgumentError(f"{invalid}: must be None or a slice, not {rows!r}")
    if not info.shape:
        raise BadArgumentError(f"{invalid}: the tensor is 0-d and has no rows")
    count = info.shape[0]
    for bound in (rows.start, rows.stop):
        if bound is not None and not isinstance(bound, int):
            raise BadArgumentError(f"{invalid}: its bounds must be whole numbers or None, not {bound!r}")
        if bound is not None and not -count <= bound <= count:
            raise BadArgumentError(f"{invalid}: {bound} is out of range for {count} rows")
    if rows.step not in (None, 1):
        raise BadArgumentError(f"{invalid}: must have step 1, not {rows.step!r}")
    if info.dtype == "F4" and math.prod(info.shape[1:]) % 2:
        raise BadArgumentError(f"{invalid}: a row is not a whole number of bytes")


class PrefetchLoader:
    """What `prefetch` returns: it hands out each planned tensor once, by `take` or by iterating, in file order.

    There is nothing to wait for: the tensors are resident. Those that are handed out outlive it.
    """

    def __init__(self, tensors: dict[str, tuple[Callable[[], Any], slice | None]]) -> None:
        """For each name what makes its tensor, and which rows of that; None for all."""
        self._names = list(tensors)
        self._left = tensors
        self._closed = False

    def names(self) -> list[str]:
        """The names that it hands out, in file order."""
        return list(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def take(self, name: str) -> Any:
        """A tensor. Errors: MissingTensorError, BadArgumentError (it was handed out), ClosedFileError."""
        if name not in self._names:
            raise MissingTensorError(f"tensor {name!r} is not in the prefetch plan")
        self._check_open()
        if name not in self._left:
            raise BadArgumentError(f"tensor {name!r} was already delivered; prefetch hands out each tensor once")
        make, rows = self._left.pop(name)
        with reading:
            return make() if rows is None else make()[rows]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Names and tensors that were not handed out yet. Errors: ClosedFileError."""
        for name in self._names:
            self._check_open()
            if name in self._left:
                yield name, self.take(name)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedFileError("this prefetch loader is closed; call prefetch again")

    def close(self) -> None:
        """Give up what was not handed out."""
        self._closed = True
        self._left = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
