"""Pin, unpin and remove: the question before each, the call, and what it came to in the words of the commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from weightd._sizes import size
from weightd.cli.output import device as short_device
from weightd.errors import WeightdError
from weightd.top.checkpoint_rows import CheckpointRow
from weightd.top.table import holders, listed

if TYPE_CHECKING:
    from weightd.client import Client


class CheckpointChange(NamedTuple):
    """A question, and the call that a yes leads to; it returns a sentence. Errors: those of the client's method."""

    question: Callable[[CheckpointRow], str]
    call: Callable[[Client, CheckpointRow], str]


def _place(row: CheckpointRow) -> str:
    return f"{row.name} on {short_device(row.info.device)}"


def _pin_question(row: CheckpointRow) -> str:
    return f"Pin {_place(row)}? Its {size(row.info.total_bytes)} then stay until it is unpinned."


def _unpin_question(row: CheckpointRow) -> str:
    return f"Unpin {_place(row)}? It may then be evicted when no process holds it."


def _remove_question(row: CheckpointRow) -> str:
    info = row.info
    text = f"Remove {_place(row)}? That gives back {size(info.exclusive_bytes)}"
    if info.shared_bytes:
        text += f"; {size(info.shared_bytes)} stay, since others use them, too"
    if len(info.names) > 1:
        text += f". It has the names {listed(info.names)}"
    if row.processes:
        text += f". It is held by {listed(holders(row))}, so the daemon will refuse"
    return text + "."


def _pin(client: Client, row: CheckpointRow) -> str:
    client.pin(_reference(row), row.info.device)
    return f"pinned {row.name}"


def _unpin(client: Client, row: CheckpointRow) -> str:
    found = client.unpin(_reference(row), row.info.device)
    return f"unpinned {row.name}{'; other users keep it pinned' if found.pinned else ''}"


def _remove(client: Client, row: CheckpointRow) -> str:
    return f"removed {row.name}, freed {size(client.remove(_reference(row), row.info.device))}"


def refused(error: WeightdError, row: CheckpointRow) -> str:
    """Say why a change failed in the daemon's words, with the name of the checkpoint for its digest."""
    return str(error).replace(row.info.content_digest, row.name) if row.info.content_digest else str(error)


def _reference(row: CheckpointRow) -> str:
    """Name the content that was looked at: a name may have moved since."""
    return row.info.content_digest or row.info.name


CHANGES: Mapping[str, CheckpointChange] = {
    "pin": CheckpointChange(_pin_question, _pin),
    "unpin": CheckpointChange(_unpin_question, _unpin),
    "remove": CheckpointChange(_remove_question, _remove),
}
