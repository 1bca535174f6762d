"""Loads, without loaders: what is left of one that ends before anything of it ran."""

from __future__ import annotations

import asyncio
import os
from typing import Any, cast

import pytest

from support.filled import WHO, Filled
from weightd.errors import CapacityError, DrainingError, PermissionDeniedError
from weightd_daemon.core.catalog import Who
from weightd_daemon.core.lease import Holder
from weightd_daemon.core.limits import Limits
from weightd_daemon.loader.loads import Loads
from weightd_daemon.loader.request import LoadRequest
from weightd_daemon.loader.turns import Turns


def loads_of(books: Filled, limits: Limits) -> Loads:
    nothing, unused = dict[str, Any](), cast("Any", None)
    return Loads(
        store=books.store, catalog=books.catalog, devices=nothing, reclaimers=nothing, index=unused,
        prepare=unused, now=lambda: 5.0, on_event=unused, lock=-1, threads=1, turns=Turns(1, 1), limits=limits,
    )  # fmt: skip


def wish_of(who: Who, name: str, *, pin: bool = False) -> LoadRequest:
    return LoadRequest(
        who=who, holder=Holder(1, 1, who.uid, ""), sources=(), device="GPU-0", name=name, name_is_default=not name,
        pin=pin, detached=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["new", "mine"])
def test_a_pin_that_is_refused_leaves_no_name_and_moves_none(name: str) -> None:
    """The user may bring so many bytes, and has; the names are as they were."""
    limits, user = Limits(), Who(1001, admin=False, domain="")
    books = Filled(2, limits=limits)
    first, second = books.store.checkpoints.values()
    books.catalog.set(user, "mine", first.key.content_digest)
    books.catalog.keep(user, first)
    limits.bytes = first.total_bytes
    tags = books.catalog.tags
    with pytest.raises(CapacityError, match="the limit max_user_bytes is reached"):
        loads_of(books, limits).settle(wish_of(user, name, pin=True), second)
    assert (books.catalog.tags, second.pinned, second.last_used) == (tags, False, 0.0)


def test_a_name_that_is_refused_leaves_no_pin() -> None:
    books, user = Filled(2), Who(1001, admin=False, domain="")
    loads, second = loads_of(books, Limits()), list(books.store.checkpoints.values())[1]
    with pytest.raises(PermissionDeniedError, match="name 'n0' belongs to uid 1000"):
        loads.settle(wish_of(user, "n0", pin=True), second)
    assert (second.pinned, second.last_used) == (False, 0.0)
    assert loads.settle(wish_of(user, "n1", pin=True), second) == "n1"  # it is that content's name already
    assert second.pinned


def test_a_load_that_ends_in_the_step_in_which_it_began_closes_its_intake() -> None:
    async def run() -> None:
        loads = loads_of(Filled(0), Limits())
        intake, other = os.pipe()
        os.close(other)
        load, _, begins = loads.start(wish_of(WHO, ""), intake)
        assert begins
        loads.end_all(DrainingError("the daemon is draining"))
        await asyncio.sleep(0.01)
        assert load.done.done()
        assert loads.under_way == []
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(intake)

    asyncio.run(run())
