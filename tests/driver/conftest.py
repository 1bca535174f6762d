"""Fixtures for tests of the fake driver."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import fakecuda
from support.program import Program, StartProgram, new_machine


@pytest.fixture
def program(fake_driver: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartProgram]:
    """Start programs with knobs as keywords, on a machine of the test's own. Afterwards its GPUs must be empty."""
    monkeypatch.setenv("FAKECUDA_MACHINE", new_machine())
    with contextlib.ExitStack() as started:

        def start(**knobs: Any) -> Program:
            return started.enter_context(contextlib.closing(Program(fake_driver, **knobs)))

        yield start
    assert [fakecuda.device_bytes(gpu) for gpu in range(2)] == [0, 0], "the memory of dead processes is gone"
    assert [fakecuda.context_bytes(gpu) for gpu in range(2)] == [[], []], "and their contexts are"
