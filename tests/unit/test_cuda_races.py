"""What two threads, or two calls, do with a GPU at once: without a driver, for none can be held at that place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightd._mapping import cuda_driver, cuda_release

if TYPE_CHECKING:
    import pytest


class Calls(list[tuple[Any, ...]]):
    """The calls of the driver, which succeed; `answers` are results by name."""

    def __init__(self, **answers: Any) -> None:
        self._answers = answers

    def __call__(self, name: str, *arguments: Any) -> Any:
        self.append((name, *arguments))
        answer = self._answers.get(name)
        return answer() if callable(answer) else answer


def test_a_range_that_is_closed_again_gives_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its addresses may be somebody else's by then."""
    calls = Calls(cuMemAddressReserve=64 << 20)
    monkeypatch.setattr(cuda_driver, "call", calls)
    addresses = cuda_driver.MappedAddressRange(0, 2 << 20)
    for _ in range(2):
        addresses.close()
    assert [name for name, *_ in calls] == ["cuMemAddressReserve", "cuMemAddressFree"]


def test_a_context_that_another_thread_has_just_retained_is_not_retained_again(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts: dict[int, str] = {}
    pushed: list[str] = []

    class Contended:
        """A lock that the other thread had until now."""

        def __enter__(self) -> None:
            contexts[0] = "the context"

        def __exit__(self, *_: object) -> None:
            pass

    calls = Calls()
    monkeypatch.setattr(cuda_driver, "initialise", lambda: None)
    monkeypatch.setattr(cuda_driver, "call", calls)
    monkeypatch.setattr(cuda_driver, "bound", lambda _: pushed.append)
    monkeypatch.setattr(cuda_driver, "_contexts", contexts)
    monkeypatch.setattr(cuda_driver, "_lock", Contended())
    cuda_driver._enter(0)
    assert (calls, pushed) == ([], ["the context"])


def test_of_two_marker_streams_one_is_kept_and_the_other_destroyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No lock may be taken there: a finalizer may ask."""
    markers: dict[int, str] = {}

    def create() -> str:
        markers[0] = "the other thread's"
        return "ours"

    calls = Calls(cuStreamCreate=create)
    monkeypatch.setattr(cuda_release, "call", calls)
    monkeypatch.setattr(cuda_release, "_markers", markers)
    assert cuda_release._marker(0) == "the other thread's"
    assert calls == [("cuStreamCreate", 0), ("cuStreamDestroy", "ours")]


def test_what_waits_is_tried_by_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    release = cuda_release._Release(0, bool, set(), 256, None)
    monkeypatch.setattr(cuda_release._Release, "attempt", lambda _: tried.append("tried"))
    monkeypatch.setattr(cuda_release, "_waiting", {id(release): release})
    with cuda_release._turn:
        cuda_release._attempt_all()
    assert tried == []
    cuda_release._attempt_all()
    assert tried == ["tried"]
    assert cuda_release.unreleased_bytes() == 256, "it was not taken"
