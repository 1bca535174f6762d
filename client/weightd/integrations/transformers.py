"""transformers on shared memory: `from_pretrained` without a copy of the weights, and `install` for unmodified code.

    from weightd.integrations.transformers import from_pretrained, report
    model = from_pretrained("org/name", device="cuda:0")
    print(report(model))

Everything but the bytes is transformers' own: which class, names, tied weights, what is not in the checkpoint. It is
given attached tensors as `state_dict`, of their stored dtype, and assigns them as they are. What it makes of several
stored tensors, casts or initialises is private; the report names it and says why. Buffers are private copies.
"""

from __future__ import annotations

import functools
import logging
import os
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
from weightd.resolve import folder_of, is_path
from weightd.torch import device_name, shared_client, when_reachable

from . import files
from .conversion import groups_of
from .modules import make_private, report
from .pretrained import UNSUPPORTED, Request, checked_dtype, divert, load, load_request, original, transformers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightd._groups import StoredTensor
    from weightd.client import Client
    from weightd.resolve import Resolved
    from weightd.torch import Fallback

__all__ = ["from_pretrained", "install", "make_private", "report", "uninstall"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Settings:
    fallback: Fallback
    allow_copy: bool


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
    subfolder = kwargs.pop("subfolder", None) or ""
    folder = folder_of(reference) / subfolder
    if "device_map" in kwargs:
        raise InvalidReferenceError("device_map: attached tensors are all on one device; say device=")
    if why := _unfit(folder, kwargs):
        raise InvalidReferenceError(f"{os.fspath(reference)}: {why}; load it with transformers itself")
    if model_class is None:
        model_class = _named_class(folder)
    chosen = files.named(reference, subfolder, files.of_transformers(folder))
    wanted = functools.partial(_groups, model_class, folder, kwargs)
    with (client or shared_client()).attach(chosen, device=device_name(device), groups=wanted) as attachment:
        name = os.fspath(reference)
        return load(model_class, attachment, folder, name=name, dtype=dtype, allow_copy=allow_copy, **kwargs)


def install(*, fallback: Fallback = "error", allow_copy: bool = False) -> None:
    """Let every `from_pretrained` of transformers in this process go through the store, where it can.

    It can for local checkpoints in safetensors on one device (`device_map`, the CPU without), neither quantised nor an
    adapter; anything else is transformers' own business, as before. Without a dtype a model is of the stored one.
    `fallback` is what to do without a daemon, or where the checkpoint does not fit: "error", "wait" or "local".
    """
    if fallback not in ("error", "wait", "local"):
        raise InvalidReferenceError(f"fallback {fallback!r}: must be 'error', 'wait' or 'local'")
    divert(functools.partial(_load_installed, _Settings(fallback, allow_copy)))


def uninstall() -> None:
    """End what `install` began. Models that were loaded stay as they are."""
    divert(None)


def _load_installed(settings: _Settings, cls: Any, path: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def privately() -> Any:
        return original(cls, path, *args, **kwargs)

    try:
        chosen, folder, device = _store_source(path, kwargs)
    except _NotOursError as error:
        log.info("%s is left to transformers: %s", path, error)
        return privately()
    ours = {key: value for key, value in kwargs.items() if key not in ("device_map", "subfolder")}
    dtypes = [ours.pop(key, None) for key in ("dtype", "torch_dtype")]
    dtype = next((dtype for dtype in dtypes if dtype not in (None, "auto")), None)
    try:
        client = when_reachable(shared_client, wait=settings.fallback == "wait")
        wanted = functools.partial(_groups, cls, folder, kwargs)
        with client.attach(chosen, device=device, groups=wanted) as attachment:
            stored = checked_dtype(attachment, "", dtype, folder, allow_copy=settings.allow_copy)
            return load_request(cls, Request(attachment, folder, os.fspath(path), "", stored), args, ours)
    except (DaemonUnreachableError, CapacityError) as error:
        if settings.fallback != "local":
            raise
        log.warning("%s is loaded privately, it shares no memory: %s", path, error)
        return privately()


class _NotOursError(Exception):
    """Why a call is left to transformers."""


def _store_source(path: Any, kwargs: dict[str, Any]) -> tuple[Resolved, Path, str]:
    """Files, folder and device of a call in unmodified code. Errors: _NotOursError."""
    if path is None:
        raise _NotOursError("it names no checkpoint")
    if kwargs.get("cache_dir") is not None or kwargs.get("force_download"):
        raise _NotOursError("it has a cache of its own")
    if any(not isinstance(kwargs.get(name), str | torch.dtype | None) for name in ("dtype", "torch_dtype")):
        raise _NotOursError("it has a dtype for each of its parts")
    device = _single_device(kwargs.get("device_map"))
    revision, subfolder = kwargs.get("revision"), kwargs.get("subfolder") or ""
    reference: str | Path = Path(path) if is_path(path) else f"{path}@{revision}" if revision else str(path)
    try:
        folder = folder_of(reference) / subfolder
        chosen = files.named(reference, subfolder, files.of_transformers(folder))
    except (InvalidReferenceError, NotFoundError, FormatError, PermissionDeniedError) as error:
        raise _NotOursError(str(error)) from error
    if why := _unfit(folder, kwargs):
        raise _NotOursError(why)
    return chosen, folder, device


def _single_device(device_map: Any) -> str:
    """The device that a `device_map` means. Errors: _NotOursError (several, or none of ours)."""
    named = device_map
    if isinstance(device_map, dict):
        named = device_map.get("") if len(device_map) == 1 else "several"
    try:
        device = torch.device("cpu" if named is None else named)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise _NotOursError(f"device_map {device_map!r} names no single device that could be")
    return device_name(device)


def _unfit(folder: Path, kwargs: dict[str, Any]) -> str:
    """Why these arguments, or what lies in the folder, cannot go through the store; empty where they can."""
    if asked := [name for name in UNSUPPORTED if kwargs.get(name) is not None]:
        return f"{asked[0]} is not supported on attached tensors"
    if kwargs.get("use_safetensors") is False:
        return "use_safetensors=False asks for pickles, which are not loaded"
    if (folder / "adapter_config.json").exists():
        return "it is an adapter, which changes its base's weights"
    config, _ = transformers.PretrainedConfig.get_config_dict(str(folder), local_files_only=True)
    if config.get("transformers_weights"):
        return "its configuration names a file of its own for the weights"
    return "it is quantised, which is not supported" if config.get("quantization_config") else ""


def _groups(model_class: Any, folder: Path, kwargs: dict[str, Any], stored: Sequence[StoredTensor]) -> list[Any]:
    """The tensors that should lie in a row for a class of a model; for an Auto class, for the one that was saved."""
    try:
        cls = model_class if hasattr(model_class, "config_class") else _named_class(folder)
    except InvalidReferenceError:
        return []
    config = kwargs.get("config")
    if not isinstance(config, transformers.PretrainedConfig):
        config = cls.config_class.from_pretrained(folder, local_files_only=True)
    return groups_of(cls, config, stored, key_mapping=kwargs.get("key_mapping"))


def _named_class(folder: Path) -> Any:
    """The class that a configuration names. Errors: InvalidReferenceError."""
    config, _ = transformers.PretrainedConfig.get_config_dict(str(folder), local_files_only=True)
    for name in config.get("architectures") or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type):
            return found
    raise InvalidReferenceError(f"{folder}: config.json names no class of transformers; say model_class=")
