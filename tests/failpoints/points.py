"""The named points, in the order in which a checkpoint passes them: what is about to be done there, and who does it."""

from __future__ import annotations

from typing import NamedTuple


class Point(NamedTuple):
    """`process` is who reaches it: daemon, loader, holder, client, fetch or agent; `deed` what a test does for that.

    It is tried on the kinds of memory that `memories` names. `error` is what the step that follows can raise, one of
    injection.ERRORS; `on_gpu` is that on a GPU, where it is another. `loses` names the actions with which the holder of
    a GPU's memory dies, and what lies on that GPU with it: docs/lifetimes.md says so. Any other loss is a failure.
    """

    name: str
    process: str
    deed: str
    what: str
    memories: tuple[str, ...] = ("host", "cuda_vmm")
    error: str = "OSError"
    on_gpu: str = ""
    loses: tuple[str, ...] = ()

    def error_on(self, memory: str) -> str:
        """What "error" raises on a kind of memory."""
        return self.error if memory == "host" else self.on_gpu or self.error


POINTS = (
    Point(
        "client.offered", "client", "load", "a client has an intake, and asks for the load",
        error="DaemonUnreachableError",
    ),  # a call of gRPC follows
    Point("client.feed", "client", "load", "a client sends the files' descriptors"),
    Point("load.job", "daemon", "load", "a loader is there, and is told the job", error="ResourceLimitError"),
    Point("loader.files", "loader", "load", "the loader has all files"),
    Point("loader.read", "loader", "load", "a piece of a file is read"),
    Point("load.segment", "daemon", "load", "a segment of host memory is made", ("host",)),
    Point("load.grant", "daemon", "load", "an extent has been granted to the load"),
    Point(
        "loader.copy", "loader", "load", "tensors are read, hashed and copied into it",
        on_gpu="DeviceError, out of memory",
    ),
    Point("load.settle", "daemon", "load", "the daemon has entered what was copied"),
    Point("loader.finish", "loader", "load", "everything is copied", error="ResourceLimitError"),
    Point("seal.manifest", "daemon", "load", "the manifest is made"),
    Point("seal.segment", "daemon", "load", "a segment is sent to the service manager"),
    Point("seal.barrier", "daemon", "load", "segments and manifest were sent, and the barrier follows"),
    Point(
        "seal.books", "daemon", "load", "all is stored, and the checkpoint becomes resident in the books",
        error="MemoryError",
    ),  # no call of the system follows
    Point("seal.sealed", "daemon", "load", "it is resident, and the root record does not have it yet"),
    Point("flip.write", "daemon", "load", "a change is written to the root record"),
    Point("flip.written", "daemon", "load", "it is written"),
    Point("attach.lock", "daemon", "load", "the lock of a lease is taken"),
    Point("attach.send", "daemon", "load", "descriptors are sent to the client"),
    Point(
        "client.received", "client", "load", "the client has them, and maps nothing yet", error="ResourceLimitError"
    ),
    Point("client.mapped", "client", "load", "the client has mapped the lease and the segments"),
    Point("evict.drop", "daemon", "evict", "a load needs room, and the evicted manifest leaves the service manager"),
    Point("evict.punch", "daemon", "evict", "it needs room: pages are punched out of a segment", ("host",)),
    Point(
        "evict.release", "daemon", "evict", "it needs room: a segment is released",
        on_gpu="DeviceError, a dead context",
    ),
    Point("evict.drop", "daemon", "remove", "a checkpoint is removed: its manifest leaves the service manager"),
    Point("evict.punch", "daemon", "remove", "it is removed: pages are punched out of a segment", ("host",)),
    Point(
        "evict.release", "daemon", "remove", "it is removed: a segment is released",
        on_gpu="DeviceError, a dead context",
    ),
    Point("restore.begin", "daemon", "restart", "a daemon takes up what is kept"),
    Point("restore.adopted", "daemon", "restart", "segments and checkpoints are in the books again, leases are not"),
    Point("restore.written", "daemon", "restart", "all is taken up, and the root record is written"),
    Point(
        "client.claim", "client", "restart", "a client tells the next daemon what it holds", error="ResourceLimitError"
    ),
    Point("compose.shared", "daemon", "compose", "the parts' tensors are found and held", error="MemoryError"),
    Point(
        "compose.seal", "daemon", "compose", "its manifest is stored, and it becomes resident in the books",
        error="MemoryError",
    ),
    Point("fetch.serve", "agent", "fetch", "another node's agent sends a blob", ("host",), error="FormatError"),
    Point("fetch.write", "fetch", "fetch", "received bytes are staged", ("host",)),
    Point("fetch.keep", "fetch", "fetch", "a verified blob is entered", ("host",)),
    Point("fetch.load", "fetch", "fetch", "a part is loaded from memory", ("host",), error="ResourceLimitError"),
    Point(
        "fetch.compose", "fetch", "fetch", "the checkpoint is composed of the parts", ("host",),
        error="ResourceLimitError",
    ),
    Point("fetch.rename", "fetch", "fetch_files", "a file that was fetched gets its name", ("host",)),
    Point(
        "holder.allocate", "holder", "load", "the holder of a GPU's memory allocates", ("cuda_ipc",),
        on_gpu="DeviceError, out of memory", loses=("kill",),
    ),
    Point(
        "holder.free", "holder", "evict", "a load needs room: the holder frees", ("cuda_ipc",),
        on_gpu="DeviceError, a dead context", loses=("error", "kill"),
    ),
    Point(
        "holder.free", "holder", "remove", "a checkpoint is removed: the holder frees", ("cuda_ipc",),
        on_gpu="DeviceError, a dead context", loses=("error", "kill"),
    ),
)  # fmt: skip
