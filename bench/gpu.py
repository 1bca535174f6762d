"""What weightd does on a GPU: device memory, attach, load and compute.

    python bench/gpu.py [--only memory,load] [--scale 1.0] [--rounds 7] [--folder DIR] [--results DIR] [--format json]

Takes some minutes on the first visible GPU, which should be idle, and writes DATE-GPU.md and .json into `--results`
(default: bench/results; a scale or a choice of parts is in the name). `--scale 0.1` does it with a tenth of the bytes.

- memory: NVML's used memory of 1, 2, 4 and 8 processes with nothing but a context, attached to one checkpoint of 8 GB,
  and with private copies.
- attach: connect, attach, make 300 tensors of 16 GB, by size of the segments; torch and its context are up. What a new
  process needs for imports, cuInit and a context comes on top: `tools/gpu_probe.py --only start` measures that.
- load: 16 GB from a warm page cache, with and without hashing, beside `safetensors.torch.load_file(device="cuda")` and
  copies from two pinned buffers of 64 MiB, which nothing can beat. In turns; a ratio is that of neighbours.
- compute: a matrix product and a Llama of eight layers on attached and on private weights. Results must be equal.
- workload: as memory, with the two pipelines of 62.5 GB that share a text encoder (`weightd plan` in README); processes
  serve one and the other in turns.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from _daemon import Spread, machine, scratch
from _gpu_parts import GB, MIB, PARTS, PROCESSES, SEGMENTS, Setting

from weightd._mapping import cuda_driver
from weightd.errors import WeightdError

PACKAGES = ("cuda-bindings", "cuda-core", "nvidia-ml-py", "safetensors", "torch", "transformers", "xxhash")
RESULTS = Path(__file__).parent / "results"


def measured(value: dict[str, float], scale: float = 1, digits: int = 2) -> str:
    """`median (quartiles)`."""
    spread = Spread(**value)  # type: ignore[arg-type]  # it was one before it was JSON
    median, low, high = (f"{number * scale:.{digits}f}" for number in (spread.median, spread.low, spread.high))
    return f"{median} ({low}–{high})"


def memory_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """What is predicted rests on the contexts that were measured."""
    size, context = found["size"], found["context"]
    rows: list[tuple[str, ...]] = [
        ("processes", "contexts alone, GB", "attached, predicted", "attached", "private", "private / attached")
    ]
    rows.append(("0: the daemon", "", f"{size / GB:.2f}", f"{found['loaded'] / GB:.2f}", "", ""))
    for number in PROCESSES:
        alone, attached, private = (found[kind][number] for kind in ("context", "attached", "private"))
        cells = [f"{value / GB:.2f}" if value is not None else "does not fit" for value in (alone, attached, private)]
        predicted = f"{(size + context[number]) / GB:.2f}" if context[number] is not None else ""
        ratio = f"{private / attached:.2f}" if private and attached else ""
        rows.append((str(number), cells[0], predicted, cells[1], cells[2], ratio))
    return rows


def attach_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A column for each size of segments, a row for each step."""
    sizes = [f"{size // MIB} MiB, {found['segments'][size]} segments" for size in SEGMENTS]
    rows: list[tuple[str, ...]] = [("ms", "predicted", *sizes)]
    for step in found["by_segment_size"][SEGMENTS[0]]:
        predicted = "< 20 with 1024 MiB" if step == "total" else ""
        rows.append((step, predicted, *(measured(found["by_segment_size"][size][step], digits=3) for size in SEGMENTS)))
    return rows


def load_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rates, then ratios."""
    labels = {
        "copy": ("copy from pinned memory", "25 to 55"),
        "load_file": ("safetensors load_file", ""),
        "load": ("load", "≥ 10"),
        "load_unhashed": ("load, unhashed", ""),
    }
    rows: list[tuple[str, ...]] = [("", "predicted", "measured")]
    for name, value in found["gb_per_s"].items():
        label, predicted = labels[name]
        rows.append((f"{label}, GB/s", predicted, measured(value)))
    rows.append(("time of load / of load, unhashed", "< 1.01", measured(found["load_to_unhashed"])))
    if "ratio_to_load_file" in found:
        rows.append(("time of load_file / of load", "≥ 2", measured(found["ratio_to_load_file"])))
    return rows


def compute_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for the product, one for the model."""
    rows: list[tuple[str, ...]] = [("", "equal results", "attached, ms", "private, ms", "attached / private")]
    rows.append(("predicted", "yes", "", "", "1.00"))
    for name in ("product", "model"):
        part = found[name]
        if "skipped" in part:
            rows.append((name, part["skipped"], "", "", ""))
            continue
        times = (measured(part["ms"][kind], digits=3) for kind in ("attached", "private"))
        rows.append((name, "yes" if part["equal"] else "NO", *times, measured(part["ratio"], digits=3)))
    return rows


def workload_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """As of memory, and what sharing saved of the two pipelines."""
    total, unique = found["total"], found["size"]
    saved = f"{100 * (total - unique) / total:.1f} % of {total / GB:.2f} GB"
    return [*memory_rows(found), (f"saved: {saved}; loaded in {found['load_seconds']:.1f} s", *[""] * 5)]


ROWS = {
    "memory": memory_rows, "attach": attach_rows, "load": load_rows, "compute": compute_rows, "workload": workload_rows,
}  # fmt: skip


def report(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    about = results["about"]
    lines = [
        f"# {about['gpu']}, {about['date']}",
        "",
        ", ".join(f"{key} {value}" for key, value in about.items() if key not in ("gpu", "date")) + ".",
        f"`bench/gpu.py`, scale {results['scale']:g}, {results['rounds']} rounds. Medians, with quartiles in brackets.",
    ]
    for part, found in results["parts"].items():
        size = f", {found['size'] / GB:.1f} GB" if "size" in found else ""
        lines += ["", f"## {part.capitalize()}{size}", ""]
        if why := found.get("skipped") or found.get("failed"):
            lines.append(f"Not measured: {why}")
            continue
        head, *rows = ROWS[part](found)
        lines += [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
    return "\n".join([*lines, ""])


def about() -> dict[str, str | int]:
    """What is measured, on what and when."""
    driver = cuda_driver.call("cuDriverGetVersion")
    found: dict[str, str | int] = {
        "gpu": cuda_driver.name_of(0), "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "CUDA": f"{driver // 1000}.{driver % 1000 // 10}", **machine(),
    }  # fmt: skip
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def parts_of(text: str) -> list[str]:
    """Names of parts, in our order. Errors: argparse.ArgumentTypeError."""
    chosen = text.split(",")
    if unknown := sorted(set(chosen) - set(PARTS)):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: no such part; there are {', '.join(PARTS)}")
    return [part for part in PARTS if part in chosen]


def main() -> str | int:
    """Measure, print and write. Returns an exit code or a message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=parts_of, default=list(PARTS), help=f"parts, with commas: {', '.join(PARTS)}")
    parser.add_argument("--scale", type=float, default=1.0, help="times the bytes of each part")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that are counted; at least 2")
    parser.add_argument("--folder", type=Path, help="where to put checkpoints for the time (default: the system's)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write the results")
    parser.add_argument("--format", choices=("human", "json"), default="human", help="what to print")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    try:
        cuda_driver.initialise()
    except WeightdError as error:
        return f"gpu: {error}"
    is_double = cuda_driver.name_of(0).startswith("FakeCUDA")
    results: dict[str, Any] = {"about": about(), "scale": options.scale, "rounds": options.rounds, "parts": {}}
    with scratch(options.folder) as folder:
        setting = Setting(folder, options.scale, options.rounds, torch=not is_double)
        for part in options.only:
            print(f"gpu: {part}", file=sys.stderr)
            try:
                results["parts"][part] = PARTS[part](setting)
            except (Exception, SystemExit) as error:  # noqa: BLE001  # the other parts are worth having all the same
                results["parts"][part] = {"failed": f"{type(error).__name__}: {error}"}
    print(json.dumps(results, indent=2) if options.format == "json" else report(results))
    failed = int(any("failed" in found for found in results["parts"].values()))
    if is_double:
        print("gpu: figures of a test double are not written", file=sys.stderr)
        return failed
    name = "-".join([results["about"]["date"], re.sub(r"[^a-z0-9]+", "-", results["about"]["gpu"].lower()).strip("-")])
    if options.only != list(PARTS):
        name += "-" + "-".join(options.only)
    if options.scale != 1:
        name += f"-{options.scale:g}"
    options.results.mkdir(exist_ok=True)
    (options.results / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.results / f"{name}.md").write_text(report(results))
    print(f"gpu: written {options.results / name}.md and .json", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())
