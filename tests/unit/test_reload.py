"""SIGHUP: a change that has much to do is made in steps, between which the loop serves others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from weightd_daemon.config.settings import LoadedSettings, Settings, SettingsInForce
from weightd_daemon.operations.reload import ReloadOperation


def test_a_change_in_steps_is_made_to_its_end_before_the_next() -> None:
    before = Settings()
    changed = replace(before, books="1GiB")
    seen: list[str] = []

    def change_books(new: Settings) -> Iterator[None]:
        for step in range(3):
            seen.append(f"{new.books} {step}")
            yield

    async def run() -> None:
        async def serve() -> None:
            while True:
                seen.append("another")
                await asyncio.sleep(0)

        in_force = SettingsInForce(LoadedSettings(before, {}))
        reload = ReloadOperation(
            in_force,
            lambda: LoadedSettings(changed, {}),
            [],
            {"books": change_books},
            lambda _: seen.append("again"),
            contextlib.nullcontext,
        )
        serving = asyncio.create_task(serve())
        await reload._reload()
        serving.cancel()

    asyncio.run(run())
    made = [at for at, what in enumerate(seen) if what != "another"]
    assert [seen[at] for at in made] == ["1GiB 0", "1GiB 1", "1GiB 2", "again"]
    assert all(after > at + 1 for at, after in pairwise(made)), "others had their turn"
