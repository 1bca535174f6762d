"""Labels of a node of Kubernetes that say which checkpoints are pinned on it, so that pods can prefer the node.

The key is `weightd.io/c-` and the first 16 digits of a content digest, the value the size class of the checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from typing import TYPE_CHECKING, Final, Protocol

import weightd
from weightd.errors import WeightdError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from weightd.types import CheckpointInfo

log = logging.getLogger(__name__)

MOST_LABELS: Final = 32
"""Labels of a node. The API server sends the whole node to everybody who watches it, at each change."""
INTERVAL: Final = 30.0
"""Seconds between two looks at the daemon, and so at least between two changes of the node."""
LONGEST_DELAY: Final = 480.0
"""Seconds after which a cluster that fails is tried again at the latest."""
REREAD_SECONDS: Final = 600.0
"""Seconds after which the node's labels are read again: somebody may have removed them, or made the node anew."""
SILENCE_SECONDS: Final = 60.0
"""Seconds for which a daemon may not answer, as while it restarts, before its checkpoints count as gone."""

_PREFIX: Final = "weightd.io/c-"
_OWN: Final = re.compile(re.escape(_PREFIX) + "[0-9a-f]{16}")
_DIGITS: Final = 16
_GIB: Final = 1 << 30
_ENDING_SECONDS: Final = 1.0


class NodeError(Exception):
    """The cluster did not do what it was asked. The message is a line for the log."""


class LabelledNode(Protocol):
    """A node of a cluster. Both calls raise NodeError."""

    def labels(self) -> Mapping[str, str]:
        """All labels of the node."""

    def change(self, changes: Mapping[str, str | None]) -> None:
        """Set labels, and remove those that are None, in one request. Others stay."""


def size_class(size: int) -> str:
    """The least power of two that is at least this size, in GiB: a number, which node affinity can compare."""
    return str(1 << (max(1, -(-size // _GIB)) - 1).bit_length())


def checkpoint_labels(checkpoints: Sequence[CheckpointInfo]) -> dict[str, str]:
    """The labels of a node with these checkpoints: of those that are resident, pinned and named, the largest 32.

    Whatever can be evicted is left out: a label would be gone before a pod that prefers it is scheduled.
    """
    kept = {
        checkpoint.content_digest: checkpoint.total_bytes
        for checkpoint in checkpoints
        if checkpoint.pinned and checkpoint.names and checkpoint.state == "resident"
    }
    largest = sorted(kept, key=lambda digest: (-kept[digest], digest))[:MOST_LABELS]
    # A digest begins with "sha256:", and no label may have a colon.
    return {_PREFIX + digest.removeprefix("sha256:")[:_DIGITS]: size_class(kept[digest]) for digest in largest}


class NodeLabels:
    """Keeps the labels of a node equal to what its daemon has pinned.

    `checkpoints` asks the daemon, and raises WeightdError. No failure of the daemon or of the cluster leaves `step`.
    """

    def __init__(
        self,
        node: LabelledNode,
        checkpoints: Callable[[], Sequence[CheckpointInfo]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node = node
        self._checkpoints = checkpoints
        self._clock = clock
        self._answered_at = clock()
        self._silent = False
        self._read_at = clock()
        self._present: dict[str, str] | None = None
        self._delay = INTERVAL

    def step(self) -> float:
        """Bring the node's labels up to date. Returns the seconds until the next step, 30 or more."""
        wanted = self._wanted()
        if wanted is None:
            return INTERVAL
        try:
            self._update(wanted)
        except NodeError as error:
            self._present = None  # a request that failed may have been carried out
            if self._delay == INTERVAL:
                log.warning("labels of the node are not up to date, and are tried again: %s", error)
            self._delay = min(2 * self._delay, LONGEST_DELAY)
            return self._delay
        if self._delay > INTERVAL:
            log.info("labels of the node are up to date again")
        self._delay = INTERVAL
        return self._delay

    def _wanted(self) -> dict[str, str] | None:
        """The labels that the node should have; None while nobody knows."""
        try:
            checkpoints = self._checkpoints()
        except WeightdError as error:
            if not self._silent:
                log.warning("the daemon does not say what it has pinned: %s", error)
            self._silent = True
            return {} if self._clock() - self._answered_at >= SILENCE_SECONDS else None
        self._silent = False
        self._answered_at = self._clock()
        return checkpoint_labels(checkpoints)

    def _update(self, wanted: dict[str, str]) -> None:
        """Errors: NodeError."""
        if self._present is None or self._clock() - self._read_at >= REREAD_SECONDS:
            self._present = {key: value for key, value in self._node.labels().items() if _OWN.fullmatch(key)}
            self._read_at = self._clock()
        changes: dict[str, str | None] = dict.fromkeys(self._present.keys() - wanted.keys())
        changes |= {key: value for key, value in wanted.items() if self._present.get(key) != value}
        if changes:
            self._node.change(changes)
            self._present = wanted
            log.info("the node has %d labels of checkpoints", len(wanted))


@contextlib.contextmanager
def labelled_by_daemon(node: LabelledNode, socket: str | None, timeout: float) -> Iterator[None]:
    """Label a node by the daemon at `socket`, in a thread, until the end of the block. The labels stay.

    Whoever labels the node next corrects them: a restart of the agent does not change the node.
    """

    def checkpoints() -> Sequence[CheckpointInfo]:
        with weightd.connect(socket, timeout=timeout, read_only=True) as client:
            return client.checkpoints()

    labels = NodeLabels(node, checkpoints)
    stopping = threading.Event()

    def follow() -> None:
        delay = 0.0
        while not stopping.wait(delay):
            delay = labels.step()

    thread = threading.Thread(target=follow, name="node-labels", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(_ENDING_SECONDS)  # a request that hangs ends with the process
