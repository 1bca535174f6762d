"""What tests of a service need: a manager that keeps its descriptors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.manager import Manager


@pytest.fixture
def manager(short_path: Path) -> Iterator[Manager]:
    """A service manager, which forgets everything at the end."""
    manager = Manager(short_path / "notify")
    yield manager
    manager.close()
