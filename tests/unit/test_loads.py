"""Loads, without loaders: what is left of one that ends before it has one, whatever the reason."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Any, cast

import pytest

from support.filled import WHO, Filled
from weightd.errors import DrainingError, LeaseLostError, NotFoundError, ServerError, WeightdError
from weightd_daemon.core.events import Event, LoadBegun, LoadEnded
from weightd_daemon.core.lease import Holder
from weightd_daemon.core.limits import Limits
from weightd_daemon.loader.loads import Loads
from weightd_daemon.loader.request import LoadRequest
from weightd_daemon.loader.turns import Turns
from weightd_daemon.loader.waiters import Load


class Desk:
    """Loads over books in this process, one wish, and the events that were told."""

    def __init__(self) -> None:
        self.books = Filled(0)
        self.told: list[Event] = []
        nothing, unused = dict[str, Any](), cast("Any", None)
        self.loads = Loads(
            store=self.books.store, catalog=self.books.catalog, devices={**self.books.devices}, reclaimers=nothing,
            index=unused, prepare=unused, now=lambda: 0.0, on_event=self.hear, lock=-1, threads=1, turns=Turns(1, 1),
            limits=Limits(),
        )  # fmt: skip
        self.wish = LoadRequest(
            who=WHO, holder=Holder(1, 1, 1000, ""), sources=(), device="GPU-0", name_is_default=True
        )
        self.intake, other = os.pipe()
        os.close(other)

    def hear(self, event: Event) -> None:
        self.told.append(event)

    def check_over(self, load: Load) -> None:
        """Nothing is left of a load, and what was told of its beginning was told of its end."""
        assert load.done.done()
        assert self.loads.under_way == []
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(self.intake)
        assert not self.books.store._loads
        begun = [event.load for event in self.told if isinstance(event, LoadBegun)]
        assert [event.begun.load for event in self.told if isinstance(event, LoadEnded)] == begun


def test_a_load_that_ends_in_the_step_in_which_it_began_closes_its_intake() -> None:
    async def run() -> None:
        desk = Desk()
        load, _, begins = desk.loads.start(desk.wish, desk.intake)
        assert begins
        desk.loads.end_all(DrainingError("the daemon is draining"))
        await asyncio.sleep(0.01)
        desk.check_over(load)

    asyncio.run(run())


def raising(error: BaseException) -> Callable[..., Any]:
    """A function that raises."""

    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


BUG = ZeroDivisionError("a bug")
FAULTS: dict[str, tuple[Callable[[Desk, pytest.MonkeyPatch], None], type[WeightdError]]] = {
    "no such device": (lambda desk, patch: desk.loads._devices.clear(), ServerError),
    "the books refuse": (lambda desk, patch: patch.setattr(desk.books.store, "open_load", raising(BUG)), ServerError),
    "the books know no such device": (lambda desk, patch: desk.books.store.memories.clear(), NotFoundError),
    "telling that it begins": (lambda desk, patch: patch.setattr(desk.loads, "_on_event", raising(BUG)), ServerError),
    "its turn": (lambda desk, patch: patch.setattr(desk.loads._turns, "turn", raising(BUG)), ServerError),
    "starting a loader": (lambda desk, patch: patch.setattr(desk.loads, "_take_loader", raising(BUG)), ServerError),
    "somebody else's cancellation": (
        lambda desk, patch: patch.setattr(desk.loads, "_take_loader", raising(asyncio.CancelledError())),
        LeaseLostError,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_fails_nobody_waits_for_a_load_without_end(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make, expected = FAULTS[fault]

    async def run() -> None:
        desk = Desk()
        desk.loads._reclaimers["GPU-0"] = cast("Any", None)
        load, _, _ = desk.loads.start(desk.wish, desk.intake)
        make(desk, monkeypatch)
        async with asyncio.timeout(60):
            with pytest.raises(expected):
                await load.done
            assert load.task is not None
            await asyncio.wait([load.task, *desk.loads._background])
            if desk.loads._background:
                await asyncio.wait(desk.loads._background)
        with contextlib.suppress(ZeroDivisionError):  # of the listener, which fails at the end as well
            load.task.result()
        desk.check_over(load)

    asyncio.run(run())
    assert ("load failed by a bug" in caplog.text) == (expected is ServerError)
