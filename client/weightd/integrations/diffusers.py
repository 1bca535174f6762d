"""diffusers on shared memory: pipelines and single models without a copy of their weights.

    from weightd.integrations.diffusers import from_pretrained, report
    pipeline = from_pretrained("org/name", device="cuda:0")
    print(report(pipeline))

Components with weights are made without memory, get attached tensors assigned, and are handed to the pipeline's class;
schedulers, tokenizers and the like are diffusers' own business. What two pipelines have in common is in memory once.
Weights keep the dtype they are stored in. Buffers are private copies. What writes into weights (`fuse_lora`,
`load_state_dict`) is refused until `make_private` has given the model memory of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from weightd._assign import assign
from weightd.errors import FormatError, InvalidReferenceError
from weightd.resolve import folder_of
from weightd.torch import shared_client

from . import sharing, weight_files
from .guards import explain_training, loaded_in_place, loading, refuse_while_shared
from .placement import device_of
from .pretrained import asked_dtype, checked_dtype, named_dtype
from .pretrained import load as load_with_transformers
from .sharing import CopiedTensor, SharingReport, make_private
from .versions import require_tested

VERSION = require_tested("diffusers")

import diffusers  # noqa: E402  # only a version that is known to be safe
from accelerate import init_empty_weights  # noqa: E402  # as above
from diffusers.loaders.lora_base import LoraBaseMixin  # noqa: E402  # as above
from diffusers.loaders.peft import PeftAdapterMixin  # noqa: E402  # as above

from . import components  # noqa: E402  # as above

if TYPE_CHECKING:
    from pathlib import Path

    from weightd.attachment import Attachment
    from weightd.client import Client

__all__ = ["from_pretrained", "make_private", "report"]

log = logging.getLogger(__name__)

_UNSUPPORTED = ("max_memory", "parallel_config", "quantization_config", "use_flashpack", "use_onnx")
"""Arguments of diffusers' `from_pretrained` that ask for what attached tensors cannot be."""

_DTYPE = "dtype" if hasattr(diffusers.utils, "_resolve_dtype") else "torch_dtype"
"""The argument of it that says the dtype: newer versions warn of the other name."""

_OF_NO_MATTER = (
    "cache_dir", "disable_mmap", "force_download", "local_files_only", "low_cpu_mem_usage", "offload_folder",
    "offload_state_dict", "proxies", "token", "use_safetensors", *_UNSUPPORTED,
)  # fmt: skip
"""Arguments of it that say how to find, fetch or read files; what they may say has been looked at."""


def from_pretrained(
    reference: str | os.PathLike[str],
    *,
    device: str | int | torch.device = "cpu",
    dtype: str | torch.dtype | Mapping[str, Any] | None = None,
    variant: str | None = None,
    allow_copy: bool = False,
    client: Client | None = None,
    **kwargs: Any,
) -> Any:
    """A pipeline of diffusers, or a single model, on shared memory; `report` says what of it is.

    `reference` is a folder or `org/name[@revision]` in the local Hugging Face cache; with `subfolder` one component of
    a pipeline. `client` is the daemon to use (default: this process's own). `dtype` (or `torch_dtype`) is the stored
    one, or a map from components to theirs; another would copy every weight, and is an error unless `allow_copy`.
    Files are those of `variant`, of components that have it; without one, a variant is taken where a component has no
    other weights. A `device_map` that comes to one device is as `device`. A component that is given as an argument is
    taken as it is, and other arguments are those of the `from_pretrained` of diffusers' pipelines.
    Errors: InvalidReferenceError, NotFoundError (a component or the variant is missing), FormatError, CapacityError,
    DaemonUnreachableError, DeviceMismatchError, DeviceError, and whatever diffusers raises.
    """
    subfolder = kwargs.pop("subfolder", None) or ""
    reference = weight_files.at_revision(reference, kwargs.pop("revision", None))
    folder = folder_of(reference) / subfolder
    place = device_of(device, kwargs.pop("device_map", None))
    dtype = asked_dtype(dtype, kwargs)
    _refuse(kwargs)
    is_pipeline = components.is_pipeline(folder)
    if is_pipeline:
        parts = components.of_pipeline(folder, kwargs, variant)
    elif unknown := sorted(set(kwargs).difference(_OF_NO_MATTER)):
        raise InvalidReferenceError(f"{folder}: is a single model, which takes no {', '.join(unknown)}")
    else:
        parts = {"": components.of_model(folder, variant)}
    chosen = weight_files.named(
        reference, subfolder, tuple(path for part in parts.values() for path in part.files), variant
    )
    if not parts:
        raise InvalidReferenceError(f"{folder}: no component has weights that could be shared; load it with diffusers")
    made: dict[str, Any] = {}
    with (client or shared_client()).attach(chosen, device=place) as attachment:
        on = attachment.torch_device
        for name, part in parts.items():
            make = _model if issubclass(part.cls, diffusers.ModelMixin) else load_with_transformers
            made[name] = make(
                part.cls,
                attachment,
                folder / name if name else folder,
                name=str(folder / name) if name else os.fspath(reference),
                component=name,
                dtype=dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, Mapping) else dtype,
                allow_copy=allow_copy,
            )
    if not is_pipeline:
        return made[""]
    load: Any = diffusers.DiffusionPipeline.from_pretrained  # Any: it has no types
    own = {"local_files_only": True, "variant": variant, _DTYPE: _dtype_of_left(dtype, made)}
    with loading():
        pipeline = load(folder, **{**made, **own, **kwargs})
    if on != "cpu":
        _move_left(_parts(pipeline), {*made, *kwargs}, on)
    return pipeline


def report(loaded: Any) -> SharingReport:
    """What a model, or all components of a pipeline, share now. Errors: InvalidReferenceError (it came from elsewhere).

    A component of a pipeline that has been left to diffusers, replaced or made private counts as private.
    """
    if isinstance(loaded, torch.nn.Module):
        return sharing.report(loaded)
    parts = _parts(loaded)
    if not any(sharing.is_loaded(part) or sharing.is_shared(part) for part in parts.values()):
        raise InvalidReferenceError(f"{type(loaded).__name__} was not loaded through weightd, or is private now")
    found = {name: sharing.look(part) for name, part in parts.items()}

    def all_of(kind: str) -> tuple[CopiedTensor, ...]:
        return tuple(one._replace(name=f"{name}.{one.name}") for name in found for one in getattr(found[name], kind))

    return SharingReport(
        sum(part.shared_bytes for part in found.values()),
        all_of("copied"),
        all_of("buffers"),
        tuple(f"{name}.{one}" for name in found for one in found[name].missing),
        all(part.writes_seen for part in found.values()),
    )


# -- inside ------------------------------------------------------------------------------------------------------------


def _refuse(kwargs: dict[str, Any]) -> None:
    """Errors: InvalidReferenceError (an argument asks for what attached tensors cannot be)."""
    if asked := [name for name in _UNSUPPORTED if kwargs.get(name)]:
        raise InvalidReferenceError(f"{asked[0]} is not supported on attached tensors")
    if kwargs.get("use_safetensors") is False:
        raise InvalidReferenceError("use_safetensors=False asks for pickles, which are not loaded")
    if kwargs.get("cache_dir") is not None or kwargs.get("force_download"):
        raise InvalidReferenceError("only the local Hugging Face cache is read: set HF_HUB_CACHE, or download first")


def _parts(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def _dtype_of_left(asked: Any, made: Mapping[str, Any]) -> Any:
    """The dtype of components that diffusers loads: what is asked for, else what most bytes of the others have.

    Errors: InvalidReferenceError (torch has no such dtype).
    """
    if isinstance(asked, Mapping):
        return {name: _dtype_of_left(one, made) for name, one in asked.items()}
    if asked not in (None, "auto"):
        return named_dtype(asked)
    sizes: Counter[torch.dtype] = Counter()
    for model in made.values():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.itemsize > 1:  # torch computes in none that is smaller
                sizes[parameter.dtype] += parameter.nbytes
    return max(sizes, key=sizes.__getitem__, default=None)


def _move_left(parts: Mapping[str, torch.nn.Module], others: Collection[str], place: str) -> None:
    """Move components that diffusers has loaded, and are in host memory, to a device; `others` stay where they are."""
    for name, part in parts.items():
        if name not in others and all(tensor.device.type == "cpu" for tensor in part.parameters()):
            part.to(place)


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
    with loading():
        config = cls.load_config(folder, local_files_only=True)
        # Buffers that no checkpoint has are computed, in the dtype that diffusers would compute them in.
        with _default_dtype(cls, wanted), init_empty_weights(include_buffers=False):
            model = cls.from_config(config)
        return _filled(model, attachment, folder, name, component, wanted, cast=dtype is not None)


@contextlib.contextmanager
def _default_dtype(cls: Any, dtype: torch.dtype) -> Iterator[None]:
    """Let torch make tensors of a dtype, as diffusers does while it makes a model."""
    if dtype.itemsize < 2:  # torch computes in none of these
        yield
        return
    before = cls._set_default_torch_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _filled(
    model: Any, attachment: Attachment, folder: Path, name: str, component: str, dtype: torch.dtype, *, cast: bool
) -> Any:
    """The model with attached tensors for parameters; with `cast` all are of that dtype, else as they are stored."""
    cls = type(model)
    state = attachment.state_dict(component)
    model._fix_state_dict_keys_on_load(state)  # names of old attention blocks; there is no public way to ask for it
    computed = {buffer for buffer, _ in model.named_buffers()}
    found = assign(model, state, attachment, strict=False)
    if missing := [key for key in found.missing_keys if key not in computed]:
        raise FormatError(f"{folder}: the checkpoint lacks {missing[0]!r}, which {cls.__name__} has")
    ignored = cls._keys_to_ignore_on_load_unexpected or ()
    if unexpected := [key for key in found.unexpected_keys if not any(re.search(one, key) for one in ignored)]:
        log.warning("%s: %s has no use for %d tensors, as %s", folder, cls.__name__, len(unexpected), unexpected[0])
    reasons = _cast(model, dtype if cast else None)
    _cast_buffers(model, state, dtype)
    model.to(attachment.torch_device)  # buffers, and what has been cast; what is attached is there
    model.register_to_config(_name_or_path=name)
    model.eval()
    explain = reasons.get
    sharing.remember(model, attachment, lambda one, _: explain(one, "changed by diffusers"), found.missing_keys)
    return model


def _cast(model: Any, dtype: torch.dtype | None) -> dict[str, str]:
    """Cast what diffusers keeps in float32, and everything else to `dtype` where one is asked for: name -> why."""
    reasons: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        kept = _is_kept(model, name)
        wanted = torch.float32 if kept else dtype
        if wanted is not None and parameter.is_floating_point() and parameter.dtype != wanted:
            reasons[name] = f"diffusers keeps it in {wanted}" if kept else f"{wanted} was asked for"
            parameter.data = parameter.data.to(wanted)
    return reasons


def _cast_buffers(model: Any, stored: Collection[str], dtype: torch.dtype) -> None:
    """Cast buffers that come from the checkpoint, as diffusers does: they are private copies anyway."""
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point():
            buffer.data = buffer.data.to(torch.float32 if _is_kept(model, name) else dtype)


def _is_kept(model: Any, name: str) -> bool:
    """Whether diffusers keeps a tensor in float32."""
    return any(part in name.split(".") for part in model._keep_in_fp32_modules or ())


def _fused(pipeline: Any, components: Any = None, *_: Any, **__: Any) -> list[torch.nn.Module]:
    """What a pipeline's `fuse_lora` writes to."""
    return [part for name, part in _parts(pipeline).items() if name in (components or ())]


refuse_while_shared(diffusers.ModelMixin, "load_state_dict", loaded_in_place)
refuse_while_shared(PeftAdapterMixin, "fuse_lora", lambda model, *_, **__: [model])
refuse_while_shared(LoraBaseMixin, "fuse_lora", _fused)
explain_training(diffusers.ModelMixin)
