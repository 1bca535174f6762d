"""The checklists of docs/architecture.md: each format and each device is in every place that the steps name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from support.backends import EVERY
from weightd import types
from weightd._formats import FORMATS, Format, format_of
from weightd._mapping import opening
from weightd._proto.v1 import handles_pb2
from weightd_daemon.devices import access
from weightd_daemon.formats.registry import READERS

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
DEVICES = ROOT / "daemon" / "weightd_daemon" / "devices"
FORMAT_STEPS, DEVICE_STEPS = 7, 7


def steps(title: str) -> list[str]:
    """The numbered steps of a checklist."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## )", ARCHITECTURE, re.DOTALL | re.MULTILINE)
    assert found, title
    return re.split(r"^\d+\. ", found[1], flags=re.MULTILINE)[1:]


def named(step: str, row: str) -> list[tuple[Path, str]]:
    """The files that a step names for a row, and the name in each; "" where it names only the file."""
    spans = re.findall(r"`([\w/.]+\.(?:py|proto))(?:::(\w+))?`", step)
    return [(ROOT / path.replace("NNNN", row), name) for path, name in spans]


def defines(path: Path, name: str) -> bool:
    """Whether a file has a definition of that name at its top level."""
    if path.suffix == ".proto":
        return re.search(rf"^(message|enum) {name} ", path.read_text(), re.MULTILINE) is not None
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return name in found


ROWS = [("To add a format", row.name) for row in FORMATS] + [("To add a device", kind) for kind in opening.KINDS]


@pytest.mark.parametrize(("title", "row"), ROWS)
def test_what_the_steps_name_is_there(title: str, row: str) -> None:
    listed = steps(title)
    assert len(listed) == (FORMAT_STEPS if title == "To add a format" else DEVICE_STEPS)
    for step in listed:
        places = named(step, row)
        assert places, f"a step names no file: {step}"
        for path, name in places:
            assert path.is_file(), path
            assert not name or defines(path, name), f"{path}::{name}"


def test_a_checklist_that_is_wrong_is_noticed() -> None:
    assert named("`formats/NNNN.py::read_layout` and `a/b.proto`", "x") == [
        (ROOT / "formats/x.py", "read_layout"),
        (ROOT / "a/b.proto", ""),
    ]
    assert defines(ROOT / "client/weightd/_formats.py", "FORMATS")
    assert not defines(ROOT / "client/weightd/_formats.py", "startswith")
    assert not defines(ROOT / "protos/weightd/v1/handles.proto", "names")


def test_every_format_has_a_reader_and_its_files_are_known_by_it() -> None:
    assert set(READERS) == set(FORMATS)
    for row, reader in READERS.items():
        assert reader.__module__ == f"weightd_daemon.formats.{row.name}"
        assert format_of(row.magic + b"\0\0\0\0\0\0\0\0") is row
    *signed, last = FORMATS
    assert all(row.magic for row in signed)
    assert last.magic == b""


def test_every_module_that_reads_a_layout_is_a_row() -> None:
    folder = ROOT / "daemon" / "weightd_daemon" / "formats"
    modules = {path.stem for path in folder.glob("*.py") if defines(path, "read_layout")}
    assert modules - {"registry"} == {row.name for row in FORMATS}


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_nobody_else_writes_a_suffix_or_a_magic(row: Format) -> None:
    """One that stands somewhere else as well would be forgotten there. A name of one file, or a pattern, is none."""
    found = []
    for root in ("client", "daemon", "fleet"):
        for path in (ROOT / root).rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text()))
            written = [node.value for node in nodes if isinstance(node, ast.Constant)]
            if path.name != "_formats.py" and any(sign in written for sign in (row.suffix, row.magic) if sign):
                found.append(path.name)
    assert found == []


def test_element_types_are_on_the_wire() -> None:
    on_wire = {name.removeprefix("DTYPE_") for name in handles_pb2.DType.keys()} - {"UNSPECIFIED"}  # noqa: SIM118  # no dict
    assert set(types.DTYPE_BITS) <= on_wire


def test_every_kind_of_device_is_known_to_all() -> None:
    assert set(opening.KINDS) == set(access.KINDS) == set(EVERY)
    sources = "\n".join(path.read_text() for path in DEVICES.glob("*.py"))
    made = set(re.findall(r'^    kind = "(\w+)"$', sources, re.MULTILINE))
    assert made == set(opening.KINDS)
    table = re.findall(r"^\| `(\w+)` \|", ARCHITECTURE.partition("## Devices")[2].partition("\n## ")[0], re.MULTILINE)
    assert set(table) == set(opening.KINDS)
    proto = (ROOT / "protos/weightd/v1/handles.proto").read_text()
    (comment,) = re.findall(r"// (How the segments are shared: .*)\n  string kind = ", proto)
    assert set(re.findall(r'"(\w+)"', comment)) == set(opening.KINDS)


def test_the_contract_runs_on_every_kind() -> None:
    contract = ROOT / "tests" / "contract"
    assert "backends(*EVERY)" in (contract / "test_segment_io.py").read_text()
    devices = (contract / "test_device.py").read_text().partition("\nDEVICES: ")[2].partition("\n}\n")[0]
    assert set(re.findall(r'^    "(\w+)": ', devices, re.MULTILINE)) == set(EVERY)
