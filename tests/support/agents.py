"""Agents of a fleet in processes of their own, and fetches from them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from support.daemon import PATIENCE, environment
from support.leash import leashed
from weightd_fleet.agent.addresses import AgentAddress, parse_address
from weightd_fleet.agent.agent import NodeSettings, fetching_node
from weightd_fleet.agent.fetching import FetchingNode, fetch
from weightd_fleet.agent.requests import Fetched, FetchOrder
from weightd_fleet.publishing.publish import publish
from weightd_fleet.publishing.state import PublishedState

NO_DAEMON = Path("/nonexistent/weightd.sock")


class Agent:
    """An agent on a port of the loopback. `argv` replaces `python -m weightd_fleet.agent`."""

    def __init__(
        self,
        state: Path,
        socket: Path = NO_DAEMON,
        *options: str,
        argv: tuple[str, ...] = ("-m", "weightd_fleet.agent"),
        listen: str = "127.0.0.1:0",
    ) -> None:
        self.state = PublishedState(state)
        self.process = subprocess.Popen(
            leashed(
                [sys.executable, *argv, f"--listen={listen}", f"--state-dir={state}", f"--socket={socket}", *options]
            ),
            stdout=subprocess.PIPE, text=True, env=environment(), start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("weightd agent is ready: "):
            self.kill()
            raise AssertionError(f"the agent did not start: {line!r}")
        self.address: AgentAddress = parse_address(line.rsplit(" ", 1)[1].strip())

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self._ended()

    def stop(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        assert self._ended() == 0

    def _ended(self) -> int:
        code = self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@contextlib.contextmanager
def agent(state: Path, socket: Path = NO_DAEMON, *options: str, **more: object) -> Iterator[Agent]:
    """An agent until the end of the block."""
    started = Agent(state, socket, *options, **more)  # type: ignore[arg-type]  # passed through
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.stop()


def published(state: Path, reference: Path) -> str:
    """Publish a reference on a node. Returns its name in the fleet."""
    return publish(str(reference), PublishedState(state)).digest


@dataclass
class Receiver:
    """A node that fetches, in this process. `notes` are its lines on peers that it dropped."""

    state: Path
    socket: Path = NO_DAEMON
    tls: Path | None = None
    patience: float = 30.0
    part_bytes: int = 1 << 20
    hub_cache: Path | None = None
    notes: list[str] = field(default_factory=list)

    def fetch(
        self, digest: str, *sources: AgentAddress, sink: str = "files", name: str = "", folder: Path | None = None,
        pin: bool = False,
    ) -> Fetched:  # fmt: skip
        """Fetch a checkpoint."""
        order = FetchOrder(digest, sources, sink, name, str(folder) if folder else "", pin=pin)
        with self.node() as node:
            return fetch(node, order, note=self.notes.append)

    @contextlib.contextmanager
    def node(self) -> Iterator[FetchingNode]:
        """What a fetch uses of this node."""
        settings = NodeSettings(
            str(self.state), str(self.socket), str(self.tls) if self.tls else None, patience=self.patience
        )
        with fetching_node(settings) as node:
            cache = self.hub_cache or self.state / "hub"
            yield replace(node, part_bytes=self.part_bytes, hub_cache=cache)


@contextlib.contextmanager
def folders(count: int) -> Iterator[list[Path]]:
    """State folders."""
    with tempfile.TemporaryDirectory(prefix="weightd-fleet-") as folder:
        made = [Path(folder) / f"n{number}" for number in range(count)]
        for one in made:
            os.mkdir(one)
        yield made
