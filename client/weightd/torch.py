"""torch tensors on shared memory, and safetensors.torch's functions with the same signatures and results.

    import weightd.torch
    state = weightd.torch.load_file("model.safetensors")

The difference to safetensors: the bytes are shared with every other process that uses them. They are not to be written
to; in host memory a write in place makes the written pages private to this process, and costs their memory. On a GPU it
kills the process's CUDA context, or, where memory is shared by CUDA IPC, changes everybody's bytes: see `Attachment`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import threading
from typing import TYPE_CHECKING, Any, Literal, Self

from ._safetensors import (
    BadArgumentError,
    BadDeviceError,
    BadFileError,
    ClosedFileError,
    MissingFileError,
    MissingTensorError,
    PrefetchLoader,
    SafeSlice,
    TensorMeta,
    UnreadableFileError,
    UnusableFileError,
    index_array,
    make_array,
    open_locally,
    opening,
    planned,
    reading,
    refuse_gguf,
    require_numpy,
)
from ._tensors import make_tensor
from ._tensors import torch_dtype as torch_dtype
from ._transport.unreachable import when_reachable
from .client import Client, connect
from .errors import (
    CapacityError,
    DaemonUnreachableError,
    NotFoundError,
    PermissionDeniedError,
)
from .resolve import single_file
from .types import TensorInfo, TensorKey

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    import torch

    from .attachment import Attachment

Fallback = Literal["error", "wait", "local"]
_TORCH = "pt", "torch", "pytorch"
_NUMPY = "np", "numpy"


def load_file(
    filename: str | os.PathLike[str],
    device: str | int | torch.device | None = "cpu",
    *,
    backend: str = "mmap",
    fallback: Fallback = "error",
) -> dict[str, torch.Tensor]:
    """Load a safetensors file into tensors on shared memory: `safetensors.torch.load_file`, without a copy per process.

    `device=None` is the CPU. `backend` is accepted for safetensors' sake. `fallback` says what to do without a daemon,
    with one that is full or does not answer, or where the file does not fit: "error" raises, "wait" waits for a daemon,
    "local" loads privately with safetensors and warns.

    Errors are weightd's own, and at the same time those that safetensors raises: NotFoundError, PermissionDeniedError
    and InvalidReferenceError (it is no file) are FileNotFoundError; FormatError, DeviceMismatchError and
    InvalidReferenceError (an argument; a GGUF file: see `Attachment.state_dict`) are SafetensorError. Besides them:
    CapacityError, ResourceLimitError, DaemonUnreachableError, and, whatever `fallback` says, PermissionDeniedError
    and ProtocolMismatchError (a daemon that this user may not reach, or of another protocol).
    """
    with safe_open(filename, framework="pt", device=device, backend=backend, fallback=fallback) as file:
        return file.get_tensors()


class safe_open:  # noqa: N801  # safetensors' name
    """`safetensors.safe_open` on shared memory, with all its methods. `framework` is torch ("pt") or numpy ("np").

    Tensors and slices stay valid after the file is closed; the file itself raises then. Arrays of numpy lie on the same
    memory as tensors of torch, and may be written to in the same way (copy-on-write). For `fallback` and errors see
    `load_file`; a tensor that is not there is NotFoundError, a closed file InvalidReferenceError, and both are
    SafetensorError.
    """

    def __init__(
        self,
        filename: str | os.PathLike[str],
        framework: str,
        device: str | int | torch.device | None = "cpu",
        *,
        backend: str = "mmap",
        fallback: Fallback = "error",
    ) -> None:
        if framework not in (*_TORCH, *_NUMPY):
            raise BadArgumentError(
                f"framework {framework!r}: weightd makes torch tensors ('pt') or numpy arrays ('np')"
            )
        if fallback not in ("error", "wait", "local"):
            raise BadArgumentError(f"fallback {fallback!r}: must be 'error', 'wait' or 'local'")
        if backend not in ("mmap", "pread"):
            raise BadArgumentError(f"backend {backend!r}: must be 'mmap' or 'pread', as in safetensors")
        self._name = os.fspath(filename)
        self._numpy = framework in _NUMPY
        if self._numpy:
            require_numpy()
        self._attachment: Attachment | None = None
        self._local: Any = None
        self._path = os.path.join(os.curdir, self._name) if not os.path.isabs(self._name) else self._name
        place = "cpu" if device is None else device_name(device)
        if self._numpy and place not in ("cpu", "host"):
            raise BadDeviceError(f"device {place!r}: numpy's arrays lie in host memory; leave the device out")
        try:
            self._attachment = self._attach(place, wait=fallback == "wait")
        except (DaemonUnreachableError, CapacityError) as error:
            if fallback != "local":
                raise
            self._local = open_locally(self._name, framework, place, backend, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._local is not None:
            self._local.__exit__(kind, error, traceback)
        attachment, self._attachment = self._attachment, None
        if attachment is not None:
            attachment.close()

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

    def get_tensor(self, name: str) -> Any:
        """One tensor, or array. Errors: NotFoundError, FormatError (torch or numpy has no such dtype)."""
        if self._local is not None:
            return self._local.get_tensor(name)
        with reading:
            return self._make(self._attached, self._info(name))()

    def get_tensors(self) -> dict[str, Any]:
        """All tensors by name, in file order."""
        if self._local is not None:
            return self._local.get_tensors()  # type: ignore[no-any-return]  # safetensors has no types
        with reading:
            attached = self._attached
            if not self._numpy:
                return attached.state_dict()
            return {info.name: self._make(attached, info)() for info in attached.tensors.values()}

    def get_tensor_meta(self, name: str) -> TensorMeta:
        """A tensor's entry in the file's header. Errors: NotFoundError."""
        if self._local is not None:
            return self._local.get_tensor_meta(name)  # type: ignore[no-any-return]  # safetensors has no types
        info, begin = self._info(name), self._begins[name]
        return TensorMeta(info.dtype, list(info.shape), (begin, begin + info.length))

    def get_slice(self, name: str) -> Any:
        """Something to slice: `f.get_slice("embedding")[:, ::8]`. Errors: NotFoundError."""
        if self._local is not None:
            return self._local.get_slice(name)
        info = self._info(name)
        make = self._make(self._attached, info)
        if self._numpy:
            return SafeSlice(info, lambda index: index_array(make(), index))
        return SafeSlice(info, lambda index: make()[index])

    def prefetch(
        self,
        plan: dict[str, slice | None] | None = None,
        *,
        device: str | int | torch.device | None = None,
        threads: int = 8,
    ) -> PrefetchLoader:
        """Hand out tensors on a GPU one by one, as safetensors 0.9 does: `for name, tensor in f.prefetch(): …`.

        `plan` names the tensors; a slice selects rows of one. `device` is by default the file's; on another one the
        file is loaded first. `threads` is accepted for safetensors' sake: tensors that are resident need not be read.
        Errors: as of `load_file` and `get_tensor`; InvalidReferenceError (the plan, or a file for numpy),
        DeviceMismatchError (the device is no GPU).
        """
        if self._local is not None:
            return self._local.prefetch(plan, device=device, threads=threads)  # type: ignore[no-any-return]
        if self._numpy:
            raise BadArgumentError('prefetch makes torch tensors; open the file with framework="pt"')
        attached = self._attached
        place = attached.torch_device if device is None else device_name(device)
        if not place.startswith("cuda"):
            raise BadDeviceError(f"prefetch loads to cuda devices, not {place}; use get_tensors")
        rows = planned(plan, {key.name: info for key, info in attached.tensors.items()})
        with reading:
            for name in rows:
                torch_dtype(self._info(name).dtype)
        if device is None:
            return self._prefetched(attached, rows)
        with contextlib.closing(self._attach(place)) as other:
            if other.content_digest != attached.content_digest:
                raise BadFileError(f"{self._name}: changed since it was opened; open it again")
            return self._prefetched(other, rows)

    def _prefetched(self, attached: Attachment, rows: dict[str, slice | None]) -> PrefetchLoader:
        tensors = attached.tensors
        return PrefetchLoader({n: (self._make(attached, tensors[TensorKey("", n)]), part) for n, part in rows.items()})

    def _attach(self, place: str, *, wait: bool = False) -> Attachment:
        """The file, attached. Errors: as of `load_file`."""
        if os.path.isdir(self._path):
            raise UnusableFileError(
                f"{self._name}: a directory, and this function is for files; use weightd.connect().attach"
            )
        with opening:
            chosen = single_file(self._path)
            refuse_gguf(chosen.name)
            try:
                return when_reachable(lambda: shared_client().attach(chosen, device=place), wait=wait)
            except NotFoundError as error:
                if os.path.exists(self._path):  # what was not found is something else, such as the device
                    raise
                raise MissingFileError(f"No such file or directory: {self._name}") from error
            except PermissionDeniedError as error:
                if os.access(self._path, os.R_OK, effective_ids=True):  # it is the daemon that is closed to this user
                    raise
                raise UnreadableFileError(error.message, error.metadata) from error

    def _make(self, attached: Attachment, info: TensorInfo) -> Callable[[], Any]:
        """What makes the tensor or array, and keeps its memory until then."""
        memory = attached.buffer(info.name) if info.length else None
        if self._numpy:
            return lambda: make_array(memory, info)
        device = attached.torch_device
        return lambda: make_tensor(memory, device, info.name, info.dtype, info.shape)

    @functools.cached_property
    def _begins(self) -> dict[str, int]:
        """Where each tensor begins in the file's data: they follow one another without a hole."""
        infos = self._attached.tensors.values()
        lengths = itertools.accumulate((info.length for info in infos), initial=0)
        return {info.name: begin for info, begin in zip(infos, lengths, strict=False)}  # the last is the end of all

    def _info(self, name: str) -> TensorInfo:
        info = self._attached.tensors.get(TensorKey("", name))
        if info is None:
            raise MissingTensorError(f"{self._name}: does not contain tensor {name!r}")
        return info

    @property
    def _attached(self) -> Attachment:
        if self._attachment is None:  # there is one where there is no local file
            raise ClosedFileError(f"{self._name}: this file is closed; open it again")
        return self._attachment


_shared: dict[str | None, Client] = {}
_shared_lock = threading.Lock()


def shared_client() -> Client:
    """The process's own client for what is given none: one per address, made anew in a forked child.

    Errors: DaemonUnreachableError.
    """
    key = os.environ.get("WEIGHTD_SOCKET")
    with _shared_lock:
        if key not in _shared:
            _shared[key] = connect()
            atexit.register(_shared[key].close)
        return _shared[key]


def _after_fork() -> None:
    """In a forked child: clients are the parent's, and the thread that held the lock, as it connected, is not there."""
    global _shared, _shared_lock
    _shared, _shared_lock = {}, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def device_name(device: str | int | torch.device) -> str:
    """What the client calls a device of torch."""
    if isinstance(device, int):
        return f"cuda:{device}"
    return str(device)
