"""Follow the agents of a fleet's nodes: one connection each, on a thread each, for as long as the node is a member."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

from weightd.errors import FormatError, InvalidReferenceError, NotFoundError, WeightdError
from weightd_fleet.agent.addresses import AgentAddress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from weightd_fleet.agent.inventory import NodeInventory
    from weightd_fleet.agent.peer import Peer

    from .fleet_state import FleetState
    from .members import FleetMember

log = logging.getLogger(__name__)

_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 2.0
"""Between calls to an agent that does not answer."""


class AgentFollower:
    """Tells a FleetState what one node's agent says, from a thread of its own, until it is stopped."""

    def __init__(
        self, node: str, address: AgentAddress, connect: Callable[[AgentAddress], Peer], state: FleetState
    ) -> None:
        self._node = node
        self._address = address
        self._connect = connect
        self._state = state
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._peer: Peer | None = None
        self._unusable: set[str] = set()
        threading.Thread(target=self._run, name=f"follow {address}", daemon=True).start()

    def stop(self) -> None:
        """Follow no longer. The thread ends soon."""
        with self._lock:
            self._stopping.set()
            if self._peer is not None:
                self._peer.close()

    def _run(self) -> None:
        pause = _PAUSE
        while not self._stopping.is_set():
            problem = ""
            try:
                self._follow()
            except WeightdError as error:
                problem = str(error)
            except Exception as error:
                log.exception("following %s failed", self._address)
                problem = f"{self._address}: cannot be followed: {error!r}"[:1000]
            if problem and not self._stopping.is_set():
                self._state.lose(self._node, problem)
            self._stopping.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE) if problem else _PAUSE

    def _follow(self) -> None:
        with self._connect(self._address) as peer:
            with self._lock:
                if self._stopping.is_set():
                    return
                self._peer = peer
            try:
                for inventory in peer.follow():
                    self._take(inventory, peer)
            finally:
                with self._lock:
                    self._peer = None

    def _take(self, inventory: NodeInventory, peer: Peer) -> None:
        for name in sorted(self._state.lacks(inventory) - self._unusable):
            try:
                self._state.add(peer.manifest(name))
            except NotFoundError:
                log.info("%s: is no longer on %s", name, self._address)
            except (FormatError, InvalidReferenceError) as error:
                self._unusable.add(name)  # not asked for again: a manifest never changes
                log.warning("%s: left out of the catalogue: %s", name, error)
        self._state.take(self._node, inventory)


class FollowedMembers:
    """The followers of all members of a fleet. `port` is where each node's agent is looked for."""

    def __init__(self, state: FleetState, connect: Callable[[AgentAddress], Peer], port: int) -> None:
        self._state = state
        self._connect = connect
        self._port = port
        self._followers: dict[FleetMember, AgentFollower] = {}

    def update(self, members: Iterable[FleetMember]) -> set[str]:
        """Follow these members and no others. Returns the nodes that have left."""
        wanted = set(members)
        gone = {member for member in self._followers if member not in wanted}
        for member in gone:
            self._followers.pop(member).stop()
            self._state.leave(member.node)
        for member in wanted - self._followers.keys():
            address = AgentAddress(member.host, self._port)
            self._state.join(member, str(address))
            self._followers[member] = AgentFollower(member.node, address, self._connect, self._state)
        return {member.node for member in gone}
