"""The named points, in the order in which a checkpoint passes them: what is about to be done there, and who does it."""

from __future__ import annotations

from typing import NamedTuple


class Point(NamedTuple):
    """`process` is who reaches it: daemon, loader, holder, client, fetch or agent; `deed` what a test does for that.

    It is tried on the kinds of memory that `memories` names.
    """

    name: str
    process: str
    deed: str
    what: str
    memories: tuple[str, ...] = ("host", "cuda_vmm")


POINTS = (
    Point("client.offered", "client", "load", "a client has an intake, and asks for the load"),
    Point("client.feed", "client", "load", "a client sends the files' descriptors"),
    Point("load.job", "daemon", "load", "a loader is there, and is told the job"),
    Point("loader.files", "loader", "load", "the loader has all files"),
    Point("loader.read", "loader", "load", "a piece of a file is read"),
    Point("load.segment", "daemon", "load", "a segment of host memory is made", ("host",)),
    Point("load.grant", "daemon", "load", "an extent has been granted to the load"),
    Point("loader.copy", "loader", "load", "tensors are read, hashed and copied into it"),
    Point("load.settle", "daemon", "load", "the daemon has entered what was copied"),
    Point("loader.finish", "loader", "load", "everything is copied"),
    Point("seal.manifest", "daemon", "load", "the manifest is made"),
    Point("seal.segment", "daemon", "load", "a segment is sent to the service manager"),
    Point("seal.barrier", "daemon", "load", "segments and manifest were sent, and the barrier follows"),
    Point("seal.books", "daemon", "load", "all is stored, and the checkpoint becomes resident in the books"),
    Point("seal.sealed", "daemon", "load", "it is resident, and the root record does not have it yet"),
    Point("flip.write", "daemon", "load", "a change is written to the root record"),
    Point("flip.written", "daemon", "load", "it is written"),
    Point("attach.lock", "daemon", "load", "the lock of a lease is taken"),
    Point("attach.send", "daemon", "load", "descriptors are sent to the client"),
    Point("client.received", "client", "load", "the client has them, and maps nothing yet"),
    Point("client.mapped", "client", "load", "the client has mapped the lease and the segments"),
    Point("evict.drop", "daemon", "evict", "a manifest leaves the service manager"),
    Point("evict.punch", "daemon", "evict", "pages are punched out of a segment of host memory", ("host",)),
    Point("evict.release", "daemon", "evict", "a segment is released"),
    Point("restore.begin", "daemon", "restart", "a daemon takes up what is kept"),
    Point("restore.adopted", "daemon", "restart", "segments and checkpoints are in the books again, leases are not"),
    Point("restore.written", "daemon", "restart", "all is taken up, and the root record is written"),
    Point("client.claim", "client", "restart", "a client tells the next daemon what it holds"),
    Point("compose.shared", "daemon", "compose", "the parts' tensors are found and held"),
    Point("compose.seal", "daemon", "compose", "the manifest of the composed checkpoint is stored"),
    Point("fetch.serve", "agent", "fetch", "another node's agent sends a blob", ("host",)),
    Point("fetch.write", "fetch", "fetch", "received bytes are staged", ("host",)),
    Point("fetch.keep", "fetch", "fetch", "a verified blob is entered", ("host",)),
    Point("fetch.load", "fetch", "fetch", "a part is loaded from memory", ("host",)),
    Point("fetch.compose", "fetch", "fetch", "the checkpoint is composed of the parts", ("host",)),
    Point("fetch.rename", "fetch", "fetch_files", "a file that was fetched gets its name", ("host",)),
    Point("holder.allocate", "holder", "load", "the holder of a GPU's memory allocates", ("cuda_ipc",)),
    Point("holder.free", "holder", "evict", "the holder frees", ("cuda_ipc",)),
)
