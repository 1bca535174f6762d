"""What extents and tensors of a page refer to: who uses them, and what the checkpoints are called."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightd._proto.v1 import inspection_pb2
    from weightd_daemon.core.catalog import Catalog
    from weightd_daemon.core.checkpoint import Checkpoint, CheckpointKey
    from weightd_daemon.core.sharing import BlobUsers


class PageUsers:
    """Fills `users` and `checkpoints` of a page with what its rows refer to, each once."""

    def __init__(
        self, catalog: Catalog, page: inspection_pb2.GetMapResponse | inspection_pb2.ListTensorsResponse
    ) -> None:
        self._catalog = catalog
        self._page = page
        self._sets: dict[BlobUsers | None, int] = {}
        self._lists: dict[tuple[int, ...], int] = {}
        self._checkpoints: dict[CheckpointKey, int] = {}
        self.named = 0
        """How many checkpoints all of its users name: most of what the page takes, where many share much."""

    def index(self, users: BlobUsers | None) -> int:
        """The index of a set of users in `users`; None is nobody. Sets of the same checkpoints have one index."""
        index = self._sets.get(users)
        if index is None:
            checkpoints = sorted(self._checkpoint(one) for one in (users.checkpoints() if users is not None else ()))
            index = self._lists.setdefault(tuple(checkpoints), len(self._lists))
            if index == len(self._page.users):
                self._page.users.add(checkpoints=checkpoints)
            self._sets[users] = index
            self.named += len(checkpoints)
        return index

    def _checkpoint(self, checkpoint: Checkpoint) -> int:
        index = self._checkpoints.get(checkpoint.key)
        if index is None:
            index = self._checkpoints[checkpoint.key] = len(self._checkpoints)
            name = self._catalog.name(checkpoint)
            self._page.checkpoints.add(content_digest=checkpoint.key.content_digest, name=name)
        return index
