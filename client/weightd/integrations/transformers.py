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

from weightd._transport.unreachable import when_reachable
from weightd.errors import (
    CapacityError,
    DaemonUnreachableError,
    DeviceMismatchError,
    FormatError,
    InvalidReferenceError,
    NotFoundError,
    PermissionDeniedError,
)
from weightd.resolve import folder_of, is_path
from weightd.torch import shared_client

from . import weight_files
from .conversion import groups_of
from .placement import STRATEGIES, device_of, one_device
from .pretrained import (
    UNSUPPORTED,
    PretrainedRequest,
    asked_dtype,
    checked_dtype,
    divert,
    load,
    load_privately,
    load_request,
    transformers,
    weights_apart,
)
from .sharing import make_private, note_left, report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightd._groups import StoredTensor
    from weightd.client import Client
    from weightd.resolve import Resolved
    from weightd.torch import Fallback

__all__ = ["from_pretrained", "install", "make_private", "report", "uninstall"]

log = logging.getLogger(__name__)

_CONFIG = transformers.utils.CONFIG_NAME
_ADAPTER = "adapter_config.json"


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
    variant: str | None = None,
    allow_copy: bool = False,
    client: Client | None = None,
    **kwargs: Any,
) -> Any:
    """A model of transformers on shared memory; `report(model)` says what of it is.

    `reference` is a folder or `org/name[@revision]` in the local Hugging Face cache, `model_class` an Auto class or
    a class of a model (default: the one that its configuration names), `client` the daemon to use (default: this
    process's own). `dtype` (or `torch_dtype`) is the stored one; another would copy every weight, and is an error
    unless `allow_copy`. Files are those of `variant`; without one, a variant is taken where the folder has no other
    weights. A `device_map` that comes to one device is as `device`. Other arguments are those of transformers'
    `from_pretrained`.
    Errors: InvalidReferenceError, NotFoundError, FormatError, CapacityError, DaemonUnreachableError,
    DeviceMismatchError, DeviceError, and whatever transformers raises.
    """
    subfolder = kwargs.pop("subfolder", None) or ""
    reference = weight_files.at_revision(reference, kwargs.pop("revision", None))
    folder = folder_of(reference) / subfolder
    place = device_of(device, kwargs.pop("device_map", None))
    dtype = asked_dtype(dtype, kwargs)
    _require_config(folder, kwargs)
    if why := _unfit(folder, kwargs):
        raise InvalidReferenceError(f"{os.fspath(reference)}: {why}; load it with transformers itself")
    if model_class is None:
        model_class = _named_class(folder)
    chosen = weight_files.named(reference, subfolder, weight_files.of_transformers(folder, variant=variant), variant)
    wanted = functools.partial(_groups, model_class, folder, kwargs)
    with (client or shared_client()).attach(chosen, device=place, groups=wanted) as attachment:
        name = os.fspath(reference)
        return load(model_class, attachment, folder, name=name, dtype=dtype, allow_copy=allow_copy, **kwargs)


def install(*, fallback: Fallback = "error", allow_copy: bool = False) -> None:
    """Let every `from_pretrained` of transformers in this process go through the store, where it can.

    It can for local checkpoints in safetensors on one device, neither quantised nor an adapter; anything else is
    transformers' own business, as before, and a warning for each checkpoint says why. A `device_map` that is a
    strategy, such as "auto", comes to one device where there is one GPU or none; what does not fit there is
    transformers' to place. Without a dtype a model is of the stored one.
    `fallback` is what to do without a daemon, or where the checkpoint does not fit: "error", "wait" or "local".
    """
    if fallback not in ("error", "wait", "local"):
        raise InvalidReferenceError(f"fallback {fallback!r}: must be 'error', 'wait' or 'local'")
    _told.clear()
    divert(functools.partial(_load_installed, _Settings(fallback, allow_copy)))


def uninstall() -> None:
    """End what `install` began. Models that were loaded stay as they are."""
    divert(None)


def _load_installed(settings: _Settings, cls: Any, path: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def privately(error: Exception) -> Any:
        why = str(error)  # a record that kept the error would keep frames, and what is loaded in them
        _warn_once(path, why)
        loaded = load_privately(cls, path, args, kwargs)
        note_left(loaded[0] if isinstance(loaded, tuple) else loaded, why)
        return loaded

    try:
        chosen, folder, device = _store_source(cls, path, kwargs)
    except _NotOursError as error:
        return privately(error)
    ours = {key: value for key, value in kwargs.items() if key not in ("device_map", "subfolder", "variant")}
    dtype = asked_dtype(ours.pop("dtype", None), ours)
    try:
        client = when_reachable(shared_client, wait=settings.fallback == "wait")
        wanted = functools.partial(_groups, cls, folder, kwargs)
        with client.attach(chosen, device=device, groups=wanted) as attachment:
            stored = checked_dtype(
                attachment, "", dtype, folder, allow_copy=settings.allow_copy, allow="install(allow_copy=True)"
            )
            return load_request(cls, PretrainedRequest(attachment, folder, os.fspath(path), "", stored), args, ours)
    except (DaemonUnreachableError, CapacityError, DeviceMismatchError) as error:
        # A strategy may place what does not fit on one device, and devices that the daemon does not serve.
        elsewhere = kwargs.get("device_map") in STRATEGIES and not isinstance(error, DaemonUnreachableError)
        if not elsewhere and (settings.fallback != "local" or isinstance(error, DeviceMismatchError)):
            raise
        return privately(error)


class _NotOursError(Exception):
    """Why a call is left to transformers."""


_told: set[str] = set()
"""Checkpoints that a warning has been given for since `install`."""


def _warn_once(path: Any, why: str) -> None:
    """Say that a checkpoint shares no memory, and why. Where there is none, there is nothing to share."""
    if path is None:
        log.info("a model is left to transformers: %s", why)
    elif str(path) not in _told:
        _told.add(str(path))
        log.warning("%s is left to transformers and shares no memory: %s", path, why)


def _store_source(cls: Any, path: Any, kwargs: dict[str, Any]) -> tuple[Resolved, Path, str]:
    """Files, folder and device of a call in unmodified code. Errors: _NotOursError."""
    if path is None:
        raise _NotOursError("it names no checkpoint")
    if any(not isinstance(kwargs.get(name), str | torch.dtype | None) for name in ("dtype", "torch_dtype")):
        raise _NotOursError("it has a dtype for each of its parts")
    subfolder = kwargs.get("subfolder") or ""
    try:
        device = one_device(kwargs.get("device_map"))
        reference = _as_transformers_reads(path, kwargs.get("revision"))
        folder = folder_of(reference) / subfolder
        variant = kwargs.get("variant")
        weights = weight_files.of_transformers(folder, variant=variant, exact=True)
        chosen = weight_files.named(reference, subfolder, weights, variant)
        _require_config(folder, kwargs)
        why = _unfit(folder, kwargs) or weights_apart(cls.config_class, folder)
    except (InvalidReferenceError, NotFoundError, FormatError, PermissionDeniedError) as error:
        raise _NotOursError(str(error)) from error
    if why:
        raise _NotOursError(why)
    return chosen, folder, device


def _as_transformers_reads(path: Any, revision: str | None) -> str | os.PathLike[str]:
    """A reference of unmodified code: a folder that is there, else a repository, which has no `@`. And no `~` is home.

    Errors: InvalidReferenceError.
    """
    if os.path.isdir(path):
        return Path(os.path.join(os.getcwd(), path))
    name = str(path)
    if isinstance(path, os.PathLike) or is_path(name) or "@" in name:
        raise InvalidReferenceError(f"{name}: neither a folder that is there nor org/name in the Hugging Face cache")
    return weight_files.at_revision(name, revision)


def _require_config(folder: Path, kwargs: dict[str, Any]) -> None:
    """Errors: NotFoundError (neither the folder nor the call says what model it is)."""
    if kwargs.get("config") is None and not any((folder / name).exists() for name in (_CONFIG, _ADAPTER)):
        raise NotFoundError(f"{folder}: has no {_CONFIG}; give the folder of a model of transformers")


def _unfit(folder: Path, kwargs: dict[str, Any]) -> str:
    """Why these arguments, or what lies in the folder, cannot go through the store; empty where they can."""
    if asked := [name for name in UNSUPPORTED if kwargs.get(name) is not None and kwargs[name] is not False]:
        return f"{asked[0]} is not supported on attached tensors"
    if kwargs.get("cache_dir") is not None or kwargs.get("force_download"):
        return "it has a cache of its own"
    if kwargs.get("use_safetensors") is False:
        return "use_safetensors=False asks for pickles, which are not loaded"
    if (folder / _ADAPTER).exists():
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
