"""What an agent finds out each second for its followers: only what has changed, and each change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import checkpoints
from support.counting import operations
from support.daemon import Daemon, eventually
from weightd_fleet.agent.inventory import NodeInventory
from weightd_fleet.agent.listing import NodeListing
from weightd_fleet.agent.resident import ResidentTensors
from weightd_fleet.publishing.publish import publish
from weightd_fleet.publishing.state import PublishedState

TENSORS = 300


class Node:
    """A listing over a real daemon, and the folders of two published checkpoints, of which "a" is resident."""

    def __init__(self, daemon: Daemon, folder: Path, resident: ResidentTensors) -> None:
        self.state = PublishedState(folder / "state")
        self.client = daemon.connect()
        self.folders = {name: folder / name for name in "ab"}
        for name, each in self.folders.items():
            checkpoints.write_random(each / "model.safetensors", TENSORS, 64, name)
        self.names = {publish(str(each), self.state).digest: name for name, each in self.folders.items()}
        self.load("a")
        self.listing = NodeListing(self.state, resident)

    def load(self, name: str) -> None:
        """Load a checkpoint that nobody holds then."""
        assert self.client.load_report(self.folders[name], detached=True) is None
        eventually(lambda: [one.state for one in self.client.checkpoints() if one.state != "resident"] == [])

    def inventory(self) -> NodeInventory:
        return self.listing.inventory(draining=False)

    def serves(self) -> str:
        """Which of the checkpoints it can serve."""
        return "".join(sorted(self.names[entry.name] for entry in self.inventory().entries))

    def whole(self) -> dict[str, tuple[bool, bool]]:
        """Which checkpoints its host memory holds whole, and whether each is pinned and firm."""
        (host,) = self.inventory().devices
        return {self.names[one.name]: (one.pinned, one.firm) for one in host.checkpoints}

    def settle(self) -> int:
        """Wait until nothing changes any more: hashing takes leases. Returns what an inventory then costs."""
        costs: list[int] = []

        def is_settled() -> bool:
            costs.append(operations(self.inventory))
            return costs[-1] < 20 * TENSORS  # decoding, comparing or listing the rows takes more

        eventually(is_settled, what=f"an inventory that looks at no row: {costs}")
        return costs[-1]


@pytest.fixture
def node(daemon: Daemon, tmp_path: Path) -> Iterator[Node]:
    with contextlib.closing(ResidentTensors(daemon.connect)) as resident:
        yield Node(daemon, tmp_path, resident)


def test_what_has_not_changed_is_not_found_out_again(node: Node) -> None:
    assert operations(node.inventory) > 100 * TENSORS
    before = node.settle()
    assert (node.serves(), node.whole()) == ("ab", {"a": (False, False)})
    node.load("b")
    eventually(lambda: set(node.whole()) == {"a", "b"})
    assert node.settle() < before + TENSORS, "it costs something for each tensor"


def test_every_change_is_seen(node: Node) -> None:
    node.settle()
    with node.client.attach(node.folders["a"]):
        assert node.whole() == {"a": (False, True)}
    eventually(lambda: node.whole() == {"a": (False, False)})
    node.client.pin(node.folders["a"])
    assert node.whole() == {"a": (True, True)}
    node.settle()
    node.folders["b"].joinpath("model.safetensors").unlink()
    assert node.serves() == "a"
    checkpoints.write_random(node.folders["b"] / "model.safetensors", TENSORS, 64, "b")
    assert node.serves() == "a", "another file, of which nobody has looked at the bytes"
    publish(str(node.folders["b"]), node.state)
    assert node.serves() == "ab"
    node.client.remove(node.folders["a"])
    assert (node.serves(), node.whole()) == ("ab", {})
    (manifest,) = [name for name, one in node.names.items() if one == "a"]
    node.state.folder.joinpath("manifests", manifest.removeprefix("b3:")).unlink()
    assert node.serves() == "b"


def test_what_only_memory_had_goes_with_the_daemon(node: Node, daemon: Daemon) -> None:
    node.settle()
    node.folders["a"].joinpath("model.safetensors").unlink()
    assert node.serves() == "ab"
    daemon.kill()
    for _ in range(2):
        told = node.inventory()
        assert "no weightd daemon" in told.problem
        assert (node.serves(), told.devices) == ("b", ())
    daemon.start()
    assert (node.serves(), node.inventory().problem) == ("b", "")
