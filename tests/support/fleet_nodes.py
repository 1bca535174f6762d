"""Nodes of a fleet without an engine: a daemon and an agent each, on loopback addresses of their own at one port."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from support.agents import Agent, published
from support.daemon import Daemon, eventually
from weightd_fleet.service.fleet_service import AgentAccess, FleetService
from weightd_fleet.service.members import FleetMember
from weightd_fleet.service.results import FleetNode

PORT = 7412


@dataclass
class FleetNodes:
    """Nodes n0, n1, … and the catalogue that follows their agents."""

    members: list[FleetMember]
    daemons: list[Daemon] = field(default_factory=list)
    agents: list[Agent] = field(default_factory=list)
    states: list[Path] = field(default_factory=list)
    service: FleetService = field(init=False)

    def node(self, number: int) -> FleetNode:
        """What the catalogue says of a node."""
        return next(node for node in self.service.nodes() if node.name == f"n{number}")

    def publish(self, number: int, path: Path, *, load: bool = True) -> str:
        """Publish a checkpoint on a node, by default load it there, too; return when the catalogue knows."""
        if load:
            with self.daemons[number].connect() as client:
                client.load(path)
        name = published(self.states[number], path)
        self.await_node(number, name, resident=load)
        return name

    def await_node(self, number: int, name: str, *, resident: bool) -> None:
        """Wait until the catalogue knows what a node serves and holds."""

        def known() -> bool:
            node = self.node(number)
            held = any(name in device.checkpoints for device in node.devices)
            return name in node.serves and held is resident

        eventually(known, what=f"n{number} to tell of {name}: {self.node(number)}")

    def start_agent(self, number: int) -> None:
        """Start a node's agent, in the place of one that has ended."""
        listen = f"{self.members[number].host}:{PORT}"
        self.agents[number] = Agent(self.states[number], self.daemons[number].socket, listen=listen)

    def empty(self) -> None:
        """Remove all checkpoints from the daemons, and all that was published; return when the catalogue knows."""
        for daemon, state in zip(self.daemons, self.states, strict=True):
            shutil.rmtree(state / "manifests", ignore_errors=True)
            with daemon.connect() as client:
                for checkpoint in client.checkpoints():
                    client.remove(checkpoint.content_digest)
        eventually(lambda: not self.service.checkpoints())


@contextlib.contextmanager
def fleet_nodes(folder: Path, budgets: list[str], patience: float = 30.0) -> Iterator[FleetNodes]:
    """Nodes with these budgets, and one more without an agent, until the end of the block."""
    network = f"127.{100 + os.getpid() // 250 % 100}.{1 + os.getpid() % 250}"
    members = [
        FleetMember(f"{number}{'f' * 15}", f"n{number}", f"{network}.{3 + number}")
        for number in range(len(budgets) + 1)
    ]
    with contextlib.ExitStack() as stack:
        nodes = FleetNodes(members)
        for number, budget in enumerate(budgets):
            nodes.daemons.append(Daemon(budget=budget))
            stack.callback(nodes.daemons[number].close, check=True)
            nodes.states.append(folder / f"state-{number}")
            nodes.states[number].mkdir()
            nodes.agents.append(
                Agent(
                    nodes.states[number], nodes.daemons[number].socket,
                    listen=f"{members[number].host}:{PORT}",
                )
            )  # fmt: skip
            stack.callback(lambda number=number: nodes.agents[number].stop())
        nodes.service = FleetService(AgentAccess(PORT, "", patience), "head")
        stack.callback(nodes.service.close)
        nodes.service.update(members)
        eventually(lambda: nodes.service.stats().live_nodes == len(budgets))
        yield nodes
