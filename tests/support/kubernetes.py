"""What Kubernetes has to do with: an API server that kmock plays, and checkpoints that become labels of a node."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.daemon import PATIENCE
from weightd.types import CheckpointInfo

GIB = 1 << 30


def checkpoint(
    number: int, size: int = GIB, *, pinned: bool = True, named: bool = True, state: str = "resident"
) -> CheckpointInfo:
    """A checkpoint as a daemon lists it, with a content digest of its number."""
    return CheckpointInfo(
        names=(f"org/m{number}",) if named else (), content_digest="sha256:" + f"{number:064x}"[::-1],
        device="host", tensors=1, total_bytes=size, exclusive_bytes=size, shared_bytes=0, leases=0,
        pinned=pinned, loaded_at=None, last_used_at=None, state=state, owner_uid=0, owner="root",
    )  # fmt: skip


def label(number: int) -> str:
    """The label of the checkpoint with that number."""
    return "weightd.io/c-" + f"{number:064x}"[::-1][:16]


class ApiServer:
    """A server with one node, n0. `kmock` is the emulator, whose `requests` are those that came."""

    def __init__(self, kmock: Any, address: str) -> None:
        self.kmock = kmock
        self.address = address

    @property
    def labels(self) -> dict[str, str]:
        """Of the node."""
        found: dict[str, str] = self.kmock.objects["v1/nodes", None, "n0"]["metadata"]["labels"]
        return dict(found)

    def requests(self, method: str) -> list[Any]:
        """The requests with this method."""
        return [one for one in self.kmock if one.method.value.upper() == method]

    def write_kubeconfig(self, path: Path) -> Path:
        """What kubectl and the agent read to find the server. Returns its path."""
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "c",
                    "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                    "clusters": [{"name": "c", "cluster": {"server": self.address}}],
                    "users": [{"name": "u", "user": {}}],
                }
            )
        )
        return path


@contextlib.contextmanager
def api_server(labels: dict[str, str]) -> Iterator[ApiServer]:
    """An API server in a thread, until the end of the block; its node has these labels."""
    import kmock

    emulator = kmock.KubernetesEmulator()
    emulator.resources["v1/nodes"] = {
        "kind": "Node", "singular": "node", "namespaced": False, "verbs": {"get", "list", "watch", "patch"},
        "shortnames": {"no"}, "categories": set(), "subresources": {"status"},
    }  # fmt: skip
    emulator.objects["v1/nodes", None, "n0"] = {
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "n0", "labels": labels},
    }  # fmt: skip
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="kmock", daemon=True)
    thread.start()
    server = kmock.Server(emulator)

    def run(awaitable: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(awaitable, loop).result(PATIENCE)

    run(server.__aenter__())
    try:
        yield ApiServer(emulator, str(server.url).rstrip("/"))
    finally:
        run(server.__aexit__(None, None, None))
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE)
        loop.close()
