"""Copying: where the tensors of a group go once one of them turns out to be shared."""

from __future__ import annotations

from typing import Any

import pytest

from weightd.types import TensorSpec
from weightd_daemon.loader.copying import Copier
from weightd_daemon.loader.schedule import Tensor, Unit, arranged, lanes, units
from weightd_daemon.loader.slots import Slot

SIZE = 2 << 20


class Daemon:
    """The daemon's end of the channel, to which all bytes are known."""

    def call(self, op: str, **arguments: Any) -> dict[str, Any]:
        if op == "grant":
            return {"segment": 1, "offset": 0, "length": arguments["ends"][-1]}
        return {"settle": {"answers": [(7, 9, 0)]}, "share": {"kept": [False]}}[op]


def copier_of(count: int, group: list[int], matched: frozenset[int], monkeypatch: pytest.MonkeyPatch) -> Copier:
    """A copier of so many tensors in one lane, for which all bytes are equal."""
    specs = [TensorSpec(f"t{at}", "U8", (SIZE,), at * SIZE, SIZE) for at in range(count)]
    tensors = arranged([Tensor(at, 0, spec) for at, spec in enumerate(specs)], [group])
    (lane,) = lanes(units(tensors), 1, [0])
    copier = Copier(Daemon(), None, [], None, lanes=[lane], matched=matched)  # type: ignore[arg-type]  # not needed here
    for asks_memory, answer in (("_resident", None), ("_equal", True)):
        monkeypatch.setattr(copier, asks_memory, lambda *_, answer=answer: answer)
    return copier


def reserve(copier: Copier, number: int, group: int | None) -> Slot:
    tensor = Tensor(number, 0, TensorSpec(f"t{number}", "U8", (SIZE,), number * SIZE, SIZE), group)
    copier.reserve(Unit(0, (tensor,)))
    return copier._reserved[number]


def share(copier: Copier, number: int, slot: Slot) -> None:
    """The bytes in the slot turn out to be there already."""
    copier._settle([(Tensor(number, 0, TensorSpec("", "U8", (SIZE,), 0, SIZE)), b"", slot)])


def test_a_group_of_which_one_is_shared_uses_its_place_again(monkeypatch: pytest.MonkeyPatch) -> None:
    copier = copier_of(4, [0, 1, 2, 3], frozenset(), monkeypatch)
    first, second = reserve(copier, 0, 0), reserve(copier, 1, 0)
    share(copier, 0, first)
    assert first.end == second[:2]
    assert reserve(copier, 2, 0) == first


@pytest.mark.parametrize("matched", [False, True])
def test_a_group_of_which_one_is_known_to_be_resident_is_placed_like_the_rest(
    matched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    copier = copier_of(5, [2, 3, 4], frozenset({4} if matched else ()), monkeypatch)
    first, second = reserve(copier, 0, None), reserve(copier, 1, None)
    share(copier, 0, first)
    assert (reserve(copier, 2, 2) == first) is matched
    assert (copier._reserved[2][:2] == second.end) is not matched
