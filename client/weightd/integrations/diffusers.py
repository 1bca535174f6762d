"""Diffusers on shared memory: pipelines and single models without a copy of their weights.

    from weightd.integrations.diffusers import from_pretrained, report
    pipeline = from_pretrained("org/name", device="cuda:0")
    print(report(pipeline))

Components with weights are made without memory, get attached tensors assigned, and are handed to the pipeline's class;
schedulers, tokenizers and the like are diffusers' own business. What two pipelines have in common is in memory once.
Weights keep the dtype they are stored in. Buffers are private copies. What writes into weights (`fuse_lora`,
`load_state_dict`) is refused until `make_private` has given the model memory of its own.
"""

from __future__ import annotations

import json
import logging
import os
import re
from typing import TYPE_CHECKING, Any

import torch

from weightd.errors import FormatError, InvalidReferenceError, NotFoundError
from weightd.resolve import folder_of
from weightd.torch import device_name, shared_client

from . import files, modules
from .modules import CopiedTensor, SharingReport, is_shared, make_private
from .pretrained import checked_dtype
from .pretrained import load as load_with_transformers
from .versions import require_tested

VERSION = require_tested("diffusers")

import diffusers  # noqa: E402  # only a version that is known to be safe
import transformers  # noqa: E402
from accelerate import init_empty_weights  # noqa: E402
from diffusers.loaders.lora_base import LoraBaseMixin  # noqa: E402
from diffusers.loaders.peft import PeftAdapterMixin  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

    from weightd.attachment import Attachment
    from weightd.client import Client

__all__ = ["from_pretrained", "make_private", "report"]

log = logging.getLogger(__name__)

_INDEX = "model_index.json"
_WEIGHTS = "*.safetensors"


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
    subfolder = kwargs.pop("subfolder", None) or ""
    folder = folder_of(reference) / subfolder
    for name in ("torch_dtype", "device_map", "quantization_config", "variant"):
        if kwargs.get(name) is not None:
            said = {"torch_dtype": "; say dtype=", "device_map": "; say device="}.get(name, "")
            raise InvalidReferenceError(f"{name} is not supported on attached tensors{said}")
    is_pipeline = (folder / _INDEX).exists()
    if kwargs and not is_pipeline:
        raise InvalidReferenceError(f"{folder}: is a single model, which takes no {', '.join(sorted(kwargs))}")
    classes = _components(folder, kwargs) if is_pipeline else {"": _class_of(folder)}
    paths = [path for name, cls in classes.items() for path in _files_of(cls)(folder / name, name)]
    chosen = files.named(reference, subfolder, tuple(paths))
    if not classes:
        raise InvalidReferenceError(f"{folder}: no component has weights that could be shared; load it with diffusers")
    made: dict[str, Any] = {}
    with (client or shared_client()).attach(chosen, device=device_name(device)) as attachment:
        for name, cls in classes.items():
            make = _model if issubclass(cls, diffusers.ModelMixin) else load_with_transformers
            place = folder / name if name else folder
            called = str(place) if name else os.fspath(reference)
            made[name] = make(cls, attachment, place, name=called, component=name, dtype=dtype, allow_copy=allow_copy)
    if not is_pipeline:
        return made[""]
    load: Any = diffusers.DiffusionPipeline.from_pretrained  # Any: it has no types
    return load(folder, **{"local_files_only": True, **made, **kwargs})


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


def _components(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The classes of a pipeline's components that come from shared memory: those with weights, and not `given`.

    Errors: NotFoundError (its folder is missing), FormatError.
    """
    found: dict[str, Any] = {}
    for name, value in _read_json(folder / _INDEX).items():
        if name in given or not isinstance(value, list) or len(value) != 2 or value[0] is None:
            continue
        if not (folder / name).is_dir():
            raise NotFoundError(f"{folder / _INDEX}: lists component {name!r}, but there is no such folder beside it")
        cls = _class_named(*value)
        if not issubclass(cls, torch.nn.Module):
            continue
        if issubclass(cls, transformers.PreTrainedModel | diffusers.ModelMixin) and any((folder / name).glob(_WEIGHTS)):
            found[name] = cls
        else:
            log.warning("%s: component %s (%s) is left to diffusers: it shares no memory", folder, name, cls.__name__)
    return found


def _files_of(cls: Any) -> Any:
    """The rule by which a component's files are chosen."""
    return files.of_transformers if issubclass(cls, transformers.PreTrainedModel) else files.of_diffusers


def _class_of(folder: Path) -> Any:
    """The class of a single model. Errors: FormatError."""
    cls = _class_named("diffusers", _read_json(folder / "config.json").get("_class_name"))
    if not issubclass(cls, diffusers.ModelMixin):
        raise FormatError(f"{folder}: config.json names {cls.__name__}, which is no model of diffusers")
    return cls


def _parts(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def _model(
    cls: Any,
    attachment: Attachment,
    folder: Path,
    *,
    name: str,
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
    computed = {buffer for buffer, _ in model.named_buffers()}
    found = modules.assign(model, state, attachment, strict=False)
    if missing := [key for key in found.missing_keys if key not in computed]:
        raise FormatError(f"{folder}: the checkpoint lacks {missing[0]!r}, which {cls.__name__} has")
    ignored = cls._keys_to_ignore_on_load_unexpected or ()
    if unexpected := [key for key in found.unexpected_keys if not any(re.search(one, key) for one in ignored)]:
        log.warning("%s: %s has no use for %d tensors, as %s", folder, cls.__name__, len(unexpected), unexpected[0])
    reasons = _cast(model, None if dtype is None else wanted)
    model.to(attachment.torch_device)  # buffers, and what has been cast; what is attached is there
    model.register_to_config(_name_or_path=name)
    model.eval()
    explain = reasons.get
    modules.keep_report(model, modules.examine(model, attachment, lambda one, _: explain(one, "changed by diffusers")))
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


def _fused(pipeline: Any, components: Any = None, *_: Any, **__: Any) -> list[torch.nn.Module]:
    """What a pipeline's `fuse_lora` writes to."""
    return [part for name, part in _parts(pipeline).items() if name in (components or ())]


modules.refuse_while_shared(diffusers.ModelMixin, "load_state_dict", modules.loaded_in_place)
modules.refuse_while_shared(PeftAdapterMixin, "fuse_lora", lambda model, *_, **__: [model])
modules.refuse_while_shared(LoraBaseMixin, "fuse_lora", _fused)


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
