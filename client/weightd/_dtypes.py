"""How many bytes a tensor of a dtype and shape takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from .types import DTYPE_BITS

if TYPE_CHECKING:
    from collections.abc import Sequence

GGML_BLOCKS: Final[dict[str, tuple[int, int]]] = {
    "GGML_Q4_0": (32, 18),
    "GGML_Q4_1": (32, 20),
    "GGML_Q5_0": (32, 22),
    "GGML_Q5_1": (32, 24),
    "GGML_Q8_0": (32, 34),
    "GGML_Q8_1": (32, 40),
    "GGML_Q2_K": (256, 84),
    "GGML_Q3_K": (256, 110),
    "GGML_Q4_K": (256, 144),
    "GGML_Q5_K": (256, 176),
    "GGML_Q6_K": (256, 210),
    "GGML_Q8_K": (256, 292),
    "GGML_IQ2_XXS": (256, 66),
    "GGML_IQ2_XS": (256, 74),
    "GGML_IQ3_XXS": (256, 98),
    "GGML_IQ1_S": (256, 50),
    "GGML_IQ4_NL": (32, 18),
    "GGML_IQ3_S": (256, 110),
    "GGML_IQ2_S": (256, 82),
    "GGML_IQ4_XS": (256, 136),
    "GGML_IQ1_M": (256, 56),
    "GGML_TQ1_0": (256, 54),
    "GGML_TQ2_0": (256, 66),
    "GGML_MXFP4": (32, 17),
    "GGML_NVFP4": (64, 36),
    "GGML_Q1_0": (128, 18),
}
"""Elements and bytes of a block, by ggml's names after "GGML_"; the loader asks the package gguf, which is newer."""


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int | None:
    """Return how many bytes a dense tensor takes; None if the dtype is unknown, or no tensor of it has that shape."""
    elements = math.prod(shape)
    if (bits := DTYPE_BITS.get(dtype)) is not None:
        return None if elements * bits % 8 else elements * bits // 8
    if dtype not in GGML_BLOCKS or not shape:
        return None
    in_block, block_bytes = GGML_BLOCKS[dtype]
    return None if shape[-1] % in_block else elements // in_block * block_bytes
