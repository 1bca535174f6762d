"""What Serve's routers in this process have done. Tests look here; the routers are those of `served_models`.

It is a module of its own because Serve copies a router's class along with the globals of its module, and imports what
lies elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.serve.request_router import PendingRequest, RequestRouter

made: list[RequestRouter] = []
"""Routers in the order in which Serve made them."""
asked_for: list[PendingRequest | None] = []
"""The request of each call for replicas, and of each repeated one."""
