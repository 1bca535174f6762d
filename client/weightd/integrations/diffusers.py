"""Diffusers on shared memory: pipelines and single models without a copy of their weights.

    from weightd.integrations.diffusers import from_pretrained, report
    pipeline = from_pretrained("org/name", device="cuda:0")
    print(report(pipeline))

Components with weights are made without memory, get attached tensors assigned, and are handed to the pipeline's class;
schedulers, tokenizers and the like are diffusers' own business. What two pipelines have in common is in memory once.
Weights keep the dtype they are stored in. Buffers are private copies. `fuse_lora`, which writes into weights, is
refused until `make_private` has given the component memory of its own.
"""

from __future__ import annotations

import json
import logging
import os
import weakref
from typing import TYPE_CHECKING, Any

import torch

from weightd.errors import FormatError, InvalidReferenceError
from weightd.resolve import folder_of
from weightd.torch import device_name, shared_client

from . import modules
from .modules import CopiedTensor, SharingReport, is_shared, make_private
from .transformers import attached, checked_dtype
from .transformers import load as load_with_transformers
from .versions import require_tested

VERSION = require_tested("diffusers")

import diffusers  # noqa: E402  # only a version that is known to be safe
import transformers  # noqa: E402
from accelerate import init_empty_weights  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

    from weightd.attachment import Attachment
    from weightd.client import Client

__all__ = ["from_pretrained", "make_private", "report"]

log = logging.getLogger(__name__)

_INDEX = "model_index.json"
_WRITERS = ("fuse_lora", "unfuse_lora")
"""Methods of models and pipelines that write into weights."""


def from_pretrained(
    reference: str | os.PathLike[str],
    *,
    device: str | int | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    allow_copy: bool = False,
    client: Client | None = None,
    **kwargs: Any,
) -> Any:
    """A pipeline of diffusers, or a single model, on shared memory; `report` says what of it is.

    `reference` is a directory or `org/name[@revision]` in the local Hugging Face cache; with `subfolder` one component
    of a pipeline. `client` is the daemon to use (default: this process's own). `dtype` is the stored one; another would
    copy every weight, and is an error unless `allow_copy`. A component that is given as an argument is taken as it is,
    and other arguments are those of the `from_pretrained` of diffusers' pipelines.
    Errors: InvalidReferenceError, NotFoundError (a component is missing), FormatError, CapacityError,
    DaemonUnreachableError, DeviceMismatchError, DeviceError, and whatever diffusers raises.
    """
    folder = folder_of(reference) / (kwargs.pop("subfolder", None) or "")
    for name in ("torch_dtype", "device_map", "quantization_config", "variant"):
        if kwargs.get(name) is not None:
            said = {"torch_dtype": "; say dtype=", "device_map": "; say device="}.get(name, "")
            raise InvalidReferenceError(f"{name} is not supported on attached tensors{said}")
    with attached(client or shared_client(), reference, folder, device_name(device)) as attachment:
        if (folder / _INDEX).exists():
            return _pipeline(attachment, folder, dtype, allow_copy, kwargs)
        if kwargs:
            raise InvalidReferenceError(f"{folder}: is a single model, which takes no {', '.join(sorted(kwargs))}")
        config = _read_json(folder / "config.json")
        return _model(_class_named("diffusers", config.get("_class_name")), attachment, folder, "", dtype, allow_copy)


def report(loaded: Any) -> SharingReport:
    """What a model, or all components of a pipeline, share. Errors: InvalidReferenceError (it came from elsewhere)."""
    if isinstance(loaded, torch.nn.Module):
        return modules.report(loaded)
    found = {name: modules.report(part) for name, part in _parts(loaded).items() if is_shared(part)}
    if not found:
        raise InvalidReferenceError(f"{type(loaded).__name__} was not loaded through weightd, or is private now")

    def all_of(kind: str) -> tuple[CopiedTensor, ...]:
        return tuple(one._replace(name=f"{name}.{one.name}") for name in found for one in getattr(found[name], kind))

    return SharingReport(sum(part.shared_bytes for part in found.values()), all_of("copied"), all_of("buffers"))


# -- inside ------------------------------------------------------------------------------------------------------------


def _pipeline(
    attachment: Attachment, folder: Path, dtype: str | torch.dtype | None, allow_copy: bool, kwargs: dict[str, Any]
) -> Any:
    made: dict[str, Any] = {}
    for name, value in _read_json(folder / _INDEX).items():
        if name in kwargs or name not in attachment.components or not isinstance(value, list) or len(value) != 2:
            continue
        cls = _class_named(*value)
        if issubclass(cls, transformers.PreTrainedModel):
            made[name] = load_with_transformers(
                cls, attachment, folder / name, component=name, dtype=dtype, allow_copy=allow_copy
            )
        elif issubclass(cls, diffusers.ModelMixin):
            made[name] = _model(cls, attachment, folder / name, name, dtype, allow_copy)
        else:
            log.warning("%s: component %s (%s) is left to diffusers: it shares no memory", folder, name, cls.__name__)
    load: Any = diffusers.DiffusionPipeline.from_pretrained  # Any: it has no types
    pipeline = load(folder, **{"local_files_only": True, **made, **kwargs})
    _refuse_writers(pipeline)
    return pipeline


def _parts(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def _model(
    cls: Any,
    attachment: Attachment,
    folder: Path,
    component: str,
    dtype: str | torch.dtype | None,
    allow_copy: bool,
) -> Any:
    """A model of diffusers with attached tensors for parameters."""
    wanted = checked_dtype(attachment, component, dtype, folder, allow_copy=allow_copy)
    with init_empty_weights(include_buffers=False):  # buffers that no checkpoint has are computed
        model = cls.from_config(cls.load_config(folder, local_files_only=True))
    state = attachment.state_dict(component)
    model._fix_state_dict_keys_on_load(state)  # names of old attention blocks; there is no public way to ask for it
    found = modules.assign(model, state, attachment, strict=False)
    ignored = cls._keys_to_ignore_on_load_unexpected or ()
    if found.missing_keys:
        raise FormatError(f"{folder}: the checkpoint lacks {found.missing_keys[0]!r}, which {cls.__name__} has")
    if unexpected := [key for key in found.unexpected_keys if not any(one in key for one in ignored)]:
        log.warning(
            "%s: %s has no use for %d tensors, such as %s", folder, cls.__name__, len(unexpected), unexpected[0]
        )
    reasons = _cast(model, None if dtype is None else wanted)
    model.to(attachment.torch_device)  # buffers, and what has been cast; what is attached is there
    model.register_to_config(_name_or_path=str(folder))
    model.eval()
    modules.keep_report(
        model, modules.examine(model, attachment, lambda name, _: reasons.get(name, "changed by diffusers"))
    )
    _refuse_writers(model)
    return model


def _cast(model: Any, dtype: torch.dtype | None) -> dict[str, str]:
    """Cast what diffusers keeps in float32, and everything else to `dtype` where one is asked for: name -> why."""
    reasons: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        kept = any(part in name.split(".") for part in model._keep_in_fp32_modules or ())
        wanted = torch.float32 if kept else dtype
        if wanted is not None and parameter.is_floating_point() and parameter.dtype != wanted:
            reasons[name] = f"diffusers keeps it in {wanted}" if kept else f"{wanted} was asked for"
            parameter.data = parameter.data.to(wanted)
    return reasons


def _refuse_writers(loaded: Any) -> None:
    """Let a model or pipeline refuse to write into weights as long as they are shared."""
    owner = weakref.ref(loaded)  # a cycle would keep its memory until the next garbage collection
    for name in _WRITERS:
        if hasattr(type(loaded), name):
            loaded.__dict__[name] = _guarded(name, owner)


def _guarded(name: str, owner: weakref.ref[Any]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        loaded: Any = owner()  # it is there, for this is called on it
        parts = [loaded]
        if not isinstance(loaded, torch.nn.Module):
            asked = kwargs.get("components") or (args[0] if args else None) or loaded._lora_loadable_modules
            parts = [part for component, part in _parts(loaded).items() if component in asked]
        if shared := [part for part in parts if is_shared(part)]:
            raise InvalidReferenceError(
                f"{name} writes into weights, and those of {type(shared[0]).__name__} are shared with other processes: "
                f"use the adapter unfused, or call weightd.integrations.diffusers.make_private on that model first"
            )
        return getattr(type(loaded), name)(loaded, *args, **kwargs)

    return call


def _class_named(library: Any, name: Any) -> Any:
    """A class of diffusers or transformers. Errors: FormatError (a pipeline's index may say anything)."""
    places = {"diffusers": diffusers, "transformers": transformers}
    place = places.get(library) or getattr(diffusers.pipelines, str(library), None)
    found = getattr(place, str(name), None)
    if not isinstance(found, type):
        raise FormatError(
            f"{_INDEX} names class {name!r} of {library!r}, which diffusers {diffusers.__version__} lacks"
        )
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise FormatError(f"{path}: not a JSON object; download it again")
    return document
