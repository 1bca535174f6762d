"""Call transformers' own `from_pretrained` with attached tensors.

`PreTrainedModel.from_pretrained` is replaced once, by a function that passes every call on but those that are meant for
us: by `load`, which says so in a context variable, or by `divert`, which sends all calls to somebody who knows what to
do with them (`weightd.integrations.transformers.install`). See docs/decisions/0012.
"""

from __future__ import annotations

import contextlib
import functools
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightd._assign import freeze, make_buffers_private
from weightd._tensors import torch_dtype
from weightd.errors import InvalidReferenceError

from .fusing import TorchFusionMode
from .guards import explain_training, loaded_in_place, loading, refuse_while_shared
from .sharing import remember
from .versions import require_tested

VERSION = require_tested("transformers")

import transformers as transformers  # noqa: E402  # only a safe version; exported
from transformers import modeling_utils  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from weightd.attachment import Attachment

UNSUPPORTED = (
    "adapter_kwargs", "device_mesh", "distributed_config", "from_flax", "from_tf", "gguf_file", "max_memory",
    "quantization_config", "state_dict", "tp_plan", "tp_size",
)  # fmt: skip
"""Arguments of transformers' `from_pretrained` that ask for what attached tensors cannot be."""

_LOADING = (
    "_commit_hash", "_from_auto", "_from_pipeline", "adapter_name", "attn_implementation", "cache_dir",
    "experts_implementation", "force_download", "generation_config", "ignore_mismatched_sizes", "kernel_config",
    "key_mapping", "local_files_only", "low_cpu_mem_usage", "offload_buffers", "offload_folder",
    "offload_state_dict", "output_loading_info", "proxies", "revision", "token",
    "trust_remote_code", "use_kernels", "use_safetensors", "weights_only",
)  # fmt: skip
"""Arguments of it that are not the configuration's."""

_COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that a model as a whole can have."""

_FOR_THE_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


@dataclass(frozen=True, slots=True)
class PretrainedRequest:
    """What the next call of `PreTrainedModel.from_pretrained` is to use; `name` is what the model is to be called."""

    attachment: Attachment
    folder: Path
    name: str
    component: str
    dtype: torch.dtype


_request: ContextVar[PretrainedRequest | None] = ContextVar("weightd_transformers_request", default=None)
_warming_up: ContextVar[bool] = ContextVar("weightd_transformers_warming_up", default=True)
_diverted: Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any] | None = None


def load(
    model_class: Any,
    attachment: Attachment,
    folder: Path,
    *,
    name: str,
    component: str = "",
    dtype: str | torch.dtype | None = None,
    allow_copy: bool = False,
    **kwargs: Any,
) -> Any:
    """As `from_pretrained`, on an attachment that is there; `folder` holds the configuration of its `component`."""
    stored = checked_dtype(attachment, component, dtype, folder, allow_copy=allow_copy)
    token = _request.set(PretrainedRequest(attachment, folder, name, component, stored))
    try:
        loaded = model_class.from_pretrained(folder, **{"local_files_only": True, **kwargs})
        if _request.get() is not None:
            raise InvalidReferenceError(
                f"{model_class.__name__} loads its weights in a way of its own; load it with transformers itself"
            )
    finally:
        _request.reset(token)
    return loaded


def divert(receiver: Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any] | None) -> None:
    """Send every call that is not ours to `receiver`, as (class, path, arguments, keywords); None: to transformers."""
    global _diverted
    _diverted = receiver


# -- in transformers' place --------------------------------------------------------------------------------------------

_transformers: Any = modeling_utils  # Any: what is replaced here has types of its own
original = _transformers.PreTrainedModel.from_pretrained.__func__
_original_warmup = _transformers.caching_allocator_warmup


@functools.wraps(original)
def _from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
    """Every call of `PreTrainedModel.from_pretrained` comes here; most of them go on."""
    request = _request.get()
    if request is not None:
        _request.set(None)  # what the model loads in turn is not meant, and `load` sees that it was taken
        return load_request(cls, request, args, kwargs)
    if _diverted is not None:
        return _diverted(cls, pretrained_model_name_or_path, args, kwargs)
    return load_privately(cls, pretrained_model_name_or_path, args, kwargs)


def load_privately(cls: Any, path: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """transformers' own loading, in one thread at a time."""
    with loading():
        return original(cls, path, *args, **kwargs)


@functools.wraps(_original_warmup)
def _warm_up(*args: Any, **kwargs: Any) -> None:
    """It would allocate the size of the whole model on the device, for nothing, and keep it."""
    if _warming_up.get():
        _original_warmup(*args, **kwargs)


_transformers.PreTrainedModel.from_pretrained = classmethod(_from_pretrained)
_transformers.caching_allocator_warmup = _warm_up
refuse_while_shared(_transformers.PreTrainedModel, "load_state_dict", loaded_in_place)
explain_training(_transformers.PreTrainedModel)


def asked_dtype(dtype: Any, kwargs: dict[str, Any]) -> Any:
    """The dtype of a call, by transformers' rule: `dtype`, else `torch_dtype`, which is taken out of `kwargs`."""
    older = kwargs.pop("torch_dtype", None)
    return older if dtype is None else dtype


def weights_apart(config_class: Any, folder: Path) -> str:
    """What transformers would load from files of other names, which a `state_dict` does not have; empty if nothing."""
    for name in getattr(config_class, "extra_files", ()):
        if (folder / name).exists():
            return f"some of its weights are in {name}"
    try:
        from transformers.distributed.checkpoint import is_sharded_checkpoint
    except ImportError:  # older versions know no such checkpoints
        return ""
    return "it has weights in shards of a distributed checkpoint" if is_sharded_checkpoint(folder) else ""


def _stored_dtypes(attachment: Attachment, component: str) -> Mapping[str, int]:
    """Bytes of each floating dtype that a component stores, by safetensors' name, most bytes first."""
    sizes: dict[str, int] = {}
    for info in attachment.tensors.values():
        if info.component == component and info.dtype.startswith(("F", "BF")):
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.length
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def checked_dtype(
    attachment: Attachment,
    component: str,
    asked: str | torch.dtype | None,
    folder: Path,
    *,
    allow_copy: bool,
    allow: str = "allow_copy=True",
) -> torch.dtype:
    """The dtype to load as: the one that most bytes are stored in. Errors: InvalidReferenceError (another is asked)."""
    stored = [dtype for dtype in map(torch_dtype, _stored_dtypes(attachment, component)) if dtype in _COMPUTED]
    if asked in (None, "auto"):
        return stored[0] if stored else torch.get_default_dtype()
    wanted = named_dtype(asked)
    if stored and wanted != stored[0] and not allow_copy:
        raise InvalidReferenceError(
            f"{folder}: dtype {wanted} is asked for, but {stored[0]} is stored; casting would copy every weight: leave "
            f"dtype out, or say {allow}"
        )
    return wanted


def named_dtype(asked: Any) -> torch.dtype:
    """A dtype that is asked for, which may be a name. Errors: InvalidReferenceError (torch has none of that name)."""
    found = getattr(torch, asked.removeprefix("torch."), None) if isinstance(asked, str) else asked
    if not isinstance(found, torch.dtype):
        raise InvalidReferenceError(f"dtype {asked!r}: torch has no such dtype")
    return found


def load_request(cls: Any, request: PretrainedRequest, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let transformers load a class from attached tensors; then make private what must be, and report."""
    with loading():
        return _load_request(cls, request, args, kwargs)


def _load_request(cls: Any, request: PretrainedRequest, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    attachment = request.attachment
    config = kwargs.pop("config", None)
    loading = {name: kwargs.pop(name) for name in _LOADING if name in kwargs}
    for name in ("dtype", "torch_dtype", *UNSUPPORTED):  # the request has the dtype; callers refuse the others
        kwargs.pop(name, None)
    if not isinstance(config, transformers.PretrainedConfig):
        config, kwargs = cls.config_class.from_pretrained(
            request.folder if config is None else config, return_unused_kwargs=True, local_files_only=True, **kwargs
        )
    if apart := weights_apart(type(config), request.folder):
        raise InvalidReferenceError(f"{request.folder}: {apart}; load it with transformers itself")
    told = loading.pop("output_loading_info", False)
    for name in _FOR_THE_HUB:
        loading.pop(name, None)
    place = attachment.torch_device
    state = attachment.state_dict(request.component)
    fusing = TorchFusionMode(attachment, _advice(request))
    warming_up = _warming_up.set(False)
    try:
        with fusing:
            model, found = original(
                cls, None, *args, config=config, state_dict=state, dtype=request.dtype,
                device_map=None if place == "cpu" else {"": place}, output_loading_info=True, local_files_only=True,
                **loading, **kwargs,
            )  # fmt: skip
    finally:
        _warming_up.reset(warming_up)
    model.config.name_or_path = model.name_or_path = request.name
    if model.can_generate() and loading.get("generation_config") is None:
        with contextlib.suppress(OSError):  # then the model's configuration has made one
            model.generation_config = transformers.GenerationConfig.from_pretrained(request.folder)
    fusing.finish(model)
    freeze(model, attachment)
    make_buffers_private(model, attachment)
    reasons = _Reasons(model, attachment, request.component, found, fusing)
    remember(model, attachment, reasons.of, found["missing_keys"])
    return (model, found) if told else model


def _advice(request: PretrainedRequest) -> str:
    """What to do where parts of a parameter do not lie in a row: only what was resident can be had otherwise."""
    loaded = request.attachment.loaded
    if request.component:
        return "for the components of a pipeline no order is asked for"
    if loaded is not None and loaded.order not in ("joined", "resident"):
        return f"the load did not heed all groups ({loaded.ignored_groups[0]})" if loaded.ignored_groups else ""
    found = "another load has just placed them" if loaded and loaded.order == "joined" else "they were resident already"
    return (
        f"{found}, in an order of their own or shared with other checkpoints; to have them in a row, "
        f"`weightd rm {request.attachment.content_digest[:19]}` and load it again through this integration"
    )


class _Reasons:
    """Why parameters of a model are private."""

    def __init__(
        self, model: Any, attachment: Attachment, component: str, found: dict[str, Any], fusing: TorchFusionMode
    ) -> None:
        self._stored = {info.name: info for info in attachment.tensors.values() if info.component == component}
        self._fusing = fusing
        self._prefix = f"{model.base_model_prefix}."
        self._missing = set(found["missing_keys"])
        self._outputs = model.get_output_embeddings()

    def _is_bias_of_tied_outputs(self, parameter: torch.nn.Parameter) -> bool:
        return self._outputs is not None and getattr(self._outputs, "bias", None) is parameter

    def of(self, name: str, parameter: torch.nn.Parameter) -> str:
        """The reason for one."""
        if name in self._missing:
            return "not in the checkpoint: transformers has initialised it"
        for stored in (name, name.removeprefix(self._prefix), self._prefix + name):
            info = self._stored.get(stored)
            if info is not None and torch_dtype(info.dtype) != parameter.dtype:
                return f"stored as {info.dtype}, used as {str(parameter.dtype).removeprefix('torch.')}"
            if info is not None and self._is_bias_of_tied_outputs(parameter):
                return "transformers pads the bias of tied output embeddings, which copies it"
            if info is not None and tuple(parameter.shape) != info.shape:
                return f"transformers has given it shape {tuple(parameter.shape)} while loading"
            if info is not None:
                return "transformers has changed it while loading"
        return self._fusing.reason(parameter) or "transformers has made it of other tensors while loading"
