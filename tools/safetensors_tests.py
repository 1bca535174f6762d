"""Run safetensors' own Python tests, with and without weightd's `safe_open` and `load_file` in place of its own.

    python tools/safetensors_tests.py FOLDER VERSION…

Nothing of safetensors is kept here: pip downloads each version, its wheel and its source distribution, into FOLDER. The
tests run twice, each time in an empty folder. Every test that passes without weightd is to pass with it; exit code 1
where one does not. This file is also the plugin that puts weightd in place and counts what it opens.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest


ROOT = Path(__file__).resolve().parents[1]
RESULTS = "SAFETENSORS_TESTS_RESULTS"
DROP_IN = "SAFETENSORS_TESTS_DROP_IN"
KNOWN = {
    "test_numpy_slice": "slices of numpy's arrays end at the end, as numpy's do, and numpy words its errors",
    "test_prefetch_device_overrides_the_handle": "opens a file for a GPU that is not there; we say so at once",
    "test_prefetch_plan_rejects_bad_entries": "the same",
    "test_prefetch_rejects_unsupported_dtype": "the same",
}
"""Tests that are known to fail with weightd, and why."""
NO_PACKAGES = ("flax", "mlx", "paddle", "tf")  # these frameworks are not installed
RUN_SECONDS = 600

# pip asks an sdist's build backend for its metadata before it keeps it, and safetensors' needs Rust for the answer.
BACKEND = """
import os
def get_requires_for_build_wheel(settings=None):
    return []
def prepare_metadata_for_build_wheel(folder, settings=None):
    name = "safetensors-{version}.dist-info"
    os.mkdir(os.path.join(folder, name))
    with open(os.path.join(folder, name, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: safetensors\\nVersion: {version}\\n")
    return name
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    arguments = parser.parse_args()
    failures = 0
    for version in arguments.versions:
        folder = arguments.folder.resolve() / version
        tests = fetch(folder, version)
        with tempfile.TemporaryDirectory(prefix="weightd-") as scratch:
            alone, _ = run(tests, folder, Path(scratch) / "alone", {})
            with_ours, opened = run_with_weightd(tests, folder, Path(scratch))
        passed = sorted(test for test, outcome in alone.items() if outcome == "passed")
        broken = [test for test in passed if with_ours.get(test) != "passed"]
        skipped = sum(outcome == "skipped" for outcome in alone.values())
        print(f"safetensors {version}: {len(passed)} tests pass without weightd, {len(passed) - len(broken)} with it;")
        print(
            f"  {skipped} are skipped, {len(alone) - len(passed) - skipped} fail without it; it opened {opened} files"
        )
        for test in broken:
            reason = KNOWN.get(test.rpartition("::")[2])
            print(f"  {with_ours.get(test, 'not run')}: {test}{f' (known: {reason})' if reason else ''}")
            failures += reason is None
        if not passed or not opened:
            print("  nothing was compared")
            failures += 1
    return 1 if failures else 0


def fetch(folder: Path, version: str) -> Path:
    """Download a version, unless it is there; returns the folder of its tests."""
    tests = folder / "tests"
    if tests.exists():
        return tests
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "backend").mkdir(parents=True)
    (folder / "backend" / "maturin.py").write_text(BACKEND.format(version=version))
    pip = [sys.executable, "-m", "pip"]
    wanted = ["--quiet", "--no-deps", f"safetensors=={version}"]
    subprocess.run([*pip, "install", "--target", str(folder / "site"), *wanted], check=True)
    source = ["--no-binary", "safetensors", "--no-build-isolation", "--dest", str(folder)]
    variables = {**os.environ, "PYTHONPATH": str(folder / "backend")}
    subprocess.run([*pip, "download", *source, *wanted], check=True, env=variables)
    (archive,) = folder.glob("safetensors-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "source", filter="data")
    (found,) = (folder / "source").glob("*/bindings/python/tests")
    found.rename(tests)  # last: what is here is whole
    return tests


def run_with_weightd(tests: Path, folder: Path, scratch: Path) -> tuple[dict[str, str], int]:
    """The tests on a daemon of their own."""
    socket = scratch / "s"
    command = [sys.executable, "-m", "weightd_daemon", "serve", "--device=host", "--budget=1GiB", "--log-level=error"]
    daemon = subprocess.Popen(
        [*command, f"--socket={socket}", f"--state-dir={scratch / 'state'}"],
        stdout=subprocess.PIPE, text=True, env=environment({}),
    )  # fmt: skip
    assert daemon.stdout is not None
    try:
        line = daemon.stdout.readline()
        if not line.startswith("weightd is ready"):
            raise SystemExit(f"the daemon did not start: {line!r}")
        return run(tests, folder, scratch / "with", {DROP_IN: "1", "WEIGHTD_SOCKET": str(socket)})
    finally:
        daemon.terminate()
        daemon.wait(20)
        daemon.stdout.close()


def run(tests: Path, folder: Path, scratch: Path, more: dict[str, str]) -> tuple[dict[str, str], int]:
    """Outcomes by test, and how many files weightd has opened."""
    (scratch / "tests" / "data").mkdir(parents=True)  # some write there
    results = scratch / "results.json"
    ignored = [f"--ignore={tests / f'test_{name}_comparison.py'}" for name in NO_PACKAGES]
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--rootdir={tests}", "--import-mode=importlib"]
    command += ["-p", "no:cacheprovider", "-p", Path(__file__).stem, *ignored, str(tests)]
    path = os.pathsep.join(map(str, (folder / "site", ROOT / "tools")))
    done = subprocess.run(
        command, cwd=scratch, env=environment({**more, RESULTS: str(results), "PYTHONPATH": path}),
        timeout=RUN_SECONDS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if not results.exists():
        raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    if DROP_IN in more and done.returncode:
        print(done.stdout)
    found = json.loads(results.read_text())
    return found["outcomes"], found["opened"]


def environment(more: dict[str, str]) -> dict[str, str]:
    """The environment of a child: our sources behind what `more` puts in front, and no setting of whoever runs this."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WEIGHTD_")}
    ours = [more.get("PYTHONPATH"), str(ROOT / "client"), str(ROOT / "daemon")]
    return {**clean, "XDG_CONFIG_HOME": "/nonexistent", **more, "PYTHONPATH": os.pathsep.join(filter(None, ours))}


# -- the plugin --------------------------------------------------------------------------------------------------------

outcomes: dict[str, str] = {}
opened = 0


def pytest_configure() -> None:
    """Put weightd in place, before any test module has imported the names."""
    if os.environ.get(DROP_IN):
        replace()


def replace() -> None:
    import safetensors
    import safetensors.numpy
    import safetensors.torch

    import weightd.torch

    theirs = safetensors.safe_open

    def safe_open(filename: Any, framework: Any, *arguments: Any, **options: Any) -> Any:
        global opened
        if framework not in ("pt", "torch", "pytorch", "np", "numpy"):
            return theirs(filename, framework, *arguments, **options)
        opened += 1
        return weightd.torch.safe_open(filename, framework, *arguments, **options)

    def load_file(*arguments: Any, **options: Any) -> Any:
        global opened
        opened += 1
        return weightd.torch.load_file(*arguments, **options)

    for module in (safetensors, safetensors.numpy, safetensors.torch):
        module.safe_open = safe_open
    safetensors.torch.load_file = load_file


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test has passed where all its phases have."""
    before = outcomes.get(report.nodeid, "passed")
    if before == "passed":
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    """Write what the other process reads."""
    Path(os.environ[RESULTS]).write_text(json.dumps({"outcomes": outcomes, "opened": opened}))


if __name__ == "__main__":
    sys.exit(main())
