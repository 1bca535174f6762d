"""A minute of the soak, as `make soak` runs it for longer; and whether a soak would see what it looks for."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import weightd
from soak import versions
from soak.operations import Operations
from soak.plan import Plan
from soak.report import Report
from soak.soak import Options, Soak
from soak.versions import MARK_BYTES, StoredFile, VersionWriter, mark_of
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
def plan(start_daemon: Callable[..., Daemon], short_path: Path) -> Plan:
    """Of one client that may load one file."""
    file = short_path / "c.safetensors"
    return Plan(str(short_path), str(start_daemon().socket), 1, [str(file)], [], 0.0, 1.0, can_fork=True)


@pytest.fixture
def writer(plan: Plan) -> Iterator[VersionWriter]:
    """It has written that file."""
    with contextlib.closing(VersionWriter(1, plan.register)) as writer:
        writer.replace(StoredFile(Path(plan.files[0]), 1))
        yield writer


@pytest.fixture
def operations(plan: Plan, writer: VersionWriter) -> Iterator[Operations]:
    """Those of a client in this process."""
    assert writer.written
    with weightd.connect(plan.socket) as client:
        operations = Operations(plan, client, random.Random(1))
        yield operations
        operations.close_held()


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


def test_a_load_between_two_steps_of_a_rewrite_has_the_bytes_of_one(
    operations: Operations, writer: VersionWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(operations.plan.files[0])
    marks: list[bytes] = []
    at = path.read_bytes().index(mark_of(path) or b"")

    def attach_between(_: float) -> None:
        marks.append(path.read_bytes()[at : at + MARK_BYTES])
        with operations.client.attach(path) as attachment:
            operations.compare(attachment, "between")

    monkeypatch.setattr(versions, "time", SimpleNamespace(sleep=attach_between))
    writer.rewrite(StoredFile(path, 1))
    assert len(set(marks)) == 6
    assert findings(operations) == []
    data = path.read_bytes()
    path.write_bytes(data[:at] + marks[0] + data[at + MARK_BYTES :])  # what no step had: its mark, and the last bytes
    with operations.client.attach(path) as attachment:
        operations.compare(attachment, "torn")
    assert set(findings(operations)) == {"WRONG BYTES"}
