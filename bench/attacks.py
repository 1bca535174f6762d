"""What a bystander notices of hostile peers. Needs root, and takes eleven minutes.

    python bench/attacks.py [--rounds 3] [--results FOLDER] [NAME ...]

Each attack gets a daemon of its own on host memory, and in each round first nothing, then the attack, by a process of
another user. Meanwhile a bystander in a process of its own pings and attaches a checkpoint of 4 MiB every 10 ms. Prints
a line of JSON for each: the p99 in ms of the medians of the rounds; how often the idle daemon's they are, median of the
rounds' ratios, and each round's; and by how many MiB the daemon has grown two seconds after the attack.
The aim is a factor of 5 at most, and 20 MiB. With `--results` the p99 of both, beside the idle daemon's of the same
round, become DATE-attacks.json. `make bench` does not run this.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("client", "daemon", "tests", ".")]

from _attacks import ATTACKS, SETUP, Attack  # noqa: E402  # after the path
from _results import Comparison, Report  # noqa: E402  # as above

from support import checkpoints  # noqa: E402  # as above
from support.daemon import Daemon, environment  # noqa: E402  # as above
from support.users import ALICE, user_of  # noqa: E402  # as above
from support.worker import Worker  # noqa: E402  # as above

SECONDS = 3.0
ZEROS = 50_000
AIM = 5.0
ATTACKED, IDLE = "weightd, attacked", "weightd, idle"
_BYSTANDER = """
import json, sys, time
import weightd
pings, attaches = [], []
with weightd.connect(sys.argv[1], timeout=60.0) as client:
    client.attach("victim").close()
    end = time.monotonic() + float(sys.argv[2])
    while time.monotonic() < end:
        begun = time.perf_counter()
        client.ping()
        between = time.perf_counter()
        client.attach("victim").close()
        attaches.append(time.perf_counter() - between)
        pings.append(between - begun)
        time.sleep(0.01)
p99 = lambda values: 1e3 * sorted(values)[int(len(values) * 0.99)]
print(json.dumps([p99(pings), p99(attaches)]))
"""
_AGAIN_AND_AGAIN = """
import threading, time
done, errors = 0, {}
def repeat():
    global done
    while True:
        try:
            attack()
        except Exception as error:  # refused, in whatever way: counted
            kind = type(error).__name__
            errors[kind] = errors.get(kind, 0) + 1
        done += 1
        time.sleep(pause)
for _ in range(threads):
    threading.Thread(target=repeat, daemon=True).start()
"""


def watch(daemon: Daemon) -> list[float]:
    """The p99 of a bystander's pings and attaches, in ms."""
    argv = [sys.executable, "-c", _BYSTANDER, str(daemon.socket), str(SECONDS)]
    run = subprocess.run(argv, env=environment(), stdout=subprocess.PIPE, check=True, timeout=120)
    found: list[float] = json.loads(run.stdout)
    return found


def beside(attack: Attack) -> dict[str, object]:
    """One round of an attack: the bystander's figures without it and with it, and what became of the daemon."""
    daemon = Daemon(argv=[sys.executable, "-m", "weightd_daemon"], socket_mode="0666", **dict(attack.settings))
    try:
        daemon.folder.chmod(0o755)
        victim = checkpoints.write_random(daemon.folder / "victim.safetensors", 4, 1 << 20)
        daemon.command("load", victim, "--name=victim")
        files = {"mine": checkpoints.write_random(daemon.folder / "mine.safetensors", 4, 1 << 20, seed="mine")}
        files["zeros"] = daemon.folder / "zeros.safetensors"
        checkpoints.write(files["zeros"], {f"t{number}": ("F32", (0,), b"") for number in range(ZEROS)})
        os.chown(files["mine"], ALICE, ALICE)
        watch(daemon)  # warms it up
        idle, before = watch(daemon), daemon.rss()
        worker = Worker(daemon.socket)
        try:
            user_of(worker, ALICE)
            given = {name: str(path) for name, path in files.items()}
            worker.run(SETUP, socket=str(daemon.socket), threads=attack.threads, pause=attack.pause, **given)
            worker.run(f"import time\n{attack.source}")
            worker.run(_AGAIN_AND_AGAIN)
            attacked = watch(daemon)
            done, errors = worker.run("result = [done, errors]")
        finally:
            worker.kill()
        time.sleep(2.0)
        return {
            "idle": idle,
            "attacked": attacked,
            "grown": (daemon.rss() - before) / (1 << 20),
            "done": done,
            "errors": errors,
            "log": daemon.logged().count("Traceback"),
        }
    finally:
        daemon.close(check=False)


def record(name: str, what: str, attacked: list[float], idle: list[float]) -> Comparison:
    """The p99 in ms of a bystander's pings or attaches, in the form of results."""
    return Comparison(
        f"{name}: {what}", f"99th percentile of a bystander's {what}, beside: {name}", "ms",
        {ATTACKED: attacked, IDLE: idle}, f"at most {AIM:.0f} × the idle daemon's", aims={IDLE: AIM},
    )  # fmt: skip


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="attacks; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write DATE-attacks.json into it as well")
    options = parser.parse_args()
    if options.results and options.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    report = Report("attacks", {"seconds of each": SECONDS, "tensors without bytes": ZEROS})
    for name in options.names or ATTACKS:
        rows = [beside(ATTACKS[name]) for _ in range(options.rounds)]
        line: dict[str, object] = {"beside": name}
        for place, what in enumerate(("ping", "attach")):
            idle, attacked = ([row[key][place] for row in rows] for key in ("idle", "attacked"))  # type: ignore[index]  # lists of two
            factors = [high / low for high, low in zip(attacked, idle, strict=True)]
            line[f"{what}_p99_ms"] = [round(statistics.median(values), 1) for values in (idle, attacked)]
            line[f"{what}_factor"] = [round(statistics.median(factors), 1), [round(factor, 1) for factor in factors]]
            if options.results:
                report.add(record(name, what, attacked, idle))
        line["grown_mib"] = round(max(row["grown"] for row in rows), 1)  # type: ignore[type-var, call-overload]  # floats
        line["done"] = [row["done"] for row in rows]
        line["errors"] = rows[-1]["errors"]
        line["tracebacks"] = sum(row["log"] for row in rows)  # type: ignore[misc]  # ints
        line["load_average"] = round(os.getloadavg()[0], 1)
        print(json.dumps(line), flush=True)
    report.write(options.results)


if __name__ == "__main__":
    main()
