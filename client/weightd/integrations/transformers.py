"""transformers on shared memory: `from_pretrained` without a copy of the weights, and `install` for unmodified code.

    from weightd.integrations.transformers import from_pretrained, report
    model = from_pretrained("org/name", device="cuda:0")
    print(report(model))

Everything but the bytes is transformers' own: which class, names, tied weights, what is not in the checkpoint. It is
given attached tensors as `state_dict`, of their stored dtype, and assigns them as they are. What it makes of several
stored tensors, casts or initialises is private; the report names it and says why. Buffers are private copies.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightd.errors import (
    CapacityError,
    DaemonUnreachableError,
    FormatError,
    InvalidReferenceError,
    NotFoundError,
    PermissionDeniedError,
)
from weightd.layouts import groups
from weightd.resolve import folder_of, is_path, resolve
from weightd.torch import device_name, shared_client, torch_dtype, when_reachable

from .modules import examine, freeze, keep_report, make_buffers_private, make_private, report, stored_dtypes
from .versions import require_tested

VERSION = require_tested("transformers")

import transformers  # noqa: E402  # only a version that is known to be safe
from transformers import modeling_utils  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightd.attachment import Attachment
    from weightd.client import Client
    from weightd.layouts import Layout
    from weightd.torch import Fallback

__all__ = ["from_pretrained", "install", "make_private", "report", "uninstall"]

log = logging.getLogger(__name__)

_UNSUPPORTED = (
    "adapter_kwargs", "device_mesh", "distributed_config", "from_flax", "from_tf", "gguf_file", "max_memory",
    "offload_folder", "quantization_config", "state_dict", "tp_plan", "tp_size", "variant",
)  # fmt: skip
"""Arguments of transformers' `from_pretrained` that ask for what attached tensors cannot be."""

_LOADING = (
    "_commit_hash", "_from_auto", "_from_pipeline", "adapter_name", "attn_implementation", "cache_dir",
    "experts_implementation", "force_download", "generation_config", "ignore_mismatched_sizes", "kernel_config",
    "key_mapping", "local_files_only", "low_cpu_mem_usage", "output_loading_info", "proxies", "revision", "token",
    "trust_remote_code", "use_kernels", "use_safetensors", "weights_only",
)  # fmt: skip
"""Arguments of it that are not the configuration's."""

_FOR_THE_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


@dataclass(frozen=True, slots=True)
class _Request:
    """What the next call of `PreTrainedModel.from_pretrained` is to use."""

    attachment: Attachment
    folder: Path
    component: str
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Settings:
    fallback: Fallback
    allow_copy: bool


_request: ContextVar[_Request | None] = ContextVar("weightd_transformers_request", default=None)
_warming_up: ContextVar[bool] = ContextVar("weightd_transformers_warming_up", default=True)
_installed: _Settings | None = None


def from_pretrained(
    reference: str | os.PathLike[str],
    *,
    device: str | int | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    model_class: Any = None,
    allow_copy: bool = False,
    client: Client | None = None,
    **kwargs: Any,
) -> Any:
    """A model of transformers on shared memory; `report(model)` says what of it is.

    `reference` is a directory or `org/name[@revision]` in the local Hugging Face cache, `model_class` an Auto class or
    a class of a model (default: the one that its configuration names), `client` the daemon to use (default: this
    process's own). `dtype` is the stored one; another would copy every weight, and is an error unless `allow_copy`.
    Other arguments are those of transformers' `from_pretrained`.
    Errors: InvalidReferenceError, NotFoundError, FormatError, CapacityError, DaemonUnreachableError,
    DeviceMismatchError, DeviceError, and whatever transformers raises.
    """
    folder = folder_of(reference) / (kwargs.pop("subfolder", None) or "")
    if "device_map" in kwargs:
        raise InvalidReferenceError("device_map: attached tensors are all on one device; say device=")
    if why := _unfit(folder, kwargs):
        raise InvalidReferenceError(f"{os.fspath(reference)}: {why}; load it with transformers itself")
    if model_class is None:
        model_class = _named_class(folder)
    with attached(client or shared_client(), reference, folder, device_name(device)) as attachment:
        return load(model_class, attachment, folder, dtype=dtype, allow_copy=allow_copy, **kwargs)


def load(
    model_class: Any,
    attachment: Attachment,
    folder: Path,
    *,
    component: str = "",
    dtype: str | torch.dtype | None = None,
    allow_copy: bool = False,
    **kwargs: Any,
) -> Any:
    """As `from_pretrained`, on an attachment that is there; `folder` holds the configuration of its `component`."""
    stored = checked_dtype(attachment, component, dtype, folder, allow_copy=allow_copy)
    token = _request.set(_Request(attachment, folder, component, stored))
    try:
        loaded = model_class.from_pretrained(folder, **{"local_files_only": True, **kwargs})
        if _request.get() is not None:
            raise InvalidReferenceError(
                f"{model_class.__name__} loads its weights in a way of its own; load it with transformers itself"
            )
    finally:
        _request.reset(token)
    return loaded


def install(*, fallback: Fallback = "error", allow_copy: bool = False) -> None:
    """Let every `from_pretrained` of transformers in this process go through the store, where it can.

    It can for local checkpoints in safetensors on one device (`device_map`, the CPU without), neither quantised nor an
    adapter; anything else is transformers' own business, as before. Without a dtype a model is of the stored one.
    `fallback` is what to do without a daemon, or where the checkpoint does not fit: "error", "wait" or "local".
    """
    if fallback not in ("error", "wait", "local"):
        raise InvalidReferenceError(f"fallback {fallback!r}: must be 'error', 'wait' or 'local'")
    global _installed
    _installed = _Settings(fallback, allow_copy)


def uninstall() -> None:
    """End what `install` began. Models that were loaded stay as they are."""
    global _installed
    _installed = None


# -- in transformers' place --------------------------------------------------------------------------------------------

_transformers: Any = modeling_utils  # Any: what is replaced here has types of its own
_original = _transformers.PreTrainedModel.from_pretrained.__func__
_original_warmup = _transformers.caching_allocator_warmup


@functools.wraps(_original)
def _from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
    """Every call of `PreTrainedModel.from_pretrained` comes here; most of them go on."""
    request = _request.get()
    if request is not None:
        _request.set(None)  # what the model loads in turn is not meant, and `load` sees that it was taken
        return _load(cls, request, args, kwargs)
    if _installed is not None:
        return _load_installed(cls, _installed, pretrained_model_name_or_path, args, kwargs)
    return _original(cls, pretrained_model_name_or_path, *args, **kwargs)


@functools.wraps(_original_warmup)
def _warm_up(*args: Any, **kwargs: Any) -> None:
    """It would allocate the size of the whole model on the device, for nothing, and keep it."""
    if _warming_up.get():
        _original_warmup(*args, **kwargs)


_transformers.PreTrainedModel.from_pretrained = classmethod(_from_pretrained)
_transformers.caching_allocator_warmup = _warm_up


def _load_installed(cls: Any, settings: _Settings, path: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def privately() -> Any:
        return _original(cls, path, *args, **kwargs)

    try:
        reference, folder, device = _store_source(path, kwargs)
    except _NotOursError as error:
        log.info("%s is left to transformers: %s", path, error)
        return privately()
    ours = {key: value for key, value in kwargs.items() if key not in ("device_map", "subfolder")}
    dtypes = [ours.pop(key, None) for key in ("dtype", "torch_dtype")]
    dtype = next((dtype for dtype in dtypes if dtype not in (None, "auto")), None)
    try:
        client = when_reachable(shared_client, wait=settings.fallback == "wait")
        with attached(client, reference, folder, device) as attachment:
            stored = checked_dtype(attachment, "", dtype, folder, allow_copy=settings.allow_copy)
            return _load(cls, _Request(attachment, folder, "", stored), args, ours)
    except (DaemonUnreachableError, CapacityError) as error:
        if settings.fallback != "local":
            raise
        log.warning("%s is loaded privately, it shares no memory: %s", path, error)
        return privately()


class _NotOursError(Exception):
    """Why a call is left to transformers."""


def _store_source(path: Any, kwargs: dict[str, Any]) -> tuple[str | Path, Path, str]:
    """Reference, folder and device of a call in unmodified code. Errors: _NotOursError."""
    if path is None:
        raise _NotOursError("it names no checkpoint")
    if kwargs.get("cache_dir") is not None or kwargs.get("force_download"):
        raise _NotOursError("it has a cache of its own")
    revision = kwargs.get("revision")
    reference: str | Path = Path(path) if is_path(path) else f"{path}@{revision}" if revision else str(path)
    try:
        folder = folder_of(reference)
        if subfolder := kwargs.get("subfolder"):
            reference = folder = folder / subfolder
        resolve(reference)
    except (InvalidReferenceError, NotFoundError, FormatError, PermissionDeniedError) as error:
        raise _NotOursError(str(error)) from error
    if why := _unfit(folder, kwargs):
        raise _NotOursError(why)
    device_map = kwargs.get("device_map")
    if isinstance(device_map, dict):
        device_map = device_map.get("") if len(device_map) == 1 else "several devices"
    try:
        return reference, folder, device_name("cpu" if device_map is None else torch.device(device_map))
    except (RuntimeError, TypeError):
        raise _NotOursError(f"device_map {device_map!r} names no single device") from None


def _unfit(folder: Path, kwargs: dict[str, Any]) -> str:
    """Why these arguments, or what lies in the folder, cannot go through the store; empty where they can."""
    if asked := [name for name in _UNSUPPORTED if kwargs.get(name) is not None]:
        return f"{asked[0]} is not supported on attached tensors"
    if kwargs.get("use_safetensors") is False:
        return "use_safetensors=False asks for pickles, which are not loaded"
    if (folder / "adapter_config.json").exists():
        return "it is an adapter, which changes its base's weights"
    config, _ = transformers.PretrainedConfig.get_config_dict(str(folder), local_files_only=True)
    return "it is quantised, which is not supported" if config.get("quantization_config") else ""


def _named_class(folder: Path) -> Any:
    """The class that a configuration names. Errors: InvalidReferenceError."""
    config, _ = transformers.PretrainedConfig.get_config_dict(str(folder), local_files_only=True)
    for name in config.get("architectures") or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type):
            return found
    raise InvalidReferenceError(f"{folder}: config.json names no class of transformers; say model_class=")


@contextlib.contextmanager
def attached(client: Client, reference: str | os.PathLike[str], folder: Path, device: str) -> Iterator[Attachment]:
    """Attach what a reference names, loading it where it is not resident."""
    if is_path(reference):
        attachment = client.attach(folder, device=device)
    else:  # by its own name, and not by the path of its snapshot
        info = client.load(reference, device=device)
        attachment = client.attach(info.content_digest, device=info.device)
    with attachment:
        yield attachment


def checked_dtype(
    attachment: Attachment, component: str, asked: str | torch.dtype | None, folder: Path, *, allow_copy: bool
) -> torch.dtype:
    """The dtype to load as: the one that most bytes are stored in. Errors: InvalidReferenceError (another is asked)."""
    stored = [torch_dtype(name) for name in stored_dtypes(attachment, component)]
    if asked in (None, "auto"):
        return stored[0] if stored else torch.get_default_dtype()
    wanted = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if not isinstance(wanted, torch.dtype):
        raise InvalidReferenceError(f"dtype {asked!r}: torch has no such dtype")
    if stored and wanted != stored[0] and not allow_copy:
        raise InvalidReferenceError(
            f"{folder}: dtype {wanted} is asked for, but {stored[0]} is stored; casting would copy every weight: leave "
            f"dtype out, or say allow_copy=True"
        )
    return wanted


def _load(cls: Any, request: _Request, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let transformers load a class from attached tensors; then make private what must be, and report."""
    attachment = request.attachment
    config = kwargs.pop("config", None)
    loading = {name: kwargs.pop(name) for name in _LOADING if name in kwargs}
    for name in ("dtype", "torch_dtype", *_UNSUPPORTED):
        kwargs.pop(name, None)
    if not isinstance(config, transformers.PretrainedConfig):
        config, kwargs = cls.config_class.from_pretrained(
            request.folder if config is None else config, return_unused_kwargs=True, local_files_only=True, **kwargs
        )
    told = loading.pop("output_loading_info", False)
    for name in _FOR_THE_HUB:
        loading.pop(name, None)
    place = attachment.torch_device
    layout: Layout = "transformers" if _fuses(cls, config, attachment, request.component) else "stored"
    state = attachment.state_dict(request.component, layout=layout)
    warming_up = _warming_up.set(False)
    try:
        model, found = _original(
            cls, None, *args, config=config, state_dict=state, dtype=request.dtype,
            device_map=None if place == "cpu" else {"": place}, output_loading_info=True, local_files_only=True,
            **loading, **kwargs,
        )  # fmt: skip
    finally:
        _warming_up.reset(warming_up)
    model.config.name_or_path = model.name_or_path = str(request.folder)
    if layout == "transformers":
        _save_as_stored(model)
    if model.can_generate() and loading.get("generation_config") is None:
        with contextlib.suppress(OSError):  # then the model's configuration has made one
            model.generation_config = transformers.GenerationConfig.from_pretrained(request.folder)
    freeze(model, attachment)
    make_buffers_private(model, attachment)
    reasons = _Reasons(model, attachment, request.component, found, layout)
    keep_report(model, examine(model, attachment, reasons.of))
    return (model, found) if told else model


def _fuses(cls: Any, config: Any, attachment: Attachment, component: str) -> bool:
    """Whether the class has parameters that the checkpoint's tensors are to be fused into: experts, from 5.0 on."""
    if VERSION < (5, 0):
        return False
    stored = [info for info in attachment.tensors.values() if info.component == component]
    fused = tuple(f".{group.name}" for group in groups(stored) if group.parameter)
    if not fused:
        return False
    with torch.device("meta"):
        names = cls(copy.deepcopy(config)).state_dict()
    return any(f".{name}".endswith(fused) for name in names)


def _save_as_stored(model: Any) -> None:
    """Let `save_pretrained` name and take apart again what came named and fused.

    transformers undoes the conversions that a load has used, and this one has used none for that. A prefix is another
    matter: whether the checkpoint has it, only the load can know.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    def of_prefix(conversion: object) -> bool:
        return type(conversion).__name__ == "PrefixChange"

    has_prefix = any(of_prefix(used) for used in model._weight_conversions)
    known = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [one for one in known if has_prefix or not of_prefix(one)]


class _Reasons:
    """Why parameters of a model are private."""

    def __init__(
        self, model: Any, attachment: Attachment, component: str, found: dict[str, Any], layout: Layout
    ) -> None:
        self._stored = {info.name: info for info in attachment.tensors.values() if info.component == component}
        self._copied = attachment.copied(component, layout=layout)
        self._prefix = f"{model.base_model_prefix}."
        self._missing = set(found["missing_keys"])

    def of(self, name: str, parameter: torch.nn.Parameter) -> str:
        """The reason for one."""
        if name in self._missing:
            return "not in the checkpoint: transformers has initialised it"
        for stored in (name, name.removeprefix(self._prefix), self._prefix + name):
            if stored in self._copied:
                return self._copied[stored]
            info = self._stored.get(stored)
            if info is not None and torch_dtype(info.dtype) != parameter.dtype:
                return f"stored as {info.dtype}, used as {str(parameter.dtype).removeprefix('torch.')}"
            if info is not None:
                return "transformers has changed it while loading"
        return "transformers has made it of other tensors while loading"
