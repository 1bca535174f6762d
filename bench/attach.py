"""How long attaching takes, and where the time goes.

    python bench/attach.py [--small 64MiB] [--large 4GiB] [--rounds 200] [--fresh 9] [--format human|json]
        [--results FOLDER]

Two checkpoints of 300 tensors are loaded; the second is 64 times as large. One process attaches to both in turns:
connect, attach, make every tensor, let go. torch and protobuf are imported, grpc is not (checked). As a process that
starts attaches only once, as many fresh processes as `--fresh` says do it once each.

A third checkpoint has 20,000 tensors of 2 KiB and a little more: all are attached and made, and one of them, in turns.

Beside it, in turns with it, safetensors loads the same files by mmap, and of the large one every page is read, with
`populate` and without.

Aims: the large one takes at most 1.5 × the time of the small one; 300 tensors, connection included, under 5 ms; one of
20,000 at most a quarter of all of them; attach and every tensor at most half of what safetensors takes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from _daemon import Spread, machine, parse_size, scratch, serving, write_checkpoint
from _results import LEAST_ROUNDS, Comparison, Report, add_options

import weightd

HERE = Path(__file__).parent
TENSORS = 300
MMAP = "safetensors mmap"
AIM_MS, AIM_RATIO, AIM_BESIDE = 5.0, 1.5, 0.5
MANY, AIM_FEW = 20_000, 0.25
MANY_BYTES = MANY * 2048


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All of it; times in milliseconds."""
    sizes = {"small": options.small, "large": options.large}
    results: dict[str, Any] = {
        "machine": machine(),
        "tensors": TENSORS,
        "sizes": sizes,
        "segments": {},
        "beside_ms": {},
        "samples": {},
    }
    with (
        scratch(options.folder) as folder,
        serving(
            folder, "attached", "--budget", str((options.small + options.large + 2 * MANY_BYTES) * 9 // 8)
        ) as daemon,
    ):
        with weightd.connect(daemon.socket) as client:
            for seed, (name, size) in enumerate(sizes.items()):
                path = folder / f"{name}.safetensors"
                write_checkpoint(path, size, TENSORS, seed)
                client.load(path, name=f"checkpoint-{name}", pin=True)
                results["segments"][name] = client.inspect(f"checkpoint-{name}").segments
            path = folder / "many.safetensors"
            write_checkpoint(path, MANY_BYTES, MANY, len(sizes))
            client.load(path, name="many", pin=True)
            with client.attach("many", manifest_only=True) as attachment:
                tensor = list(attachment.tensors)[MANY // 2].name
        names = [f"checkpoint-{name}" for name in sizes]
        rounds = run_attacher(daemon.socket, options.rounds, names)
        fresh = [run_attacher(daemon.socket, 1, names[:1]) for _ in range(options.fresh)]
        few = run_attacher(daemon.socket, options.few, ["--few", "many", tensor])
        times = max(LEAST_ROUNDS, options.rounds // 4)
        for name, checkpoint, count in (("small", names[0], times), ("many", "many", options.few)):
            file = str(folder / f"{name}.safetensors")
            beside = run_attacher(daemon.socket, count, ["--beside", checkpoint, file])
            results["samples"][name] = beside
            results["beside_ms"][name] = {way: Spread.of(series)._asdict() for way, series in beside.items()}
        file = str(folder / "large.safetensors")
        touched = run_attacher(daemon.socket, options.few, ["--touch", names[1], file])
        results["samples"]["touch"] = touched
        results["touch_ms"] = {way: Spread.of(series)._asdict() for way, series in touched.items()}
    if any(answer["grpc"] for answer in (rounds, few, *fresh)):
        raise SystemExit("grpc was imported on the attach path")
    results["torch"] = rounds["torch"]
    results["few_ms"] = {what: Spread.of(few[what])._asdict() for what in ("all", "one")}
    results["few_ratio"] = results["few_ms"]["one"]["median"] / results["few_ms"]["all"]["median"]
    results["ms"] = {name: Spread.of([r["total"] for r in rounds[f"checkpoint-{name}"]])._asdict() for name in sizes}
    results["ratio"] = results["ms"]["large"]["median"] / results["ms"]["small"]["median"]
    first = [answer[names[0]][0] for answer in fresh]
    results["fresh_process_ms"] = Spread.of([row["total"] for row in first])._asdict()
    steps = rounds[names[0]][0]
    results["steps_ms"] = {
        step: {
            "small": Spread.of([row[step] for row in rounds[names[0]]]).median,
            "large": Spread.of([row[step] for row in rounds[names[1]]]).median,
        }
        for step in steps
    }
    return results


def run_attacher(socket: Path, rounds: int, names: list[str]) -> dict[str, Any]:
    """Attach in a process of its own. Returns a list of times for each name."""
    command = [sys.executable, str(HERE / "_attacher.py"), str(socket), str(rounds), *names]
    answer: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return answer


def record(results: dict[str, Any], report: Report) -> None:
    """Put what stands beside safetensors into the form of results."""
    for name, tensors in (("small", TENSORS), ("many", MANY)):
        found = results["samples"][name]
        ways = {"weightd": "connect and attach", "weightd, connected": "attach", MMAP: "safetensors"}
        samples = {side: found[way] for side, way in ways.items()}
        what, predicted = f"have all of {tensors:,} tensors", f"at most {AIM_BESIDE} × safetensors"
        report.add(Comparison(f"{tensors} tensors", what, "ms", samples, predicted, aims={MMAP: AIM_BESIDE}))
    touched = results["samples"]["touch"]
    ways = {"weightd": "attach", "weightd, populate": "attach, populate", MMAP: "safetensors"}
    samples = {side: touched[f"{way}: both"] for side, way in ways.items()}
    what = "have all tensors of the large checkpoint and read every page"
    predicted = "as much with populate as without: moved, not saved"
    report.add(Comparison("read", what, "ms", samples, predicted, aims={"weightd, populate": 1.0}))


def show(results: dict[str, Any]) -> None:
    """Print for people."""
    print(f"attach: {TENSORS} tensors, connection included; torch {results['torch']}; {results['machine']}")
    for name, size in results["sizes"].items():
        segments = results["segments"][name]
        print(f"  {size / 2**20:6,.0f} MiB in {segments} segments: {Spread(**results['ms'][name]).show('ms')}")
    print(f"  large / small: {results['ratio']:.2f}, aim ≤ {AIM_RATIO}")
    fresh = Spread(**results["fresh_process_ms"])
    print(f"  the one attach of a fresh process (small): {fresh.show('ms')}, aim < {AIM_MS:.0f} ms")
    print(f"  all of {MANY:,} tensors: {Spread(**results['few_ms']['all']).show('ms')}")
    print(f"  one of them: {Spread(**results['few_ms']['one']).show('ms')}")
    print(f"  one / all: {results['few_ratio']:.3f}, aim ≤ {AIM_FEW}")
    for name, tensors in (("small", TENSORS), ("many", MANY)):
        rows = {way: Spread(**row) for way, row in results["beside_ms"][name].items()}
        print(f"  {tensors:,} tensors, in turns with safetensors (aim ≤ {AIM_BESIDE} ×):")
        for way, row in rows.items():
            print(f"    {way:28} {row.median / rows['safetensors'].median:5.2f} ×  {row.show('ms')}")
    print(f"  {results['sizes']['large'] / 2**20:,.0f} MiB, every page read:")
    for way, row in results["touch_ms"].items():
        print(f"    {way:28} {Spread(**row).show('ms', digits=1)}")
    print("  where it goes (ms, medians):      small   large")
    for step, row in results["steps_ms"].items():
        print(f"    {step:28} {row['small']:8.3f} {row['large']:7.3f}")
    print("  grpc was not imported")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=parse_size, default="64MiB", help="bytes of the small checkpoint")
    parser.add_argument("--large", type=parse_size, default="4GiB", help="bytes of the large checkpoint")
    parser.add_argument("--fresh", type=int, default=9, help="fresh processes that attach once")
    parser.add_argument("--few", type=int, default=9, help="attaches to all and to one of 20,000 tensors, in turns")
    parser.add_argument("--folder", type=Path, help="where to put checkpoints for the time (default: the system's)")
    parser.add_argument("--format", choices=("human", "json"), default="human")
    add_options(parser, rounds=200)
    options = parser.parse_args()
    parameters = {"small": options.small, "large": options.large, "tensors": TENSORS}
    report = Report("attach", parameters, packages=("weightd", "torch", "safetensors"))
    results = measure(options)
    record(results, report)
    report.write(options.results)
    if options.format == "json":
        print(json.dumps(results, indent=2))
    else:
        show(results)


if __name__ == "__main__":
    main()
