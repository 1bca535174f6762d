"""vLLM serves on weightd's memory: `vllm serve MODEL --load-format weightd`, or `LLM(..., load_format="weightd")`.

vLLM's own code chooses the files, builds the model and loads it (`weightd.recording`); `--model-loader-extra-config`
takes the options of `EngineOptions`. What lies in a row is shared, the rest is private, and one line of the log says
how much and why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import vllm

from weightd.errors import FormatError, SharedWeightsError

from . import NAME
from .engines import NOT_REACHED, EngineLoad, EngineOptions, reference_of
from .guards import loading, refuse_while_shared
from .sharing import note_left
from .sharing import report as report
from .versions import require_tested
from .vllm_rules import HOW, WHERE, private_reason, refuse_configuration, refuse_online_quantisation

require_tested("vllm", vllm.__version__)

from vllm.logger import init_logger  # noqa: E402  # only a version that was run
from vllm.model_executor.model_loader import default_loader  # noqa: E402
from vllm.model_executor.model_loader import utils as loader_utils  # noqa: E402
from vllm.model_executor.model_loader.base_loader import BaseModelLoader  # noqa: E402
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader  # noqa: E402
from vllm.model_executor.model_loader.utils import (  # noqa: E402
    get_model_cls,
    initialize_model,
    process_weights_after_loading,
)
from vllm.utils.torch_utils import set_default_torch_dtype  # noqa: E402
from vllm.v1.worker.gpu_worker import Worker  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from weightd.attachment import Attachment

    Weights = Iterator[tuple[str, torch.Tensor]]

log = init_logger("vllm.weightd")

_INDEXES: Final = ("model.safetensors.index.json", "consolidated.safetensors.index.json")
_PICKLES: Final = ("pt_weights_iterator", "multi_thread_pt_weights_iterator", "np_cache_weights_iterator")


class _Attached(NamedTuple):
    """A checkpoint that is attached before it is loaded; or why it cannot be, where vLLM loads by itself then."""

    load: EngineLoad
    attachments: tuple[Attachment, ...]
    refused: Exception | None = None


_ahead: dict[tuple[str, str | None], _Attached] = {}
"""What was attached for models that are yet to be loaded: vLLM makes a new loader for each of the two steps."""


class WeightdModelLoader(BaseModelLoader):  # type: ignore[misc]  # vLLM has no types for us
    """vLLM's loader of model files, but for where the tensors come from and what becomes of copies.

    It has no `get_all_weights`, so that vLLM refuses to reload weights from disk in place.
    """

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        self._options = EngineOptions.of(load_config.model_loader_extra_config or {}, WHERE)
        self._own_config = dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={})

    def download_model(self, model_config: Any) -> None:
        """Download what vLLM would load."""
        DefaultModelLoader(self._own_config).download_model(model_config)

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """Refuse to load into a model that exists. Errors: SharedWeightsError."""
        raise SharedWeightsError(
            f"{type(model).__name__} cannot get other weights in place: they lie on weightd's memory, which other "
            f"processes read; start another engine with the new weights, or {HOW}"
        )

    def get_external_weight_memory(self, vllm_config: Any) -> int:
        """Attach to the model and its draft, and say how many bytes that are: called before vLLM measures memory.

        Errors: those of `load_model`.
        """
        places: dict[tuple[str, int, int], int] = {}
        _close_ahead()  # of an engine that ended before it loaded
        for loader, model_config in self._with_draft(vllm_config):
            try:
                attached = _ahead[_key(model_config)] = loader._attach(vllm_config, model_config)
            except BaseException:
                _close_ahead()
                raise
            for attachment in attached.attachments:
                for info in attachment.tensors.values():
                    places[attachment.content_digest, info.segment, info.offset] = info.length
        return sum(places.values())

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
        """A model on shared memory.

        Errors: EngineOptionError (a setting that cannot go with it), those of `EngineLoad.attach` by the option
        `fallback`, SharedWeightsError (vLLM would write to shared weights), LeastSharedError, BindingError.
        """
        refuse_configuration(vllm_config)
        attached = _ahead.pop(_key(model_config), None) or self._attach(vllm_config, model_config)
        try:
            if attached.refused is not None:
                model = self._left_to_vllm(vllm_config, model_config, prefix)
                note_left(model, f"vLLM has loaded it by itself, for {attached.refused}")
                return model
            return self._recorded(attached.load, vllm_config, model_config, prefix)
        finally:
            attached.load.close()

    def _recorded(self, load: EngineLoad, vllm_config: Any, model_config: Any, prefix: str) -> torch.nn.Module:
        def stored(paths: list[str]) -> Weights:
            return itertools.chain.from_iterable(load.weights(*files) for files in _by_folder(paths, model_config))

        with set_default_torch_dtype(model_config.dtype), load.device:
            with load.building(), _without_notes():
                model: torch.nn.Module = initialize_model(
                    vllm_config=vllm_config, model_config=model_config, prefix=prefix
                )
            refuse_online_quantisation(model)
            files = DefaultModelLoader(self._own_config)
            with load.loading(), _read_by(stored, model_config.model):
                files.load_weights(model, model_config)
            load.bind(model, private_reason)
            _release_unused(load.device)
            with load.guarding():
                process_weights_after_loading(model, model_config, load.device)
        load.finish(model)
        _release_unused(load.device)
        _refuse_updates(type(model))
        model.eval()
        return model

    def _attach(self, vllm_config: Any, model_config: Any) -> _Attached:
        """Attach to the files that vLLM would load, before it builds anything. Errors: as `load_model`."""
        refuse_configuration(vllm_config)
        device = torch.device(self.load_config.device or vllm_config.device_config.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        load = EngineLoad(self._options, device, log)
        attachments: list[Attachment] = []

        def attach(paths: list[str]) -> Weights:
            attachments.extend(load.attach(*files) for files in _by_folder(paths, model_config))
            return iter(())

        try:
            with _read_by(attach, model_config.model):
                # vLLM asks a model for patterns of file names: the class has them. What only an instance names, or
                # leaves out, is attached while it is loaded.
                model_class = get_model_cls(model_config)
                asked = ("fall_back_to_pt_during_load", "allow_patterns_overrides")
                known = {name: getattr(model_class, name) for name in asked if hasattr(model_class, name)}
                stand_in = SimpleNamespace(**known)
                for _ in DefaultModelLoader(self._own_config).get_all_weights(model_config, stand_in):
                    pass
        except NOT_REACHED as error:
            load.close()
            if self._options.fallback != "local":
                raise
            log.warning("weightd: vLLM loads weights of its own, which are not shared: %s", error)
            return _Attached(load, (), error)
        except BaseException:
            load.close()
            raise
        return _Attached(load, tuple(attachments))

    def _left_to_vllm(self, vllm_config: Any, model_config: Any, prefix: str) -> torch.nn.Module:
        loader = DefaultModelLoader(self._own_config)
        model: torch.nn.Module = loader.load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        return model

    def _with_draft(self, vllm_config: Any) -> Iterator[tuple[WeightdModelLoader, Any]]:
        """The models that vLLM will load with this format, and their loaders."""
        yield self, vllm_config.model_config
        speculative = vllm_config.speculative_config
        draft = getattr(speculative, "draft_model_config", None)
        if draft is None or _key(draft) == _key(vllm_config.model_config):
            return
        from vllm.model_executor.model_loader.utils import get_draft_load_config  # as old as the hook that we are in

        load_config = get_draft_load_config(vllm_config)
        if load_config.load_format == NAME:
            yield WeightdModelLoader(load_config), draft


@contextlib.contextmanager
def _read_by(read: Callable[[list[str]], Weights], model: str) -> Iterator[None]:
    """Inside, vLLM reads the files of weights that it has chosen with a function of ours. Errors: FormatError.

    The function that is replaced has had the same name and first argument in all of vLLM's versions so far, which is
    not so for the methods around it.
    """

    def weights(files: list[str], *_: Any, **__: Any) -> Weights:
        return read(files)

    def refuse(*_: Any, **__: Any) -> Weights:
        raise FormatError(f"{model}: vLLM finds pickles and no safetensors files; weightd has safetensors only")

    replaced = dict.fromkeys(_PICKLES, refuse) | {"safetensors_weights_iterator": weights}
    with loading():
        originals = {name: getattr(default_loader, name) for name in replaced}
        try:
            for name, function in replaced.items():
                setattr(default_loader, name, function)
            yield
        finally:
            for name, function in originals.items():
                setattr(default_loader, name, function)


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    """Inside, vLLM builds models without its notes on how to load them anew in place, which is refused.

    The notes are the parameters on the meta device. Those of a parameter without memory would share its storage, and
    `bind` would look for them among all objects of the interpreter.
    """
    name = "record_metadata_for_reloading"
    original = getattr(loader_utils, name)
    try:
        setattr(loader_utils, name, lambda model: None)
        yield
    finally:
        setattr(loader_utils, name, original)


def _by_folder(paths: Iterable[str], model_config: Any) -> Iterator[tuple[list[str], str, str]]:
    """Files of weights by folder: the files, what the folder is called, and the name of the files' index, if any.

    The folder of the model is called as vLLM calls the model.
    """
    folders: dict[str, list[str]] = {}
    for path in paths:
        folders.setdefault(os.path.dirname(path), []).append(path)
    for folder, files in folders.items():
        index = next((name for name in _INDEXES if os.path.isfile(os.path.join(folder, name))), "")
        yield files, reference_of(folder, model_config.model, model_config.revision), index


def _close_ahead() -> None:
    """Let go of what was attached and never loaded."""
    while _ahead:
        _ahead.popitem()[1].load.close()


def _key(model_config: Any) -> tuple[str, str | None]:
    return model_config.model, model_config.revision


def _release_unused(device: torch.device) -> None:
    """Give what torch keeps of freed memory back to a GPU, as vLLM's own loaders do around post-processing."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


_refusing: set[type] = set()


def _refuse_updates(model_class: type[torch.nn.Module]) -> None:
    """Let models of a class refuse other weights while theirs are shared."""
    if model_class not in _refusing:
        _refusing.add(model_class)
        refuse_while_shared(model_class, "load_weights", lambda model, *_, **__: [model])


refuse_while_shared(Worker, "reload_weights", lambda worker, *_, **__: [worker.model_runner.get_model()])
