"""A minute of the soak, as `make soak` runs it for longer; and whether a soak would see what it looks for."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from soak.operations import Operations
from soak.plan import Plan
from soak.report import Report
from soak.soak import Options, Soak
from soak.versions import StoredFile, VersionWriter, mark_of
from support.backends import Backend
from support.daemon import Daemon

SECONDS = {"host": 60.0, "cuda_vmm": 20.0}


@pytest.mark.slow
@pytest.mark.backends("host", "cuda_vmm", double_only=True)
def test_nothing_is_found(backend: Backend, short_path: Path) -> None:
    budgets = (20, 32) if backend.is_host else (48, 80)
    soak = Soak(Options(backend, seconds=SECONDS[backend.name], budgets_mib=budgets), short_path)
    try:
        report = Report(soak.options, soak.plan, soak.run())
    finally:
        soak.close()
    assert report.findings == [], report.as_text()
    assert soak.happened.starts, "the daemon was never started again"
    print(report.as_text())


@pytest.fixture
def operations(start_daemon: Callable[..., Daemon], short_path: Path) -> Iterator[Operations]:
    """Those of a client in this process, with one file that it may load."""
    daemon = start_daemon()
    file = short_path / "c.safetensors"
    plan = Plan(str(short_path), str(daemon.socket), 1, [str(file)], [], 0.0, 1.0, can_fork=True)
    writer = VersionWriter(1, plan.register)
    writer.replace(StoredFile(file, 1))
    operations = Operations(plan, daemon.connect(), random.Random(1))
    yield operations
    operations.close_held()
    writer.close()


def findings(operations: Operations) -> list[str]:
    """What was found so far."""
    path = operations.plan.findings
    return [json.loads(line)["what"] for line in path.read_text().splitlines()] if path.exists() else []


def test_a_wrong_byte_is_found(operations: Operations) -> None:
    with operations.client.attach(operations.plan.files[0]) as attachment:
        assert operations.compare(attachment, "whole") > 1 << 20
        assert findings(operations) == []
        attachment.buffer("layer2")[-1] ^= 1  # of this process alone: the mapping is private
        operations.compare(attachment, "whole")
    assert findings(operations) == ["WRONG BYTES"]


def test_content_that_was_never_written_is_found(operations: Operations) -> None:
    path = Path(operations.plan.files[0])
    mark = mark_of(path)
    assert mark is not None
    path.write_bytes(path.read_bytes().replace(mark, b"?" * len(mark)))
    operations.attach_path()
    assert findings(operations) == ["content that was never written"]
