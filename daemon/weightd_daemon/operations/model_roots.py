"""Opens files for the daemon itself: only files that really lie below `model_roots`, and never on the loop.

The operator vouches for these folders: a file whose `close` hangs would keep a thread of the daemon (decision 0001).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from weightd._references.files import OpenedReference, show
from weightd.errors import InvalidReferenceError, PermissionDeniedError
from weightd.resolve import files_of, folder_of, is_path, open_sources, path_of
from weightd_daemon.handles.attach import MAX_SOURCES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")


class PreloadFiles(NamedTuple):
    """Files that the daemon opened for a preload, which the caller closes, and their reference's name in the daemon."""

    name: str
    files: OpenedReference


def open_below(reference: str, roots: Sequence[str]) -> PreloadFiles:
    """Find and open the files of a reference. May hang where a filesystem does: see `on_thread`.

    Errors: those of weightd.resolve; PermissionDeniedError for what lies below none of the roots, be it by `..` or by
    a symlink; InvalidReferenceError for more files than a checkpoint may have.
    """
    allowed = [os.path.realpath(os.path.expanduser(root)) for root in roots]
    place = path_of(reference) if is_path(reference) else str(folder_of(reference))
    _require_below(allowed, place, os.path.realpath(place))
    resolved = files_of(reference)
    if len(resolved.sources) > MAX_SOURCES:
        raise InvalidReferenceError(
            f"{show(reference)}: has {len(resolved.sources)} files; a checkpoint may have {MAX_SOURCES}"
        )
    for source in resolved.sources:
        _require_below(allowed, str(source.path), os.path.realpath(source.path))
    files = open_sources(resolved)
    try:
        # Asked of what is open: a symlink may have been turned since.
        for source, descriptor in zip(resolved.sources, files.fds, strict=True):
            _require_below(allowed, str(source.path), os.readlink(f"/proc/self/fd/{descriptor}"))
    except BaseException:
        files.close()
        raise
    return PreloadFiles(resolved.name, files)


def _require_below(roots: Sequence[str], called: str, real: str) -> None:
    if not any(real == root or real.startswith(root.rstrip("/") + "/") for root in roots):
        leads = "" if real == called else f" is {show(real)}, which"
        raise PermissionDeniedError(
            f"{show(called)}{leads} lies below none of model_roots ({', '.join(map(show, roots))}); "
            "move it there, or add its folder"
        )


async def on_thread(work: Callable[[], T]) -> T:
    """Run what may hang on a thread of its own: one that does keeps neither the loop, nor a pool, nor the end."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: BaseException | None) -> None:
        if done.done():  # nobody waits any more
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  # None only where T is

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:  # noqa: BLE001  # carried to whoever waits
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(deliver, result, error)

    threading.Thread(target=run, daemon=True, name="weightd-files").start()
    return await done
