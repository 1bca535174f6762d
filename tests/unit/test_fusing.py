"""torch.stack and torch.cat on memory that lies in a row: the values of torch's own, and views where that can be."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightd.integrations.fusing import TorchFusionMode

SIZE = 1 << 16


class Store:
    """An attachment of which only the memory is needed."""

    torch_device = "cpu"

    def __init__(self) -> None:
        self.memory = (ctypes.c_ubyte * SIZE)(*(at * 7 % 251 for at in range(SIZE)))
        self.address = ctypes.addressof(self.memory)

    def holds(self, address: int, length: int) -> bool:
        return self.address <= address and address + length <= self.address + SIZE

    def span(self, address: int, length: int) -> memoryview | None:
        start = address - self.address
        return memoryview(self.memory).cast("B")[start : start + length] if self.holds(address, length) else None

    def tensor(self, start: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        count = int(torch.Size(shape).numel())
        view = memoryview(self.memory).cast("B")[start : start + count * dtype.itemsize]
        return torch.frombuffer(view, dtype=dtype).view(shape)


@pytest.fixture(scope="module")
def store() -> Store:
    return Store()


def fusing(store: Store) -> TorchFusionMode:
    return TorchFusionMode(store)  # type: ignore[arg-type]  # what fusing needs of an attachment


def shared(store: Store, tensor: torch.Tensor) -> bool:
    return store.holds(tensor.data_ptr(), 1)


def test_experts_in_a_row_are_one_view(store: Store) -> None:
    gates = [store.tensor(at * 2048, 8, 32) for at in range(4)]
    ups = [store.tensor(at * 2048 + 1024, 8, 32) for at in range(4)]
    expected = torch.cat([torch.stack(gates), torch.stack(ups)], dim=1)
    with fusing(store) as active:
        made = torch.cat([torch.stack(gates, dim=0), torch.stack(ups)], 1)
    assert shared(store, made)
    assert made.is_contiguous()
    assert made.untyped_storage().nbytes() == made.nbytes
    assert torch.equal(made, expected)
    assert made.data_ptr() == gates[0].data_ptr()
    assert active.reason(torch.zeros(3)) == ""


@given(st.data())
def test_values_are_torchs_own_wherever_tensors_lie(data: st.DataObject) -> None:
    """For any places, shapes, dimensions and depth of stacking and joining; and what is no view is a copy."""
    store = Store()
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    step = data.draw(st.sampled_from([64, 128, 256, 1024]))
    start = data.draw(st.integers(0, 8)) * 64

    def level(depth: int) -> torch.Tensor:
        if not depth:
            place = start + step * data.draw(st.integers(0, 6))
            return store.tensor(place, *shape)
        parts = [level(depth - 1) for _ in range(data.draw(st.integers(1, 3)))]
        function = data.draw(st.sampled_from([torch.stack, torch.cat, torch.concat]))
        most = parts[0].dim() - (function is not torch.stack)
        return _both(function, parts, data.draw(st.integers(-most - 1, most)))

    active = fusing(store)

    def _both(function: Any, parts: list[torch.Tensor], dim: int) -> torch.Tensor:
        if any(part.shape != parts[0].shape for part in parts):
            parts = parts[:1]
        expected = function(parts, dim=dim)
        with active:
            made = function(parts, dim=dim)
        assert made.shape == expected.shape
        assert torch.equal(made, expected)
        assert made.dtype == expected.dtype
        result: torch.Tensor = made
        return result

    level(2)


@pytest.mark.parametrize("what", ["gap", "order", "dtype", "elsewhere", "empty", "out", "names", "grad"])
def test_what_does_not_lie_so_is_torchs_own(store: Store, what: str) -> None:
    one, other = store.tensor(0, 8, 8), store.tensor(256, 8, 8)
    kwargs: dict[str, Any] = {}
    if what == "gap":
        other = store.tensor(512, 8, 8)
    elif what == "order":
        one, other = other, one
    elif what == "dtype":
        other = store.tensor(256, 8, 8, dtype=torch.float32)
    elif what == "elsewhere":
        other = other.clone()
    elif what == "empty":
        other = other[:0]
    elif what == "out":
        kwargs["out"] = torch.zeros(16, 8, dtype=torch.int32)
    elif what == "names":
        kwargs["dim"] = -2
        other = store.tensor(300, 8, 8)
    elif what == "grad":
        one, other = (part.float().requires_grad_() for part in (one, other))
    expected = torch.cat([one, other], **kwargs).clone()
    with fusing(store):
        made = torch.cat([one, other], **kwargs)
        assert not shared(store, made)
        assert torch.equal(made, expected)
        with pytest.raises((IndexError, RuntimeError)):
            torch.cat([one, other], 5)


def test_reasons_say_where_the_parts_are(store: Store) -> None:
    active = fusing(store)
    first, second, third = store.tensor(0, 64), store.tensor(256, 64), store.tensor(1024, 64)
    with active:
        apart, turned, odd = (
            torch.cat(parts) for parts in ([first, third], [second, first], [store.tensor(512, 5), first])
        )
    assert "lie in 2 places" in active.reason(apart)
    assert "lie in another order" in active.reason(turned)
    assert "has 20 bytes, no multiple of 256" in active.reason(odd)


def test_parameters_in_strides_become_private(store: Store) -> None:
    """Experts at one distance, with others between them, are a view that kernels do not expect."""
    module = torch.nn.Module()
    with fusing(store) as active:
        made = torch.stack([store.tensor(at * 2048, 8, 32, dtype=torch.float32) for at in range(4)])
        module.weight = torch.nn.Parameter(made)
    assert shared(store, module.weight)
    expected = module.weight.detach().clone()
    active.finish(module)
    assert not shared(store, module.weight)
    assert module.weight.is_contiguous()
    assert expected.view(torch.int32).equal(module.weight.detach().view(torch.int32))
    assert "lie in 4 places" in active.reason(module.weight)
