"""Tensors on shared memory, and safetensors.torch's functions with the same signatures and results.

    import weightd.torch
    state = weightd.torch.load_file("model.safetensors")

The difference to safetensors: the bytes are shared with every other process that uses them. They are not to be written
to; in host memory a write in place makes the written pages private to this process, and costs their memory. On a GPU it
kills the process's CUDA context, or, where memory is shared by CUDA IPC, changes everybody's bytes: see `Attachment`.
"""

from __future__ import annotations

import atexit
import math
import os
import sys
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import torch

from .client import RETRY_SECONDS, Client, connect
from .errors import (
    CapacityError,
    DaemonUnreachableError,
    DeviceMismatchError,
    FormatError,
    InvalidReferenceError,
    NotFoundError,
)
from .types import TensorInfo, TensorKey

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from ._mapping.segments import Memory
    from .attachment import Attachment

Fallback = Literal["error", "wait", "local"]
T = TypeVar("T")

_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F4": torch.float4_e2m1fn_x2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for a safetensors dtype name. Errors: FormatError (torch has none, as for F6_E2M3)."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise FormatError(f"dtype {name}: torch has no such dtype; read the bytes with Attachment.buffer") from None


def make_tensor(memory: Memory | None, info: TensorInfo, device: str) -> torch.Tensor:
    """A tensor on `memory`, which it keeps; None where it has no bytes. `device` is torch's name for where that is.

    It has a storage of its own, exactly as long as its bytes. Errors: FormatError, DeviceMismatchError.
    """
    shape = info.shape
    if info.dtype.startswith("GGML_"):  # blocks along the last dimension: their bytes, as the package gguf gives them
        rows = math.prod(shape[:-1])
        return _raw(memory, device, torch.uint8).view(*shape[:-1], info.length // rows if rows else 0)
    dtype = torch_dtype(info.dtype)
    if info.dtype == "F4":  # torch counts pairs
        if not shape or shape[-1] % 2:
            raise FormatError(f"tensor {info.name!r}: torch holds F4 in pairs; its last dimension is odd")
        shape = (*shape[:-1], shape[-1] // 2)
    return _raw(memory, device, dtype).view(shape)


def strided(
    memory: Memory, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int], device: str
) -> torch.Tensor:
    """A tensor on `memory`, which it keeps: from its beginning on, with strides in elements."""
    return _raw(memory, device, dtype).as_strided(tuple(shape), tuple(strides))


def _raw(memory: Memory | None, device: str, dtype: torch.dtype) -> torch.Tensor:
    """The last step, and the only one that depends on the device: memory as a tensor of one dimension."""
    if isinstance(memory, memoryview):
        return torch.frombuffer(memory, dtype=dtype)
    if device != "cpu":
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]  # torch has no types here
        except (AssertionError, RuntimeError) as error:  # a build without CUDA, or a forked child
            raise DeviceMismatchError(f"torch cannot use {device}: {error}") from error
    if memory is None:
        return torch.empty(0, dtype=dtype, device=device)
    return torch.utils.dlpack.from_dlpack(memory).view(dtype)


def load_file(
    filename: str | os.PathLike[str],
    device: str | int | torch.device = "cpu",
    *,
    backend: str = "mmap",
    fallback: Fallback = "error",
) -> dict[str, torch.Tensor]:
    """Load a safetensors file into tensors on shared memory: `safetensors.torch.load_file`, without a copy per process.

    `backend` is accepted for safetensors' sake. `fallback` says what to do without a daemon, or where the file does not
    fit: "error" raises, "wait" waits for a daemon, "local" loads privately with safetensors and warns.
    Errors: FormatError, NotFoundError, CapacityError, DaemonUnreachableError, DeviceMismatchError,
    InvalidReferenceError (a `.gguf` file: see `Attachment.state_dict`).
    """
    with safe_open(filename, framework="pt", device=device, backend=backend, fallback=fallback) as file:
        return file.get_tensors()


class safe_open:  # noqa: N801  # safetensors' name
    """`safetensors.safe_open` on shared memory: keys, get_tensor, get_tensors, get_slice, metadata, offset_keys.

    Tensors stay valid after the file is closed. For `fallback` and errors see `load_file`.
    """

    def __init__(
        self,
        filename: str | os.PathLike[str],
        framework: str,
        device: str | int | torch.device = "cpu",
        *,
        backend: str = "mmap",
        fallback: Fallback = "error",
    ) -> None:
        if framework not in ("pt", "torch", "pytorch"):
            raise InvalidReferenceError(f"framework {framework!r}: weightd makes torch tensors; use framework='pt'")
        if fallback not in ("error", "wait", "local"):
            raise InvalidReferenceError(f"fallback {fallback!r}: must be 'error', 'wait' or 'local'")
        if backend not in ("mmap", "pread"):
            raise InvalidReferenceError(f"backend {backend!r}: must be 'mmap' or 'pread', as in safetensors")
        self._name = os.fspath(filename)
        if self._name.lower().endswith(".gguf"):
            raise InvalidReferenceError(
                f"{self._name}: a GGUF file, and this function is for safetensors files; use weightd.connect().attach"
            )
        self._attachment: Attachment | None = None
        self._local: Any = None
        place = device_name(device)
        try:
            path = os.path.join(os.curdir, self._name) if not os.path.isabs(self._name) else self._name
            self._attachment = when_reachable(
                lambda: shared_client().attach(path, device=place), wait=fallback == "wait"
            )
        except (DaemonUnreachableError, CapacityError) as error:
            if fallback != "local":
                raise
            self._local = _open_locally(self._name, place, backend, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._local is not None:
            self._local.__exit__(kind, error, traceback)
        if self._attachment is not None:
            self._attachment.close()

    def __del__(self) -> None:
        # safetensors lets a file go out of scope unclosed; so do we.
        if getattr(self, "_attachment", None) is not None:
            self._attachment.drop()  # type: ignore[union-attr]  # just seen

    def keys(self) -> list[str]:
        """Names of all tensors, sorted."""
        return self._local.keys() if self._local is not None else sorted(self.offset_keys())

    def offset_keys(self) -> list[str]:
        """Names of all tensors, in the order in which they lie in the file."""
        if self._local is not None:
            return list(self._local.offset_keys())
        return [key.name for key in self._attached.tensors]

    def metadata(self) -> dict[str, str] | None:
        """The file's `__metadata__`; None where it has none."""
        if self._local is not None:
            return self._local.metadata()  # type: ignore[no-any-return]  # safetensors has no types
        return self._attached.metadata()

    def get_tensor(self, name: str) -> torch.Tensor:
        """One tensor. Errors: NotFoundError."""
        return self._local.get_tensor(name) if self._local is not None else self._attached.tensor(name)

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name, in file order."""
        return self._local.get_tensors() if self._local is not None else self._attached.state_dict()

    def get_slice(self, name: str) -> Any:
        """Something to slice: `f.get_slice("embedding")[:, ::8]`. Errors: NotFoundError."""
        if self._local is not None:
            return self._local.get_slice(name)
        key = TensorKey("", name)
        if key not in self._attached.tensors:
            raise NotFoundError(f"tensor {name!r} is not in {self._name}")
        info = self._attached.tensors[key]
        return _Slice(info, lambda: self._attached.tensor(name))

    @property
    def _attached(self) -> Attachment:
        assert self._attachment is not None  # there is one where there is no local file
        return self._attachment


class _Slice:
    """What `get_slice` returns: indexed as a tensor is, a slice is a view of shared memory. So it is in safetensors."""

    def __init__(self, info: TensorInfo, tensor: Callable[[], torch.Tensor]) -> None:
        self._info = info
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        """The tensor's shape."""
        return list(self._info.shape)

    def get_dtype(self) -> str:
        """The tensor's dtype, by safetensors' name."""
        return self._info.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor()[index]


_shared: dict[tuple[int, str | None], Client] = {}
_shared_lock = threading.Lock()


def when_reachable(call: Callable[[], T], *, wait: bool) -> T:
    """What `call` returns; with `wait` as soon as a daemon answers. Threads that do not wait are not held up."""
    while True:
        try:
            return call()
        except DaemonUnreachableError:
            if not wait:
                raise
            time.sleep(RETRY_SECONDS)


def shared_client() -> Client:
    """The process's own client for what is given none: one per address, made anew in a forked child.

    Errors: DaemonUnreachableError.
    """
    key = os.getpid(), os.environ.get("WEIGHTD_SOCKET")
    with _shared_lock:
        if key not in _shared:
            _shared[key] = connect()
            atexit.register(_shared[key].close)
        return _shared[key]


def device_name(device: str | int | torch.device) -> str:
    """What the client calls a device of torch."""
    if isinstance(device, int):
        return f"cuda:{device}"
    return str(device)


def _open_locally(name: str, device: str, backend: str, error: Exception) -> Any:
    import safetensors

    level, frame = 2, sys._getframe(1)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:  # whoever called into this module
        level, frame = level + 1, frame.f_back
    warnings.warn(f"{name}: loaded privately, it shares no memory: {error}", RuntimeWarning, stacklevel=level)
    return safetensors.safe_open(name, framework="pt", device=device, backend=backend)
