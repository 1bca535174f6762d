"""What finds resident checkpoints without a walk through all: it agrees with such a walk, whatever comes and goes."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from weightd.types import FileIdentity, SourceFile
from weightd_daemon.core.checkpoint import Checkpoint, CheckpointKey
from weightd_daemon.core.checkpoint_index import KNOWN_SOURCES, CheckpointIndex

DEVICES = ("host", "GPU-1")


def files(number: int) -> tuple[SourceFile, ...]:
    return (SourceFile("", "f", FileIdentity(1, number, 3, 4, 5)),)


def checkpoint(content: int, device: str = "host") -> Checkpoint:
    return Checkpoint(CheckpointKey(device, "all", f"sha256:{content}"), {}, {"": content % 2}, 10, 1000, 0.0, 0.0)


def test_files_mean_the_content_that_they_were_last_found_to_have() -> None:
    index = CheckpointIndex()
    one, elsewhere, other = checkpoint(1), checkpoint(1, "GPU-1"), checkpoint(2)
    for there in (one, elsewhere, other):
        index.enter(there)
    assert index.claim(one, files(7)) == []
    assert index.claim(elsewhere, files(7)) == [], "it is the same content"
    assert index.loaded_from(("host", "all"), files(7)) is one
    assert index.loaded_from(("GPU-1", "all"), files(7)) is elsewhere
    assert index.loaded_from(("host", "uid:7"), files(7)) is None
    assert index.claim(other, files(7)) == [one.key, elsewhere.key]
    assert index.loaded_from(("host", "all"), files(7)) is other
    assert (one.sources, elsewhere.sources, other.sources) == ([], [], [files(7)])


def test_a_checkpoint_has_the_newest_lists_of_files() -> None:
    index, one = CheckpointIndex(), checkpoint(1)
    index.enter(one)
    for number in range(KNOWN_SOURCES + 3):
        index.claim(one, files(number))
        index.claim(one, files(number))
    assert one.sources == [files(number) for number in range(3, KNOWN_SOURCES + 3)]
    assert index.loaded_from(("host", "all"), files(2)) is None
    assert index.loaded_from(("host", "all"), files(3)) is one
    index.strike(one)
    assert index._by_files == {}


def test_lists_that_a_record_has_twice_are_found_and_forgotten() -> None:
    index, one, other = CheckpointIndex(), checkpoint(1), checkpoint(2)
    index.enter(one)
    index.enter(other)
    index.add_sources(one, [files(1), files(1), files(2)])
    index.claim(other, files(1))
    assert one.sources == [files(2)]
    index.add_sources(one, [files(2)])
    index.strike(one)
    assert index.loaded_from(("host", "all"), files(2)) is None


def test_what_is_said_of_one_that_has_gone_changes_nothing() -> None:
    """A load that nobody waits for may be evicted before it has its name and pin."""
    index, gone, again = CheckpointIndex(), checkpoint(1), checkpoint(1)
    index.enter(gone)
    index.strike(gone)
    index.enter(again)
    index.enter(checkpoint(2))
    index.use(gone)
    index.pin(gone, 7)
    index.unpin(gone, 7)
    index.claim(gone, files(1))
    assert next(index.by_use()) is again
    assert (index.bytes_of(7), index.loaded_from(("host", "all"), files(1))) == (0, None)


ACTIONS = st.tuples(
    st.integers(0, 3), st.sampled_from(DEVICES), st.sampled_from(["toggle", "use", "claim", "pin", "unpin"])
)


@given(st.lists(st.tuples(ACTIONS, st.integers(0, 2)), max_size=30))
def test_it_agrees_with_a_walk_through_all(steps: list[tuple[tuple[int, str, str], int]]) -> None:
    index = CheckpointIndex()
    there: dict[CheckpointKey, Checkpoint] = {}
    used: list[CheckpointKey] = []
    for (content, device, action), number in steps:
        one = there.get(checkpoint(content, device).key)
        if one is None:
            one = there[checkpoint(content, device).key] = checkpoint(content, device)
            index.enter(one)
            used.append(one.key)
        elif action == "toggle":
            index.strike(there.pop(one.key))
            used.remove(one.key)
        elif action == "use":
            index.use(one)
            used.remove(one.key)
            used.append(one.key)
        elif action == "claim":
            index.claim(one, files(number))
        else:
            (index.pin if action == "pin" else index.unpin)(one, 999 + number)
        assert [checkpoint.key for checkpoint in index.by_use()] == used
        for uid in range(998, 1002):
            mine = [c for c in there.values() if c.owner == uid or uid in c.pins]
            assert index.bytes_of(uid) == sum(c.total_bytes + c.books_bytes for c in mine)
        for where in DEVICES:
            here = [c for c in there.values() if c.key.device == where]
            for number_ in range(3):
                found = [c for c in here if files(number_) in c.sources]
                assert len(found) <= 1
                assert index.loaded_from((where, "all"), files(number_)) is next(iter(found), None)
            for tensors in (0, 1):
                found = [c for c in here if c.tensor_count == tensors]
                assert index.has_figures((where, "all"), 10, tensors) == bool(found)
            assert not index.has_figures((where, "all"), 11, 1)
