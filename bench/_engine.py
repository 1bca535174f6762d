"""One process with an engine, which loads one model and says what that took. For bench/engines.py.

The weight phase is what an engine's worker calls for a model: vLLM's `get_model`, SGLang's `ModelRunner.load_model`. It
builds the model, loads it and post-processes it. All times are seconds, all sizes bytes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

_engine: _Engine


class Clocks:
    """Wraps functions and adds up what each takes."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def function(self, owner: Any, name: str, label: str) -> None:
        """Clock a function of a module or class from now on."""
        original = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.of(label):
                return original(*arguments, **options)

        setattr(owner, name, timed)

    def context(self, owner: Any, name: str, label: str) -> None:
        """Clock what happens inside a context manager that a method returns."""
        original = getattr(owner, name)

        @contextmanager
        def timed(*arguments: Any, **options: Any) -> Iterator[Any]:
            with self.of(label), original(*arguments, **options) as value:
                yield value

        setattr(owner, name, timed)

    @contextmanager
    def of(self, label: str) -> Iterator[None]:
        """Add what happens inside to a label."""
        start, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds[label] += time.perf_counter() - start
            self.seconds[f"{label}, cpu"] += time.process_time() - cpu

    def taken(self) -> dict[str, float]:
        """What was added up since the last call."""
        seconds = dict(self.seconds)
        self.seconds.clear()
        return seconds


def memory() -> dict[str, int]:
    """Bytes of this process: its proportional set size, and pages that are its own and of no file."""
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        key, value, *_ = line.split()
        fields[key.rstrip(":")] = int(value) * 1024
    return {"pss": fields["Pss"], "anonymous": fields["Anonymous"]}


class _Engine(ABC):
    """What the two engines have in common: a weight phase with clocks in weightd's part of it."""

    def __init__(self, path: str, shared: bool) -> None:
        self.path = path
        self.shared = shared
        self.clocks = Clocks()
        self.model: torch.nn.Module | None = None

    @abstractmethod
    def prepare(self) -> None:
        """All that comes before the weight phase."""

    @abstractmethod
    def load(self) -> torch.nn.Module:
        """The weight phase."""

    @abstractmethod
    def build_without_memory(self) -> torch.nn.Module:
        """The engine's model on torch's meta device, where a copy is no work."""

    def clock_weightd(self) -> None:
        """Put clocks into weightd's part of the load."""
        from weightd import binding
        from weightd.attachment import Attachment
        from weightd.integrations.engines import EngineLoad

        self.clocks.function(EngineLoad, "attach", "attach")
        self.clocks.context(EngineLoad, "building", "build")
        self.clocks.context(EngineLoad, "loading", "record")
        self.clocks.function(EngineLoad, "bind", "bind")
        self.clocks.context(EngineLoad, "guarding", "post-process")
        self.clocks.function(EngineLoad, "finish", "report")
        self.clocks.function(Attachment, "tensor", "of record: make tensors")
        self.clocks.function(binding._Bound, "sweep", "of bind: sweep")


class _VLLM(_Engine):
    def prepare(self) -> None:
        import torch
        import vllm
        import vllm.model_executor.models.registry as registry
        from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
        from vllm.engine.arg_utils import EngineArgs
        from vllm.plugins import load_general_plugins

        from support.plugins import without_onednn

        # vLLM looks at a model's class in one more process, or in a cache of what that has said: in either way the
        # class is imported in the weight phase unless it is here.
        registry._run_in_subprocess = lambda function: function()
        torch.accelerator.empty_cache = lambda: None  # raises in a CPU build; vLLM's own worker replaces it likewise
        load_general_plugins()
        without_onednn()
        self.config = EngineArgs(
            model=self.path,
            dtype="bfloat16",
            max_model_len=256,
            enforce_eager=True,
            skip_tokenizer_init=True,
            load_format="weightd" if self.shared else "safetensors",
        ).create_engine_config()
        with vllm.config.set_current_vllm_config(self.config):
            init_distributed_environment(1, 0, f"file://{os.environ['VLLM_CACHE_ROOT']}/{os.getpid()}", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
        from vllm.model_executor.model_loader.utils import get_model_cls

        get_model_cls(self.config.model_config)

    def load(self) -> torch.nn.Module:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import get_model

        self.config.compilation_config.static_forward_context.clear()  # of the model before
        with set_current_vllm_config(self.config):
            model: torch.nn.Module = get_model(vllm_config=self.config)
        return model

    def build_without_memory(self) -> torch.nn.Module:
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.utils.torch_utils import set_default_torch_dtype

        self.config.compilation_config.static_forward_context.clear()
        with (
            set_current_vllm_config(self.config),
            set_default_torch_dtype(self.config.model_config.dtype),
            torch.device("meta"),
        ):
            model: torch.nn.Module = initialize_model(vllm_config=self.config)
        return model


class _SGLang(_Engine):
    def prepare(self) -> None:
        from sglang.srt.model_executor.model_runner import ModelRunner

        engine, original = self, ModelRunner.load_model

        def held(runner: Any) -> None:
            """In place of the weight phase, which comes in the middle of what makes a runner: it is called later."""
            engine.runner = runner
            raise _WaitError

        ModelRunner.load_model = held
        from support import sglang_loads

        options = sglang_loads.WEIGHTD if self.shared else {}
        with contextlib.suppress(_WaitError):
            sglang_loads.load(self.path, **options)
        ModelRunner.load_model = original
        from sglang.srt.model_loader.utils import get_model_architecture

        get_model_architecture(self.runner.model_config)

    def load(self) -> torch.nn.Module:
        if self.model is None:
            self.runner.load_model()
            model: torch.nn.Module = self.runner.model
            return model
        from sglang.srt.configs.device_config import DeviceConfig
        from sglang.srt.model_loader.loader import get_model_loader

        loader = get_model_loader(self.runner.load_config, self.runner.model_config)
        again: torch.nn.Module = loader.load_model(
            model_config=self.runner.model_config, device_config=DeviceConfig("cpu", 0)
        )
        return again

    def build_without_memory(self) -> torch.nn.Module:
        import torch
        from sglang.srt.model_loader import loader as loaders
        from sglang.srt.model_loader.utils import set_default_torch_dtype

        config = self.runner.model_config
        quantisation = loaders._get_quantization_config(config, self.runner.load_config)
        with set_default_torch_dtype(config.dtype), torch.device("meta"):
            model: torch.nn.Module = loaders._initialize_model(config, self.runner.load_config, quantisation)
        return model


class _WaitError(Exception):
    """The weight phase is to come."""


def prepare(engine: str, path: str, shared: bool) -> float:
    """Import the engine and do what comes before the weight phase. Returns the seconds that the import takes."""
    global _engine
    start = time.perf_counter()
    importlib.import_module(engine)
    seconds = time.perf_counter() - start
    _engine = (_VLLM if engine == "vllm" else _SGLang)(path, shared)
    _engine.prepare()
    if shared:
        _engine.clock_weightd()
    gc.collect()
    return seconds


def weight_phase() -> dict[str, Any]:
    """Seconds and processor seconds of the phase, its steps where it is weightd's, and by what memory has grown."""
    before = memory()
    start, cpu = time.perf_counter(), time.process_time()
    _engine.model = _engine.load()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    after = memory()
    return {
        "seconds": seconds,
        "cpu": cpu,
        "steps": _engine.clocks.taken(),
        "anonymous": after["anonymous"] - before["anonymous"],
        "before": before,
        "parameters": sum(one.nbytes for one in _engine.model.parameters()),
    }


def touched(before: dict[str, int]) -> dict[str, int]:
    """By what memory has grown once every byte of every parameter was read, as by a forward pass."""
    import torch

    assert _engine.model is not None
    for parameter in _engine.model.parameters():
        if parameter.numel():
            parameter.data.flatten().view(torch.int16).max()
    return {name: size - before[name] for name, size in memory().items()}


def again(times: int) -> list[dict[str, float]]:
    """The weight phase in a process that has done it before, and what of it is the engine's own.

    `own loaders` is the engine's `load_weights` alone: the same stored tensors, made before, for a model on the meta
    device, where a copy is no work. It takes turns with the whole, and neither is disturbed by a collection of garbage.
    """
    from weightd import connect

    found = []
    gc.collect()
    gc.disable()
    clocks = _engine.clocks
    for _ in range(times):
        with clocks.of("whole"):
            model = _engine.load()
        del model
        gc.collect()
        seconds = clocks.taken()
        empty: Any = _engine.build_without_memory()
        with connect() as client, client.attach(_engine.path) as attachment:
            pairs = [(key.name, attachment.tensor(key.name)) for key in attachment.tensors]
            clocks.taken()
            with clocks.of("own loaders"):
                empty.load_weights(iter(pairs))
            del pairs
        seconds |= clocks.taken()
        del empty
        gc.collect()
        found.append(seconds)
    gc.enable()
    return found


def sweep(times: int) -> dict[str, Any]:
    """How many objects this process has, and the seconds of each look at all of them for tensors without memory."""
    from weightd.binding import _Bound
    from weightd.recording import Recording

    seconds, count = [], 0
    for _ in range(times):
        start = time.perf_counter()
        count = _Bound(Recording("cpu")).sweep()
        seconds.append(time.perf_counter() - start)
    return {"objects": count, "seconds": seconds}


# -- a whole start -----------------------------------------------------------------------------------------------------


def whole_start(engine: str, path: str, shared: bool) -> dict[str, float]:
    """From a process with nothing but Python to the first answer: seconds by step, in order."""
    return (_whole_vllm if engine == "vllm" else _whole_sglang)(path, shared)


def _whole_vllm(path: str, shared: bool) -> dict[str, float]:
    start = time.perf_counter()
    from vllm import LLM, SamplingParams, TokensPrompt

    steps = {"import": time.perf_counter() - start}
    clocks = Clocks()
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    steps["import of the worker"] = time.perf_counter() - start - steps["import"]
    clocks.function(CPUWorker, "init_device", "device and process groups")
    clocks.function(Worker, "load_model", "weight phase")
    clocks.function(CPUWorker, "determine_available_memory", "memory and KV cache")
    clocks.function(Worker, "initialize_from_config", "memory and KV cache")
    clocks.function(CPUWorker, "compile_or_warm_up_model", "warm-up")
    start = time.perf_counter()
    llm = LLM(
        model=path, dtype="bfloat16", max_model_len=256, enforce_eager=True, skip_tokenizer_init=True,
        disable_log_stats=True, load_format="weightd" if shared else "safetensors",
    )  # fmt: skip
    total = time.perf_counter() - start
    parts = {step: seconds for step, seconds in clocks.taken().items() if not step.endswith(", cpu")}
    steps |= {"configuration and the rest": total - sum(parts.values())} | parts
    start = time.perf_counter()
    sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    llm.generate([TokensPrompt(prompt_token_ids=[1, 2, 3, 4])], sampling, use_tqdm=False)
    return steps | {"first answer": time.perf_counter() - start}


def _whole_sglang(path: str, shared: bool) -> dict[str, float]:
    """Without the front end and the processes around the scheduler's, which import the same."""
    start = time.perf_counter()
    importlib.import_module("sglang")
    from sglang.srt.model_executor.model_runner import ModelRunner

    from support import sglang_loads

    steps = {"import": time.perf_counter() - start}
    clocks = Clocks()
    clocks.function(ModelRunner, "load_model", "weight phase")
    clocks.function(ModelRunner, "alloc_memory_pool", "memory and KV cache")
    clocks.function(ModelRunner, "init_attention_backends", "warm-up")
    clocks.function(ModelRunner, "init_cuda_graphs", "warm-up")
    start = time.perf_counter()
    original: Callable[..., Any] = sglang_loads.load

    def load(*arguments: Any, **options: Any) -> Any:
        with clocks.of("until the model runs"):
            return original(*arguments, **options)

    sglang_loads.load = load
    sglang_loads.serve(path, True, **(sglang_loads.WEIGHTD if shared else {}))
    total = time.perf_counter() - start
    parts = {step: seconds for step, seconds in clocks.taken().items() if not step.endswith(", cpu")}
    until = parts.pop("until the model runs") - parts["weight phase"]
    after = total - until - sum(parts.values())
    return steps | {"configuration and the rest": until} | parts | {"first answer, two prompts of 8 tokens": after}
