"""Nodes of a fleet on Ray, all on this machine: a head, and nodes that have a daemon each, and an agent if asked for.

Each node has a loopback address of its own, which no other process of tests uses. A replica, an actor or a task finds
its node's daemon by `weightd.connect()`: WEIGHTD_SOCKET is in the environment of each node.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.agents import Agent
from support.daemon import Daemon, environment, eventually
from support.leash import leashed

AGENT_PORT = 7411
"""Where all agents listen, each on its node's address."""
START_SECONDS = 60.0
STARTS = 2
"""A start can hang for minutes, for reasons unknown: it is killed then, and tried again."""


def ray_variables(folder: Path) -> dict[str, str]:
    """What the environment of Ray's processes has beside that of other processes of tests.

    Below a folder of the test's own lie the sessions, and the address of the current cluster, which is else one for all
    users of the machine.
    """
    return {"RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


def ray_processes(folder: Path) -> list[int]:
    """All processes of Ray that have a folder in their environment."""
    mark = f"RAY_TMPDIR={folder}\0".encode()
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


class RayNode:
    """A node: its loopback address, its daemon, its agent or None, and the id by which Ray knows it."""

    def __init__(self, number: int, folder: Path, daemon: Daemon) -> None:
        self.number = number
        self.address = f"127.{_own_network()}.{3 + number}"
        self.ray_id = ""
        self.daemon = daemon
        self.state = folder / f"state-{number}"
        self.agent: Agent | None = None

    def start_agent(self) -> Agent:
        """Start its agent, or start it again."""
        self.state.mkdir(exist_ok=True)
        self.agent = Agent(self.state, self.daemon.socket, listen=f"{self.address}:{AGENT_PORT}")
        return self.agent

    def stop_agent(self) -> None:
        """Stop its agent if it runs."""
        if self.agent is not None and self.agent.process.poll() is None:
            self.agent.stop()


class RayCluster:
    """A cluster that runs, until the end of `ray_cluster`."""

    def __init__(self, folder: Path, nodes: list[RayNode]) -> None:
        self.folder = folder
        self.nodes = nodes
        self.head = f"127.{_own_network()}.2"
        self.address = ""
        self._process: subprocess.Popen[str] | None = None
        self._log = folder / "ray.log"

    def start(self) -> None:
        """Start Ray, in a process of its own; once more if it is not there in time."""
        for _ in range(STARTS):
            order = {
                "head": self.head,
                "nodes": [
                    {
                        "address": node.address,
                        "labels": {"weightd.io/node": f"n{node.number}"},
                        "variables": {"WEIGHTD_SOCKET": str(node.daemon.socket)},
                    }
                    for node in self.nodes
                ],
            }
            with self._log.open("a") as log:
                self._process = subprocess.Popen(
                    leashed([sys.executable, "-m", "support.ray_cluster", json.dumps(order)]),
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
                    env=environment() | self.variables(),
                )  # fmt: skip
            if answer := self._answer():
                self.address = answer["address"]
                for node, ray_id in zip(self.nodes, answer["nodes"], strict=True):
                    node.ray_id = ray_id
                return
            self.stop()
        raise AssertionError(f"Ray did not start within {START_SECONDS} s, {STARTS} times:\n{self._log.read_text()}")

    def kill(self, node: RayNode) -> None:
        """Kill all of Ray's processes of a node. Its daemon and agent stay."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{node.number}\n")
        self._process.stdin.flush()
        if self._answer() is None:
            raise AssertionError(f"the cluster has ended:\n{self._log.read_text()}")

    @contextlib.contextmanager
    def driver(self, **options: Any) -> Iterator[None]:
        """Have this process be a driver. `options` are those of `ray.init`."""
        import ray  # the rest of this module is imported without it

        ray.init(
            self.address, _node_ip_address=self.head, log_to_driver=False, logging_level=logging.ERROR, **options
        )  # without the address it waits for ten seconds
        try:
            yield
        finally:
            ray.shutdown()

    def variables(self) -> dict[str, str]:
        """Return `ray_variables` of this cluster."""
        return ray_variables(self.folder)

    def stop(self) -> None:
        """End Ray, by force if it takes too long."""
        if self._process is None:
            return
        process, self._process = self._process, None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20 if self.address else 0.1)
        for pid in ray_processes(self.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(START_SECONDS)
        process.stdout.close()
        eventually(lambda: not ray_processes(self.folder), what="Ray's processes to end")

    def _answer(self) -> dict[str, Any] | None:
        """The next line of the process; None if it ends, or takes too long."""
        assert self._process is not None
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], START_SECONDS)
        line = self._process.stdout.readline() if readable else ""
        return json.loads(line) if line else None


@contextlib.contextmanager
def ray_cluster(count: int = 3, *, agents: bool = True, **settings: object) -> Iterator[RayCluster]:
    """A head and so many nodes until the end of the block. `settings` are those of the daemons."""
    folder = Path(tempfile.mkdtemp(prefix="wd-"))  # short: sockets lie deep below it
    nodes: list[RayNode] = []
    cluster = RayCluster(folder, nodes)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        for number in range(count):
            daemon = Daemon(**settings)  # type: ignore[arg-type]  # passed through
            stack.callback(daemon.close, check=True)
            nodes.append(RayNode(number, folder, daemon))
            stack.callback(nodes[-1].stop_agent)
            if agents:
                nodes[-1].start_agent()
        stack.callback(cluster.stop)
        cluster.start()
        yield cluster


def _own_network() -> str:
    """Two numbers of addresses of the loopback that no other process of tests has, as long as pids stay below 64 K."""
    pid = os.getpid() % (250 * 250)
    return f"{1 + pid // 250}.{1 + pid % 250}"
