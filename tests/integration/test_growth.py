"""What a daemon does thousands of times in its life leaves nothing behind in its memory, counted and not weighed."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.counted_weightd_daemon import COUNTED, MemoryCount, count_of
from support.daemon import Daemon, eventually

StartDaemon = Callable[..., Daemon]
TIMES = 200
REMEMBERED_EVENTS = 1024
MOST = MemoryCount(objects=1, bytes=400)
"""What one operation may leave on average. A task or a connection that stays is ten objects; caches and tables of C
libraries grow in steps, which is why a round that is over may be followed by another."""
ROUNDS = 4


class Operations:
    """What clients and operators do all the time. Each method leaves the daemon as it was."""

    def __init__(self, daemon: Daemon, folder: Path) -> None:
        self._daemon = daemon
        self._client = daemon.connect()
        self._files = [checkpoints.write_random(folder / f"{name}.safetensors", 20, 300, name) for name in "abc"]
        self._config = folder / "weightd.toml"
        self._turn = 0
        self._client.load(self._files[0], name="a", pin=True)

    def connect(self) -> None:
        with weightd.connect(self._daemon.socket, timeout=60) as client:
            client.stats()

    def attach(self) -> None:
        self._client.attach("a").close()
        self._client.attach(self._files[0]).close()

    def pin(self) -> None:
        self._client.unpin("a")
        self._client.pin("a")

    def look(self) -> None:
        for ask in (self._client.checkpoints, self._client.stats, self._client.leases, self._client.device_map):
            ask()

    def refuse(self) -> None:
        for call in (self._client.inspect, self._client.attach, self._client.remove):
            with contextlib.suppress(weightd.NotFoundError):
                call("nobody knows it")

    def verify(self) -> None:
        self._client.verify("a")

    def move_a_name(self) -> None:
        """Of two contents that are loaded in turn one stays without a name, until it has the name again."""
        self._turn += 1
        with weightd.connect(self._daemon.socket, timeout=60) as client:
            client.load(self._files[1 + self._turn % 2], name="moved")

    def load_and_remove(self) -> None:
        with weightd.connect(self._daemon.socket, timeout=60) as client:
            client.load(self._files[1], name="gone")
        eventually(self._is_removed)

    def reload_settings(self) -> None:
        self._turn += 1
        budget = (64 + self._turn % 2) << 20
        self._config.write_text(f"budget = {budget}\n")
        os.kill(self._daemon.pid, signal.SIGHUP)
        eventually(lambda: self._client.stats().devices[0].budget_bytes == budget)

    def _is_removed(self) -> bool:
        with contextlib.suppress(weightd.InUseError):  # the client that loaded it is still leaving
            self._client.remove("gone")
            return True
        return False


@pytest.mark.slow
def test_no_operation_leaves_anything_behind(start_daemon: StartDaemon, tmp_path: Path) -> None:
    config = tmp_path / "weightd.toml"
    config.write_text(f"budget = {64 << 20}\n")
    daemon = start_daemon(argv=COUNTED, unset=("budget",), config=config, log_level="error")
    operations = Operations(daemon, tmp_path)
    for _ in range(REMEMBERED_EVENTS // 4):  # two leases begin and end each time, and the daemon remembers that
        operations.attach()
    left: dict[str, list[tuple[float, float]]] = {}

    def is_over(one: tuple[float, float]) -> bool:
        return any(number >= most for number, most in zip(one, MOST, strict=True))

    for operation in (
        operations.connect, operations.attach, operations.pin, operations.look, operations.refuse, operations.verify,
        operations.move_a_name, operations.load_and_remove, operations.reload_settings,
    ):  # fmt: skip
        rounds = left[operation.__name__] = []
        before = count_of(daemon)
        while len(rounds) < ROUNDS and (not rounds or is_over(rounds[-1])):
            for _ in range(TIMES):
                operation()
            after = count_of(daemon)
            rounds.append(((after.objects - before.objects) / TIMES, (after.bytes - before.bytes) / TIMES))
            before = after
    grown = {name: rounds for name, rounds in left.items() if is_over(rounds[-1])}
    assert not grown, f"objects and bytes that each time leaves behind, round by round: {grown}"
