"""Tensors on the fake GPU: torch.cuda does not run there, but a fake device's addresses are addresses of the host."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from weightd import _tensors

_real = _tensors._raw


def install() -> None:
    """Let weightd make CPU tensors of what it maps from the fake GPU; only the last step differs."""
    _tensors._raw = _raw


def _raw(memory: Any, device: str, dtype: torch.dtype) -> torch.Tensor:
    """As the real one: each tensor has a storage of exactly its bytes, and keeps the buffer that it was made of."""
    if memory is None or isinstance(memory, memoryview):
        return _real(memory, "cpu", dtype)
    assert device.startswith("cuda:")
    array = (ctypes.c_ubyte * memory.size).from_address(int(memory.handle))
    array.buffer = memory  # type: ignore[attr-defined]  # an array takes attributes
    return torch.frombuffer(array, dtype=dtype)
