"""The commands of CONTRIBUTING.md: each is a recipe, each recipe is there, and what narrows the tests leaves some."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.longest import LONGEST

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()

COMMANDS = sorted({*re.findall(r"`(make [^`]+)`", PAGE), *re.findall(r"^make .+$", PAGE, re.M)})
NARROWED = [command for command in COMMANDS if "PYTEST_ARGS" in command]


def targets(command: str) -> list[str]:
    """What a command makes."""
    return [word for word in shlex.split(command)[1:] if "=" not in word]


def variables(command: str) -> dict[str, str]:
    """What a command sets."""
    return dict(word.split("=", 1) for word in shlex.split(command)[1:] if "=" in word)


def test_the_files_that_are_begun_first_are_there() -> None:
    assert [file for file in LONGEST if not (ROOT / file).is_file()] == []
    assert len({*LONGEST}) == len(LONGEST)


def test_no_merge_was_left_half_way() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    marks = re.compile(r"^(?:[<>|]{7}|={7}$|>>=)", re.M)
    assert [page.name for page in pages if marks.search(page.read_text())] == []


def test_every_recipe_is_explained() -> None:
    recipes = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.M)) - {"help"}
    assert recipes == {target for command in COMMANDS for target in targets(command)}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_made(command: str) -> None:
    done = subprocess.run(
        [*shlex.split(command), "--dry-run", "--silent"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in variables(command):
        assert re.search(rf"\$\({name}\)", MAKEFILE), f"nothing in the Makefile asks for {name}"


@pytest.mark.parametrize("command", NARROWED)
def test_what_narrows_the_tests_leaves_some(command: str) -> None:
    (target,) = targets(command)
    arguments = shlex.split(variables(command)["PYTEST_ARGS"])
    folders = ["tests/unit"] if target == "unit" else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *folders, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "::" in done.stdout


def test_some_commands_narrow_the_tests() -> None:
    assert {target for command in NARROWED for target in targets(command)} >= {"unit", "test"}


def test_the_tests_for_gpus_run_where_there_is_none() -> None:
    """On the double, and not a second time as tests of the double alone."""
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", "gpu",
            "--ignore=tests/unit",  # where there is none, and half of all tests
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    found = {line for line in done.stdout.splitlines() if "::" in line}
    assert len(found) >= 300
    assert len({line.partition("::")[0] for line in found}) >= 20, "files"
