"""The sink that is the daemon's memory: how much of a fetch is in the agent's own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("blake3")

from weightd_fleet.agent.sink_memory import MemorySink
from weightd_fleet.core.digests import blob_digest

BYTES = b"tensor" * 20_000
"""More than what is stored once for each name."""


class Blobs:
    """A blob that is there."""

    def pieces(self, digest: bytes) -> list[memoryview]:
        return [memoryview(BYTES)]


class LoadingClient:
    """Loads while somebody looks how many do so at once."""

    def __init__(self) -> None:
        self.loading = 0
        self.most = 0
        self._counting = threading.Lock()

    def load_memory(self, descriptor: int, device: str) -> Any:
        with self._counting:
            self.loading += 1
            self.most = max(self.most, self.loading)
        threading.Event().wait(0.05)  # whoever may come in as well, comes in
        with self._counting:
            self.loading -= 1
        return SimpleNamespace(content_digest="sha256:" + "0" * 64)


def test_fetches_at_once_have_one_part_in_memory() -> None:
    client: Any = LoadingClient()
    digest = blob_digest(BYTES)
    row = SimpleNamespace(digest=digest, length=len(BYTES), counts=True)
    manifest: Any = SimpleNamespace(tensors=[row], files=[], name="b3:0")
    with ThreadPoolExecutor(4) as threads:
        held: Any = set()
        sinks = [MemorySink(manifest, client, held, f"c{number}", pin=False) for number in range(4)]
        blobs: Any = Blobs()
        list(threads.map(lambda sink: sink.take({digest: len(BYTES)}, blobs), sinks))
    assert client.most == 1
