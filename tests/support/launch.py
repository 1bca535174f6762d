"""`python -m support.launch FLAGS serve …`: a daemon with some of its parts exchanged.

`--hello` and `--ack` (seconds) shorten the handle socket's deadlines, `--page` that of monitors, `--read` and
`--unread` those of gRPC requests and answers, `--answer` that of a GPU's driver, `--opening` that of its calls while a
GPU is opened, but for cuInit, which has `--init`; `--look` is the pause between two looks at the sockets. `--backlog`
is how many events may wait for a reader. `--loader` names hash functions of support/loader.py. `--bug` makes GetVersion
raise what no handler may raise, `--stuck` makes it block the loop for good. `--deaf` names a class of events that no
listener can take. `--nodes` is the folder of the GPUs' device files, and of what the driver says of them. `--points` is
the file that names the point at which it kills itself (support/points.py).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from support import loop_watch, points, template
from support.daemon import Daemon
from weightd_daemon import __main__ as command
from weightd_daemon.api import admission, error_mapping, grpc_server
from weightd_daemon.devices import cuda_node, driver_thread, opening_thread
from weightd_daemon.handles import handle_server
from weightd_daemon.loads.loader_process import DEFAULT_ARGV
from weightd_daemon.loads.loads import Loads
from weightd_daemon.monitoring import event_stream, http
from weightd_daemon.operations import sockets

_WAITS = "support.launch: a load has the waiter"


def launcher(
    *,
    hello: float | None = None,
    ack: float | None = None,
    page: float | None = None,
    read: float | None = None,
    answer: float | None = None,
    opening: float | None = None,
    init: float | None = None,
    unread: float | None = None,
    look: float | None = None,
    backlog: int | None = None,
    loader: str = "",
    bug: bool = False,
    stuck: bool = False,
    deaf: str = "",
    nodes: Path | None = None,
    points: Path | None = None,
) -> list[str]:
    """The `argv` of a Daemon that starts through this file."""
    given = {
        "hello": hello, "ack": ack, "page": page, "read": read, "unread": unread, "look": look, "backlog": backlog,
        "answer": answer, "opening": opening, "init": init, "nodes": nodes,
        "loader": loader or None, "points": points, "deaf": deaf or None,
    }  # fmt: skip
    flags = [f"--{key}={value}" for key, value in given.items() if value is not None]
    flags += [name for name, wanted in (("--bug", bug), ("--stuck", stuck)) if wanted]
    return [sys.executable, "-m", "support.launch", *flags]


def main() -> int:
    """Exchange the parts, then be the daemon."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--hello", type=float)
    parser.add_argument("--ack", type=float)
    parser.add_argument("--page", type=float)
    parser.add_argument("--read", type=float)
    parser.add_argument("--look", type=float)
    parser.add_argument("--unread", type=float)
    parser.add_argument("--answer", type=float)
    parser.add_argument("--opening", type=float)
    parser.add_argument("--init", type=float)
    parser.add_argument("--backlog", type=int)
    parser.add_argument("--loader")
    parser.add_argument("--bug", action="store_true")
    parser.add_argument("--stuck", action="store_true")
    parser.add_argument("--deaf")
    parser.add_argument("--nodes", type=Path)
    parser.add_argument("--points", type=Path)
    options, rest = parser.parse_known_args()
    if not options.stuck:  # whose stacks faulthandler writes: it may crash on those of a thread that runs meanwhile
        loop_watch.install()
    tell_waiters()
    if options.hello is not None:
        handle_server.HELLO_SECONDS = options.hello
    if options.ack is not None:
        handle_server.ACK_SECONDS = options.ack
    if options.page is not None:
        http.SECONDS = options.page
    if options.read is not None:
        admission.READ_SECONDS = options.read
    if options.look is not None:
        sockets.LOOK_SECONDS = options.look
    if options.nodes is not None:
        cuda_node.DEV, cuda_node.GPUS = options.nodes, options.nodes / "gpus"
    if options.answer is not None:
        driver_thread.ANSWER_SECONDS = options.answer
    if options.opening is not None:
        opening_thread.CALL_SECONDS = options.opening
    if options.init is not None:
        opening_thread.START_SECONDS = options.init
    if options.unread is not None:
        error_mapping.UNREAD_SECONDS = options.unread
    if options.backlog is not None:
        event_stream.BACKLOG = options.backlog
    if options.bug:
        grpc_server.DaemonService.GetVersion = _bug
    if options.stuck:
        grpc_server.DaemonService.GetVersion = _stuck
    if options.deaf is not None:
        from weightd_daemon.monitoring.metrics import Metrics  # needs a package that no other test of this file does

        _deafen(event_stream.MonitoringEventStream, options.deaf)
        _deafen(Metrics, options.deaf)
    if options.points is not None:
        points.install(options.points)
    own = (sys.executable, "-P", "-m", "support.loader", options.loader)
    return command.main(rest, own if options.loader else DEFAULT_ARGV)


def _deafen(listener: Any, kind: str) -> None:
    hear = listener.on_event

    def on_event(self: Any, event: object) -> None:
        if type(event).__name__ == kind:
            raise ValueError(f"{kind} is more than it can take")
        hear(self, event)

    listener.on_event = on_event


def tell_waiters() -> None:
    """Log each waiter of a load, so that a test can wait until its call has arrived (`waiters_of`)."""
    start = Loads.start

    def started(self: Loads, *arguments: Any) -> Any:
        load, waiter, begins = start(self, *arguments)
        print(f"{_WAITS} {waiter}", file=sys.stderr, flush=True)
        return load, waiter, begins

    Loads.start = started  # type: ignore[method-assign]


def waiters_of(daemon: Daemon) -> int:
    """How many loads were asked for so far that were begun or joined, of a daemon that `tell_waiters`."""
    return daemon.logged().count(_WAITS)


async def _bug(*_: object) -> None:
    raise ZeroDivisionError("a secret of the daemon")


async def _stuck(*_: object) -> None:
    print("support.launch: stuck", file=sys.stderr, flush=True)
    time.sleep(3600)  # noqa: ASYNC251  # that is the point: nothing else runs on the loop


def serve() -> None:
    """Be a daemon with the arguments of this process, to its end."""
    sys.exit(main())


if __name__ == "__main__":
    if (line := template.line_of(sys.argv[1:])) is None:
        serve()
    else:
        template.serve(line, serve, ())
