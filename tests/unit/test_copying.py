"""Copying: where the tensors of a group go once one of them turns out to be shared."""

from __future__ import annotations

from typing import Any

import pytest

from weightd.types import TensorSpec
from weightd_daemon.loader.copying import Copier
from weightd_daemon.loader.work import Tensor, arranged, lanes, units

SIZE = 2 << 20


class Daemon:
    """The daemon's end of the channel, to which all bytes are known."""

    def call(self, op: str, **arguments: Any) -> dict[str, Any]:
        if op == "grant":
            return {"segment": 1, "offset": 0, "length": arguments["ends"][-1]}
        return {"settle": {"answers": [(7, 9, 0)]}, "share": {"kept": [False]}}[op]


@pytest.mark.parametrize("matched", [frozenset(), frozenset({3})], ids=["whole", "one of them is matched"])
def test_a_group_of_which_one_is_shared_uses_its_place_again(
    matched: frozenset[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [TensorSpec(f"t{at}", "U8", (SIZE,), at * SIZE, SIZE) for at in range(4)]
    tensors = arranged([Tensor(at, 0, spec) for at, spec in enumerate(specs)], [[0, 1, 2, 3]])
    (lane,) = lanes(units(tensors), 1)
    copier = Copier(Daemon(), None, [], None, lanes=[lane], matched=matched)  # type: ignore[arg-type]  # not needed here
    for asks_memory, answer in (("_resident", None), ("_equal", True)):
        monkeypatch.setattr(copier, asks_memory, lambda *_, answer=answer: answer)
    for unit in lane[:2]:
        copier.reserve(unit)
    first = copier._reserved[0]
    copier._settle([(tensors[0], b"", first)])
    copier.reserve(lane[2])
    assert copier._reserved[2] == first
