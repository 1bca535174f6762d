"""What makes the content of a load: a loader process that reads files, or tensors that are resident already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from weightd_daemon.core.checkpoint import Checkpoint
    from weightd_daemon.core.loading import StoreTransaction

    from .request import LoadOutcome


class LoadWork(Protocol):
    """Interface of what executes one load, and cleans up after it."""

    async def run(self, loading: StoreTransaction) -> tuple[Checkpoint, LoadOutcome]:
        """Bring the content to its seal. Errors: of the load, as its waiters hear them."""

    async def let_go(self, loading: StoreTransaction) -> None:
        """Wait until no other process has memory of the load open (law 7)."""

    async def forget(self) -> None:
        """Let go of what the load was about, little by little; last of all."""
