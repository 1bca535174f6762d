"""Models that vLLM loads by itself and on weightd's memory, in one process, and what differs between the two.

Runs in a process that tests spawn (`support.engines`), without vLLM's engine around it: `compare` calls what vLLM's
worker calls for a model. oneDNN is off: with it vLLM's CPU backend packs weights anew, and shares none of them.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from support.memory import Segments, written
from support.plugins import without_onednn
from weightd.integrations.sharing import report


class Loaded(NamedTuple):
    """Values of a model's parameters and buffers, by name: before its layers post-process them, and after."""

    model: torch.nn.Module
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    shared_before: Sharing


class Sharing(NamedTuple):
    """By addresses: bytes of all parameters, and of those in the daemon's segments; names and bytes of the others."""

    total: int
    shared: int
    private: dict[str, int]


def start(model: str) -> None:
    """Prepare this process for loads, as a vLLM worker does. `model` is a mixture of experts.

    vLLM makes its group for expert parallelism only where its first model has experts.
    """
    import vllm.model_executor.models.registry as registry
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.plugins import load_general_plugins

    # Otherwise vLLM imports itself once more for each class of models that it asks for its features.
    registry._run_in_subprocess = lambda function: function()
    torch.accelerator.empty_cache = lambda: None  # raises in a CPU build; vLLM's own worker replaces it likewise
    load_general_plugins()
    without_onednn()
    _look_before_processing()
    config = _configuration(model, "safetensors")
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{os.environ['VLLM_CACHE_ROOT']}/{os.getpid()}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    gc.collect()
    gc.freeze()  # a collection of everything that vLLM has imported takes longer than a load, which makes several


def compare(path: str) -> dict[str, Any]:
    """Load a checkpoint both ways and say what came of it, in JSON's types.

    `tensors` counts what was compared. `unequal` names what differs before or after post-processing. `loaded` and
    `processed` are (bytes, shared bytes, private bytes and reason by name) of the parameters at these times.
    `swept` are Python objects that were looked at for tensors outside of modules.
    `captured` are parameters that objects other than modules hold, and their holders; `without_memory` are holders of
    parameters that have none. `written` is how many bytes of the daemon's segments this process has a copy of.
    """
    own = load(path, "safetensors")
    with _sweeps() as swept:
        ours = load(path, "weightd")
    processed = sharing(ours.model)
    reasons = {one.name: one.reason for one in report(ours.model).copied}
    captured, without_memory = held_outside(ours.model)
    result = {
        "class": type(ours.model).__name__,
        "tensors": len(own.before) + len(own.after),
        "unequal": [*_unequal(own.before, ours.before), *_unequal(own.after, ours.after)],
        "loaded": _told(ours.shared_before, reasons),
        "processed": _told(processed, reasons),
        "swept": sum(swept),
        "captured": captured,
        "without_memory": without_memory,
        "written": written(os.getpid()),
    }
    del own, ours
    gc.collect()
    return result


def load(path: str, load_format: str) -> Loaded:
    """Load a model with one of vLLM's loaders."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    config = _configuration(path, load_format)
    found: list[tuple[dict[str, torch.Tensor], Sharing]] = []
    _looks.append(lambda model: found.append((values(model), sharing(model))))
    try:
        with set_current_vllm_config(config):
            model = get_model(vllm_config=config)
    finally:
        _looks.pop()
    ((before, shared),) = found
    return Loaded(model, before, values(model), shared)


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, under all of their names."""
    named = [
        *model.named_parameters(remove_duplicate=False),
        *((f"buffer {name}", buffer) for name, buffer in model.named_buffers(remove_duplicate=False)),
    ]
    return {name: tensor.detach().clone() for name, tensor in named}


def sharing(model: torch.nn.Module) -> Sharing:
    """Where the kernel has the parameters of a model, each storage once."""
    segments = Segments(os.getpid())
    total, private, seen = 0, {}, set()
    for name, parameter in model.named_parameters():
        storage = parameter.untyped_storage()
        place = storage.data_ptr(), storage.nbytes()
        if place in seen or not place[1]:
            continue
        seen.add(place)
        total += place[1]
        if not segments.hold(*place):
            private[name] = place[1]
    return Sharing(total, total - sum(private.values()), private)


def held_outside(model: torch.nn.Module) -> tuple[dict[str, list[str]], list[str]]:
    """What objects of vLLM that are no modules have in their attributes, as "Class.attribute".

    That is: the model's parameters, by name, with who has each; and who has a tensor on torch's meta device. vLLM's
    notes on how to load a model anew are left out: they are meant to have no memory.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    captured: dict[str, list[str]] = {}
    without_memory = []
    for holder in gc.get_objects():
        kind = type(holder)
        if not str(kind.__module__).startswith("vllm.") or issubclass(kind, torch.nn.Module | torch.Tensor | type):
            continue
        for attribute, value in list(getattr(holder, "__dict__", {}).items()):
            if not issubclass(type(value), torch.Tensor):
                continue
            place = f"{kind.__name__}.{attribute}"
            if value.is_meta:
                without_memory.append(place)
            elif id(value) in names:
                captured.setdefault(names[id(value)], []).append(place)
    return captured, without_memory


def _configuration(path: str, load_format: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=path,
        dtype="bfloat16",
        max_model_len=256,
        enforce_eager=True,
        skip_tokenizer_init=True,
        load_format=load_format,
    ).create_engine_config()


_looks: list[Callable[[torch.nn.Module], None]] = []


def _look_before_processing() -> None:
    """Have the last of `_looks` called with each model whose weights are loaded, and not post-processed yet.

    Once in a process: whoever imports vLLM's function later has this one as well.
    """
    import vllm.model_executor.model_loader.utils as utils

    original = utils.process_weights_after_loading

    def process(model: torch.nn.Module, *arguments: Any, **options: Any) -> None:
        _looks[-1](model)
        original(model, *arguments, **options)

    for module in list(sys.modules.values()):
        if vars(module).get(original.__name__) is original:
            setattr(module, original.__name__, process)


@contextmanager
def _sweeps() -> Iterator[list[int]]:
    """How many objects each sweep of a binding looks at."""
    from weightd.binding import _Bound

    original, found = _Bound.sweep, []

    def sweep(bound: _Bound, refused: list[torch.Tensor]) -> int:
        found.append(original(bound, refused))
        return found[-1]

    _Bound.sweep = sweep  # type: ignore[method-assign]  # of this one load
    try:
        yield found
    finally:
        _Bound.sweep = original  # type: ignore[method-assign]  # as above


def _unequal(own: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> list[str]:
    """Names that only one has, or whose tensors differ in dtype, shape or any bit."""
    differ = set(own) ^ set(ours)
    for name in set(own) & set(ours):
        one, other = own[name], ours[name]
        if one.dtype != other.dtype or one.shape != other.shape or not torch.equal(_bits(one), _bits(other)):
            differ.add(name)
    return sorted(differ)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """NaN is equal to itself here, and zero not to minus zero."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _told(found: Sharing, reasons: Mapping[str, str]) -> list[Any]:
    return [found.total, found.shared, {name: [size, reasons.get(name, "")] for name, size in found.private.items()}]
