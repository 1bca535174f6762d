"""What the integrations of serving engines have in common: their options, and a recorded load from files to report.

An integration says which files the engine would read, builds and loads the model with the engine's own code, and names
the parameters that the engine may write to afterwards. Nothing here knows an engine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from weightd import remembered
from weightd._references.files import ReferencedFile, in_order
from weightd._transport.unreachable import when_reachable
from weightd.binding import Binding, bind
from weightd.client import connect
from weightd.errors import CapacityError, DaemonUnreachableError, DeviceMismatchError, InvalidReferenceError
from weightd.recording import Recording
from weightd.resolve import Resolved, is_path, reference_name

from . import guards
from .sharing import SharingReport, remember, report
from .weight_files import at_revision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from weightd.attachment import Attachment
    from weightd.client import Client

NOT_REACHED: Final = (DaemonUnreachableError, CapacityError)
"""Errors for which `fallback` "local" lets an engine load by itself."""

PRIVATE_BY_OPTION: Final = "the option `private` names it"
_REPLACED: Final = "made anew by the engine after it was loaded"
_FALLBACKS: Final = ("error", "wait", "local")
_MOSTLY: Final = 0.99
"""A model of which less is shared is warned of."""


class EngineOptionError(InvalidReferenceError, ValueError):
    """An option of an engine's integration, or a setting of the engine, that cannot be."""


class LeastSharedError(InvalidReferenceError, RuntimeError):
    """Less of a model is shared than the option `require` asks for."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a server's command line says about weightd.

    `fallback` says what to do without a daemon: "error" raises, "wait" waits for one, "local" lets the engine load by
    itself, with a warning, and does so if the model does not fit, too. `private` are patterns of parameters' names that
    get memory of their own. `require` is the least share of a model's bytes that must be shared, from 0 to 1. `socket`
    is the daemon's, where it is not the one that `connect` finds.
    """

    fallback: str = "error"
    private: tuple[str, ...] = ()
    require: float = 0.0
    socket: str | None = None

    @classmethod
    def of(cls, given: object, where: str) -> EngineOptions:
        """The options of a JSON object that stood at `where`. Errors: EngineOptionError."""
        if not isinstance(given, dict):
            raise EngineOptionError(f"{where} is {given!r}: must be an object with options of weightd, {{}} for none")
        known = cls.__dataclass_fields__
        if unknown := sorted(str(name) for name in given.keys() - known.keys()):
            raise EngineOptionError(
                f"{where} has no option {', '.join(map(repr, unknown))}; weightd knows {', '.join(known)}"
            )
        fallback, private = given.get("fallback", "error"), given.get("private", ())
        require, socket = given.get("require", 0.0), given.get("socket")
        if fallback not in _FALLBACKS:
            raise EngineOptionError(f"fallback {fallback!r} in {where}: must be 'error', 'wait' or 'local'")
        private = [private] if isinstance(private, str) else private
        if not isinstance(private, list | tuple) or not all(isinstance(one, str) for one in private):
            raise EngineOptionError(f"private {private!r} in {where}: must be a list of patterns of parameters' names")
        if isinstance(require, bool) or not isinstance(require, int | float) or not 0 <= require <= 1:
            raise EngineOptionError(f"require {require!r} in {where}: must be a share from 0 to 1, such as 0.9")
        if socket is not None and not isinstance(socket, str):
            raise EngineOptionError(f"socket {socket!r} in {where}: must be a path")
        return cls(fallback, tuple(private), float(require), socket)

    def private_reason(self, name: str) -> str:
        """Why a parameter of that name is to be private; empty where it need not be."""
        return PRIVATE_BY_OPTION if any(fnmatchcase(name, pattern) for pattern in self.private) else ""


def refuse_settings(settings: object, refused: Mapping[str, tuple[object, str]], how: str) -> None:
    """Refuse an engine's settings that write to weights, or move them, after they were loaded.

    `refused` gives by name the value that does no harm, beside None, and what any other one does; `how` says how to do
    without weightd. Errors: EngineOptionError.
    """
    for name, (harmless, what) in refused.items():
        value = getattr(settings, name, harmless)
        if value is not None and value != harmless:
            raise EngineOptionError(
                f"--{name.replace('_', '-')} ({value}) {what}, and weights on weightd's memory are shared with other "
                f"processes: leave it out, or {how}"
            )


def by_quantisation(module: torch.nn.Module, shareable: Callable[[object, torch.nn.Module], str]) -> str:
    """Why parameters of a module are to be private, by the engine's method for them; empty where they need not be.

    Methods that are not known to leave weights as they are get private memory before they process them. A module
    without a method is left alone by engines. `shareable` is asked about a method and its module.
    """
    method = getattr(module, "quant_method", None)
    return "" if method is None else shareable(method, module)


def class_name(method: object) -> str:
    """The full name of an object's class: subclasses may do something else with weights."""
    return f"{type(method).__module__}.{type(method).__qualname__}"


class EngineLoad:
    """The load of one model by one engine, on a device; the order of calls is that of the methods.

    Memory may be attached before the engine measures its own: `attach` and `weights` of the same files are one
    attachment. `resident_bytes` is what it had before, of what the model uses; see `finish`.
    """

    def __init__(self, options: EngineOptions, device: str | torch.device, log: logging.Logger) -> None:
        self.options = options
        self.device = torch.device(device)
        self.resident_bytes = 0
        self.binding: Binding | None = None
        self._log = log
        self._client: Client | None = None
        self._attachments: dict[tuple[str, ...], Attachment] = {}
        self._made: dict[Attachment, list[tuple[str, torch.Tensor]]] = {}
        self._recording = Recording(self.device)

    def attach(self, files: Iterable[str | os.PathLike[str]], name: str, index: str = "") -> Attachment:
        """Attach weight files of one folder, which the engine chose for the model `name`; `index` is a file's name.

        Errors: those of `connect` and `Client.attach`, as `fallback` says; DeviceMismatchError.
        """
        paths = sorted(Path(file) for file in files)
        key = tuple(map(str, paths))
        if key not in self._attachments:
            chosen = [ReferencedFile("", path.name, path) for path in paths]
            if index and len(paths) > 1 and (paths[0].parent / index).is_file():
                chosen.append(ReferencedFile("", index, paths[0].parent / index, is_index=True))
            called = reference_name(name if not is_path(name) else Path(name))
            attachment = self._attach(Resolved(called, in_order(chosen)))
            self._attachments[key] = attachment
            self._recording.add(attachment)
        return self._attachments[key]

    def weights(
        self, files: Iterable[str | os.PathLike[str]], name: str, index: str = ""
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The stored tensors of such files, by name, as an engine reads them."""
        attachment = self.attach(files, name, index)
        made = self._made.pop(attachment, None)
        return iter(_stored(attachment) if made is None else made)

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Inside, the engine makes its model, whose parameters get no memory."""
        with guards.loading(), in_this_thread(), self._recording.building():
            yield

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Inside, the engine loads its weights, whose copies are noted instead of made."""
        # Inside, whatever makes a tensor costs a call of Python as well.
        self._made = {attachment: _stored(attachment) for attachment in self._attachments.values()}
        with guards.loading(), in_this_thread(), self._recording.loading():
            yield

    def bind(self, model: torch.nn.Module, private: Callable[[str, torch.nn.Module], str]) -> Binding:
        """Give the model's parameters their memory; those for which `private` has a reason get memory of their own.

        Errors: those of `weightd.binding.bind`.
        """

        def reason(name: str, module: torch.nn.Module) -> str:
            return self.options.private_reason(name) or private(name, module)

        self.binding = bind(model, self._recording, private=reason)
        return self.binding

    @contextlib.contextmanager
    def guarding(self) -> Iterator[None]:
        """Inside, the engine processes its weights; it may not write to those that are shared (SharedWeightsError)."""
        assert self.binding is not None
        with in_this_thread(), self._recording.guarding(self.binding.name_at):
            yield

    def finish(self, model: torch.nn.Module) -> SharingReport:
        """Say what of the model is shared, once it is processed, and let go of all but its memory.

        Errors: LeastSharedError.
        """
        assert self.binding is not None
        reasons = {one.name: one.reason for one in self.binding.parameters if one.reason}
        attachments = tuple(self._attachments.values())
        remember(
            model, attachments, lambda name, _: reasons.get(name, _REPLACED), missing=self.binding.missing, quiet=True
        )
        found = report(model)
        level = logging.WARNING if found.shared_ratio < _MOSTLY or found.missing else logging.INFO
        advice = filter(None, [remembered.remember(one, self.binding.groups) for one in attachments])
        self._log.log(level, "weightd: %s", "; ".join([f"{type(model).__name__}: {found}", *advice]))
        self.resident_bytes = sum(self._resident(one) for one in attachments)
        self.close()
        if found.shared_ratio < self.options.require:
            raise LeastSharedError(f"require {self.options.require:g}: of {type(model).__name__} only {found}")
        return found

    def close(self) -> None:
        """Let go of what only the load needed; whatever uses attached memory keeps it. More than once is fine."""
        self._made.clear()
        for attachment in self._attachments.values():
            attachment.close()
        self._attachments.clear()
        if self._client is not None:
            self._client.close()
            self._client = None

    def _attach(self, chosen: Resolved) -> Attachment:
        wait = self.options.fallback == "wait"
        if self._client is None:
            self._client = connect(self.options.socket, fallback="wait" if wait else "error")
        client, device = self._client, store_device(self.device)
        return when_reachable(lambda: client.attach(chosen, device=device, groups=remembered.groups_for), wait=wait)

    def _resident(self, attachment: Attachment) -> int:
        """Bytes that the model uses of an attachment, and that lay on the device before it was attached; never more."""
        assert self.binding is not None
        used = sum(nbytes for address, nbytes, _ in self.binding.places if attachment.holds(address, nbytes))
        loaded = attachment.loaded
        return used if loaded is None else max(0, used - (loaded.total_bytes - loaded.shared_bytes))


def reference_of(folder: str, model: str, revision: str | None) -> str:
    """What a folder with an engine's files is called: as the engine's user calls the model, where it is its folder."""
    if is_path(model):
        return model if os.path.realpath(folder) == os.path.realpath(model) else folder
    cached = os.path.join(f"models--{model.replace('/', '--')}", "snapshots", os.path.basename(folder))
    return os.fspath(at_revision(model, revision)) if folder.endswith(cached) else folder


def _stored(attachment: Attachment) -> list[tuple[str, torch.Tensor]]:
    """All tensors of an attachment by the names that they have in their files."""
    return [(key.name, attachment.tensor(key.name, key.component)) for key in attachment.tensors]


def store_device(device: torch.device) -> str:
    """What weightd calls a device of torch. Errors: DeviceMismatchError (one on which it has no memory)."""
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda" or torch.version.cuda is None:
        raise DeviceMismatchError(f"{device}: weightd has memory on the host and on NVIDIA GPUs only")
    return f"cuda:{torch.cuda.current_device() if device.index is None else device.index}"


@contextlib.contextmanager
def in_this_thread() -> Iterator[None]:
    """Inside, what this thread submits to thread pools runs at once: a recording sees the thread alone that loads.

    A copy into a parameter without memory that another thread made would be lost without a word.
    """
    thread, original = threading.get_ident(), ThreadPoolExecutor.submit

    def submit(self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if threading.get_ident() != thread:
            return original(self, fn, *args, **kwargs)
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001  # it is the future's, as in a pool
            future.set_exception(error)
        return future

    pools: Any = ThreadPoolExecutor  # Any: what is replaced here has types of its own
    pools.submit = submit
    try:
        yield
    finally:
        pools.submit = original
