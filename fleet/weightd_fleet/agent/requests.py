"""What a fetch is asked for, and what it has brought."""

from __future__ import annotations

from typing import NamedTuple

from .addresses import AgentAddress


class FetchOrder(NamedTuple):
    """A checkpoint's name in the fleet, agents that have it, and where it is to go: "files" or "memory".

    In memory it gets `local_name`, if that is not empty, and is pinned on `pin`. Files go to `folder`; without one into
    the hub's cache if the checkpoint was published from one, otherwise to a folder of the node's state.
    """

    digest: str
    sources: tuple[AgentAddress, ...]
    sink: str
    local_name: str = ""
    folder: str = ""
    pin: bool = False


class Fetched(NamedTuple):
    """What a fetch has brought, in bytes of tensors (equal ones count once), and of frames and small files.

    `digest` is the checkpoint's name in the fleet, `name` its name here. `content_digest` is of the checkpoint in
    memory, `folder` where its files are; the other one is empty.
    """

    digest: str
    name: str
    moved_bytes: int
    local_bytes: int
    small_bytes: int
    content_digest: str = ""
    folder: str = ""
