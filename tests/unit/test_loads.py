"""Loads, without loaders: what is left of one that ends before anything of it ran."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from support.filled import WHO, Filled
from weightd.errors import DrainingError
from weightd_daemon.core.lease import Holder
from weightd_daemon.core.limits import Limits
from weightd_daemon.loader.loads import Loads
from weightd_daemon.loader.request import LoadRequest
from weightd_daemon.loader.turns import Turns


def test_a_load_that_ends_in_the_step_in_which_it_began_closes_its_intake() -> None:
    async def run() -> None:
        books, nothing = Filled(0), dict[str, Any]()
        unused: Any = None
        loads = Loads(
            store=books.store, catalog=books.catalog, devices=nothing, reclaimers=nothing, index=unused,
            prepare=unused, now=lambda: 0.0, on_event=unused, lock=-1, threads=1, turns=Turns(1, 1), limits=Limits(),
        )  # fmt: skip
        intake, other = os.pipe()
        os.close(other)
        wish = LoadRequest(
            who=WHO, holder=Holder(1, 1, 1000, ""), sources=(), device="GPU-0", name="", name_is_default=True,
            pin=False, detached=False,
        )  # fmt: skip
        load, _, begins = loads.start(wish, intake)
        assert begins
        loads.end_all(DrainingError("the daemon is draining"))
        await asyncio.sleep(0.01)
        assert load.done.done()
        assert loads.under_way == []
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(intake)

    asyncio.run(run())
