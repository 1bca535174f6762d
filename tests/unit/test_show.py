"""How values are shown: errors that may hold a whole request."""

from __future__ import annotations

from urllib.parse import quote

import pytest

from weightd_daemon.wire import clip


@pytest.mark.parametrize("piece", ["x", "ä", "😀", " ", "\\x00"])
@pytest.mark.parametrize("length", [3, 4_000, 20_000, 1_000_000])
def test_a_message_fits_into_trailers_and_keeps_both_ends(piece: str, length: int) -> None:
    message = f"checkpoint '{piece * length}' is not resident; `weightd ls` shows what is"
    clipped = clip(message)
    assert len(quote(clipped)) + len(clipped.encode()) * 4 // 3 <= 6000
    assert clipped.startswith("checkpoint '")
    assert clipped.endswith(" is not resident; `weightd ls` shows what is")
    assert ("[…]" in clipped) == (clipped != message) == (length > 3)


def test_a_reference_of_the_longest_name_is_not_cut() -> None:
    message = f"checkpoint {'n' * 1024!r} is not resident; `weightd ls` shows what is, `weightd load` loads"
    assert clip(message) == message
