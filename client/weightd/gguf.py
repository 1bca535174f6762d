"""Tensors of GGUF files: ggml's quantised blocks in shared memory, and their values.

    tensor = attachment.gguf_tensor("blk.0.attn_q.weight")
    tensor.type, tensor.shape  # "Q4_K", (4096, 4096)
    tensor.dequantize()        # a numpy array of float32

Nothing here needs the package gguf (`pip install '.[gguf]'`), nor numpy, but `dequantize`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import FormatError

if TYPE_CHECKING:
    import numpy as np

    from ._mapping.segments import Memory


@dataclass(frozen=True, slots=True, eq=False)
class GgufTensor:
    """One tensor as ggml describes it.

    `type` is ggml's name ("Q4_K", "F32"), `shape` the logical one, row-major: ggml's dimensions in reverse order.
    `bytes` are the blocks, without a copy: a memoryview on the host, a `cuda.core.Buffer` on a GPU. They keep their
    memory, as every tensor does.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: Memory = field(repr=False)

    def dequantize(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The values as a numpy array of `shape`, in float32, computed by the package gguf on the CPU.

        Blocks that lie on a GPU are copied to the host first. Of type F32 the array is no copy but the very memory of
        the tensor (on the host), which is not to be written to. Errors: FormatError (the package is not installed, does
        not know the type, or cannot dequantise it), DeviceError, ForkedError (on a GPU, in a forked child).
        """
        try:
            import gguf
            import numpy as np
        except ImportError:
            raise FormatError(
                f"tensor {self.name!r}: dequantize needs the package gguf; pip install '.[gguf]' in weightd's checkout"
            ) from None
        kind = gguf.GGMLQuantizationType.__members__.get(self.type)
        if kind is None:
            raise FormatError(f"tensor {self.name!r}: the installed package gguf has no type {self.type}; update it")
        if not math.prod(self.shape):
            return np.empty(self.shape, np.float32)
        rows = np.frombuffer(self._on_host(), np.uint8).reshape(math.prod(self.shape[:-1]), -1)
        try:
            values: np.ndarray[Any, np.dtype[np.float32]] = gguf.quants.dequantize(rows, kind)
        except NotImplementedError:
            raise FormatError(
                f"tensor {self.name!r}: the installed package gguf does not dequantise {self.type}; read its bytes"
            ) from None
        return values.reshape(self.shape)

    def _on_host(self) -> memoryview | bytearray:
        if isinstance(self.bytes, memoryview):
            return self.bytes
        from ._mapping.cuda_buffer import copy_to_host

        return copy_to_host(self.bytes)
