"""weightd.gguf: values of ggml's blocks, equal to those of the package gguf, and without a copy of the blocks."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from support.checkpoints import random_bytes
from support.gpu_segments import check
from weightd._tensors import make_tensor
from weightd.errors import FormatError
from weightd.gguf import GgufTensor
from weightd.types import TensorInfo

KINDS = [kind for kind in gguf.GGML_QUANT_SIZES if not kind.name.startswith("I") or kind.name.startswith("IQ")]
SHAPES = [(256,), (1, 512), (3, 256), (2, 3, 4, 256), (33, 256)]


@pytest.fixture(autouse=True)
def _any_bits() -> Iterator[None]:
    """Random blocks hold infinite and undefined scales, of which numpy would warn."""
    with np.errstate(all="ignore"):
        yield


def length(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // elements * size


def make(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> GgufTensor:
    data = bytearray(random_bytes((kind.name, shape), length(kind, shape)))
    return GgufTensor("a", kind.name, shape, memoryview(data))


def test_values_are_those_of_the_package() -> None:
    tried = 0
    for kind in KINDS:
        for shape in SHAPES:
            tensor = make(kind, shape)
            rows = np.frombuffer(tensor.bytes, np.uint8).reshape(*shape[:-1], -1)
            try:
                expected = gguf.quants.dequantize(rows, kind)
            except NotImplementedError:
                with pytest.raises(FormatError, match=f"tensor 'a': .*does not dequantise {kind.name}; read its bytes"):
                    tensor.dequantize()
                continue
            values = tensor.dequantize()
            assert (values.dtype, values.shape) == (np.float32, shape), kind
            assert values.tobytes() == expected.tobytes(), kind
            tried += 1
    assert tried >= 100


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,), (3, 0), (0, 256)])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_shapes_without_blocks(kind: str, shape: tuple[int, ...]) -> None:
    values = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    data = (
        gguf.quants.quantize(values.reshape(1, -1), gguf.GGMLQuantizationType[kind]).tobytes() if values.size else b""
    )
    found = GgufTensor("a", kind, shape, memoryview(data)).dequantize()
    assert (found.dtype, found.shape) == (np.float32, shape)
    assert np.array_equal(found, values)


def test_blocks_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    real = gguf.quants.dequantize
    monkeypatch.setattr(gguf.quants, "dequantize", lambda rows, kind: seen.append(rows) or real(rows, kind))
    tensor = make(gguf.GGMLQuantizationType.Q4_0, (4, 64))
    tensor.dequantize()
    assert np.shares_memory(seen[0], np.frombuffer(tensor.bytes, np.uint8))
    whole = make(gguf.GGMLQuantizationType.F32, (4, 64))
    assert np.shares_memory(whole.dequantize(), np.frombuffer(whole.bytes, np.uint8))


@pytest.mark.parametrize("absent", ["gguf", "numpy"])
def test_without_the_packages(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = make(gguf.GGMLQuantizationType.Q4_0, (32,))
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(FormatError, match=r"pip install '\.\[gguf\]' in"):
        tensor.dequantize()


def test_type_that_the_package_does_not_know() -> None:
    with pytest.raises(FormatError, match=r"tensor 'a': .*has no type U8; update it"):
        GgufTensor("a", "U8", (4,), memoryview(b"abcd")).dequantize()


def test_repr_shows_no_bytes() -> None:
    shown = repr(GgufTensor("a", "Q4_0", (32,), memoryview(bytes(18))))
    assert shown == "GgufTensor(name='a', type='Q4_0', shape=(32,))"


@pytest.mark.parametrize("shape", [*SHAPES, (0, 256), (3, 0), (0,)])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K"])
def test_torch_gets_the_bytes_of_each_row(kind: str, shape: tuple[int, ...]) -> None:
    number = gguf.GGMLQuantizationType[kind]
    tensor = make(number, shape)
    info = TensorInfo("", "a", f"GGML_{kind}", shape, 0, 0, length(number, shape), b"", 0, 0)
    made = make_tensor(tensor.bytes if info.length else None, "cpu", info.name, info.dtype, info.shape)
    assert made.dtype is torch.uint8
    assert made.numpy().tobytes() == bytes(tensor.bytes)
    if info.length:
        assert tuple(made.shape) == gguf.quants.quant_shape_to_byte_shape(shape, number)
    else:
        assert (made.shape[:-1], made.numel()) == (shape[:-1], 0)


@pytest.mark.parametrize("kind", ["cuda_vmm", "cuda_ipc"])
def test_blocks_on_a_gpu_are_copied_to_the_host(kind: str, fake_driver: Path) -> None:
    check(
        fake_driver,
        f"""
import gguf, numpy as np
from support import fake_torch
fake_torch.install()
with np.errstate(all="ignore"), attachment({kind!r}, {{"a": ("GGML_Q4_0", (3, 64), 256, 108)}}) as attached:
    tensor = attached.gguf_tensor("a")
    rows = np.frombuffer(contents(0)[256:364], np.uint8).reshape(3, 36)
    assert (tensor.type, tensor.shape) == ("Q4_0", (3, 64))
    assert tensor.dequantize().tobytes() == gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.Q4_0).tobytes()
    assert np.array_equal(attached.tensor("a").numpy(), rows)
    assert "torch" not in type(tensor.bytes).__module__
""",
    )
