"""README as a new reader meets it: typed from its first command to its last, and each prints what README says."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.readme import Reader, told, typed


@pytest.fixture
def printed(short_path: Path) -> list[tuple[str, str, str]]:
    """Each command of README that can be run here, what README says that it prints, and what it prints."""
    with Reader(short_path) as reader:
        return list(typed(reader))


def test_readme_prints_what_it_says(printed: list[tuple[str, str, str]]) -> None:
    commands = [command.split(" --")[0] for command, _, _ in printed]
    assert commands[:3] == [
        "python examples/two_checkpoints.py",
        "weightd serve",
        "weightd load base.safetensors",
    ], "from nothing to a checkpoint: with the environment and the installation these are five commands"
    assert {"weightd ls", "weightd stats", "weightd ps", "weightd rm base", "weightd plan"} <= set(commands)
    for command, expected, output in printed:
        if expected:
            assert list(told(output)) == list(told(expected)), f"$ {command}\n{output}"
        assert "Traceback" not in output
