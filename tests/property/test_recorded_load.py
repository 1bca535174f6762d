"""Whatever an engine does, a recorded load gives what it would have loaded by itself, and leaves the store alone."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from weightd._mapping.ranges import MappedRange
from weightd.binding import bind
from weightd.recording import Recording
from weightd.types import StoredPlace

ROWS, COLUMNS = 6, 4
STORED = 8
"""Stored tensors of ROWS x COLUMNS, one behind the other."""
PARAMETERS = 4


class Store:
    """An attachment of which only the memory is needed."""

    torch_device = "cpu"

    def __init__(self) -> None:
        values = (torch.arange(STORED * ROWS * COLUMNS) % 101).float()
        self.bytes = (ctypes.c_ubyte * values.nbytes).from_buffer_copy(values.numpy().tobytes())
        self.address = ctypes.addressof(self.bytes)
        self.before = bytes(self.bytes)

    def ranges(self) -> list[MappedRange]:
        return [MappedRange(self.address, len(self.before), weakref.ref(self))]

    def locate(self, tensor: torch.Tensor) -> StoredPlace | None:
        return StoredPlace(tensor.data_ptr(), tensor.nbytes, ()) if self.holds(tensor) else None

    def holds(self, tensor: torch.Tensor) -> bool:
        return self.address <= tensor.data_ptr() < self.address + len(self.before)

    def span(self, address: int, length: int) -> memoryview | None:
        start = address - self.address
        inside = start >= 0 and start + length <= len(self.before)
        return memoryview(self.bytes).cast("B")[start : start + length] if inside else None

    def tensors(self) -> list[torch.Tensor]:
        size = ROWS * COLUMNS * 4
        every = (memoryview(self.bytes).cast("B")[at * size : (at + 1) * size] for at in range(STORED))
        return [torch.frombuffer(one, dtype=torch.float32).view(ROWS, COLUMNS) for one in every]


class Engine(torch.nn.Module):
    """Parameters of several stored tensors' size, a view and an alias of them, and a buffer."""

    buffer: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for number in range(PARAMETERS):
            self.register_parameter(
                f"p{number}", torch.nn.Parameter(torch.empty(2 * ROWS, COLUMNS), requires_grad=False)
            )
        self.alias = self.p0
        self.early = self.p1.data[ROWS:]
        self.register_buffer("buffer", torch.empty(2 * ROWS, COLUMNS))
        self.read = 0.0

    def all(self) -> list[torch.Tensor]:
        return [*self.parameters(), self.buffer, self.alias, self.early]


Step = Callable[[list[torch.Tensor], list[torch.Tensor], list[float]], object]
"""What an engine does: to its tensors, with the stored ones, and what it reads."""

halves = st.sampled_from([0, ROWS])
numbers = st.integers(0, PARAMETERS)  # the last is the buffer


@st.composite
def steps(draw: st.DrawFn) -> Step:
    to, half, source = draw(numbers), draw(halves), draw(st.integers(0, STORED - 1))
    kind = draw(
        st.sampled_from(
            ["copy", "copy", "copy", "copy", "pair", "part", "turned", "cast", "fill", "scale", "own", "read"]
        )
    )
    rows = draw(st.integers(1, ROWS))

    def run(tensors: list[torch.Tensor], stored: list[torch.Tensor], seen: list[float]) -> None:
        target = tensors[to].data.narrow(0, half, ROWS)
        if kind == "copy":
            target.copy_(stored[source])
        elif kind == "pair":
            tensors[to].data[:ROWS].copy_(stored[source])
            tensors[to].data[ROWS:] = stored[(source + 1) % STORED]
        elif kind == "part":
            target[:rows].copy_(stored[source][ROWS - rows :])
        elif kind == "turned":
            target.view(COLUMNS, ROWS).copy_(stored[source].t())
        elif kind == "cast":
            target.copy_(stored[source].half())
        elif kind == "fill":
            target[rows - 1].fill_(3)
        elif kind == "scale":
            target.mul_(2)
        elif kind == "own":
            target.copy_(tensors[(to + 1) % PARAMETERS].data[:ROWS])
        else:
            seen.append(float(target.sum()))

    return run


@given(st.lists(steps(), max_size=12))
def test_values_are_those_of_the_engines_own_load(program: list[Step]) -> None:
    store = Store()
    whole: list[Step] = [_initial(number, 2 * number % STORED) for number in range(PARAMETERS + 1)] + program
    plain, expected = Engine(), []
    for step in whole:
        step(plain.all(), store.tensors(), expected)
    recording: Any = Recording("cpu", [store])  # type: ignore[list-item]  # what a recording needs of an attachment
    seen: list[float] = []
    with recording.building():
        engine = Engine()
    with recording.loading():
        for step in whole:
            step(engine.all(), store.tensors(), seen)
    binding = bind(engine, recording)
    assert seen == expected
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(engine.all(), plain.all(), strict=True))
    for one in binding.parameters:
        assert store.holds(engine.get_parameter(one.name)) == one.shared
    assert engine.early.data_ptr() == engine.p1.data_ptr() + ROWS * COLUMNS * 4
    assert not store.holds(engine.buffer)
    assert bytes(store.bytes) == store.before


def _initial(number: int, source: int) -> Step:
    """The load that most parameters of most engines have: two stored tensors, one behind the other."""

    def run(tensors: list[torch.Tensor], stored: list[torch.Tensor], seen: list[float]) -> None:
        tensors[number].data[:ROWS].copy_(stored[source])
        tensors[number].data[ROWS:].copy_(stored[source + 1])

    return run


def test_the_usual_load_is_shared() -> None:
    """So that the test above is not true because everything is private."""
    store = Store()
    recording: Any = Recording("cpu", [store])  # type: ignore[list-item]  # what a recording needs of an attachment
    with recording.building():
        engine = Engine()
    with recording.loading():
        for number in range(PARAMETERS + 1):
            _initial(number, 2 * number % STORED)(engine.all(), store.tensors(), [])
    assert all(one.shared for one in bind(engine, recording).parameters)
