"""Make torch tensors on attached memory: dtypes by safetensors' names, whole tensors, and strided tensors."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
from torch import frombuffer

from ._manifest import odd
from .errors import DeviceMismatchError, FormatError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._mapping.segments import Memory

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


_PLAIN = {name: dtype for name, dtype in _DTYPES.items() if name != "F4"}


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for a safetensors dtype name. Errors: FormatError (torch has none, as for F6_E2M3)."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise FormatError(f"dtype {name}: torch has no such dtype; read the bytes with Attachment.buffer") from None


def make_tensor(memory: Memory | None, device: str, name: str, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor on `memory`, which it keeps; None where it has no bytes. `device` is torch's name for where that is.

    It has a storage of its own, exactly as long as its bytes. Errors: FormatError, DeviceMismatchError, ServerError
    (these are not the bytes of such a tensor).
    """
    if (plain := _PLAIN.get(dtype)) is not None:
        try:
            flat = frombuffer(memory, dtype=plain) if isinstance(memory, memoryview) else _raw(memory, device, plain)
        except ValueError:
            if not isinstance(memory, memoryview):
                raise
            raise odd(f"has a tensor {name[:200]!r} of {memory.nbytes} bytes, which are no {dtype}") from None
    elif dtype.startswith("GGML_"):  # blocks along the last dimension: their bytes, as the package gguf gives them
        flat, rows = _raw(memory, device, torch.uint8), prod(shape[:-1])
        shape = (*shape[:-1], flat.numel() // rows if rows else 0)
    else:
        flat = _raw(memory, device, torch_dtype(dtype))  # F4, or none: torch counts pairs
        if not shape or shape[-1] % 2:
            raise FormatError(f"tensor {name!r}: torch holds F4 in pairs; its last dimension is odd")
        shape = (*shape[:-1], shape[-1] // 2)
    if flat.numel() != prod(shape):
        raise odd(f"has a tensor {name[:200]!r} of {flat.numel()} elements, which are not those of {list(shape)}")
    # In place: a view would be a second tensor. And torch parses numbers faster than a tuple of them.
    try:
        return flat if len(shape) == 1 else flat.resize_(*shape) if shape else flat.resize_(())
    except RuntimeError:  # strides overflow, beside a 0; a view does not count them
        return flat.view(shape)


def strided(
    memory: Memory, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int], device: str
) -> torch.Tensor:
    """A tensor on `memory`, which it keeps: from its beginning on, with strides in elements."""
    return _raw(memory, device, dtype).as_strided(tuple(shape), tuple(strides))


def _raw(memory: Memory | None, device: str, dtype: torch.dtype) -> torch.Tensor:
    """The last step, and the only one that depends on the device: memory as a tensor of one dimension."""
    if isinstance(memory, memoryview):
        return frombuffer(memory, dtype=dtype)
    if device != "cpu":
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]  # torch has no types here
        except (AssertionError, RuntimeError) as error:  # a build without CUDA, or a forked child
            raise DeviceMismatchError(f"torch cannot use {device}: {error}") from error
    if memory is None:
        return torch.empty(0, dtype=dtype, device=device)
    return torch.utils.dlpack.from_dlpack(memory).view(dtype)
