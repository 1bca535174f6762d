"""How values are shown: errors that may hold a whole request."""

from __future__ import annotations

import threading
from urllib.parse import quote

import pytest

from support.daemon import eventually
from weightd_daemon.wire import MOST_NAMES, UserNames, clip


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


def test_a_user_is_a_number_until_the_name_service_answers() -> None:
    gate, asked = threading.Event(), []

    def look_up(uid: int) -> str:
        asked.append(uid)
        if uid == 1:
            gate.wait(60)
        if uid == 2:
            raise KeyError(uid)
        return f"user{uid}"

    names = UserNames(look_up)
    try:
        assert names.of(None) == "?"
        assert names.of(1) == names.of(1) == "1"
        assert names.of(3) in ("3", "user3")
        eventually(lambda: names.of(3) == "user3", what="another user's name, while one hangs")
        eventually(lambda: (names.of(2), 2 in asked) == ("2", True))
        gate.set()
        eventually(lambda: names.of(1) == "user1", what="the name")
        assert sorted(asked) == [1, 2, 3], "each was looked up once"
    finally:
        gate.set()


def test_names_are_forgotten_from_a_number_on() -> None:
    names = UserNames(str)
    for uid in range(MOST_NAMES * 2):
        names._find(uid)
    assert len(names._known) == MOST_NAMES
    assert (names.of(0), names.of(MOST_NAMES * 2 - 1)) == ("0", str(MOST_NAMES * 2 - 1))
