"""Tables of the `weightd` command at the widths of terminals: what is shortened, left out, said once, and coloured."""

from __future__ import annotations

import contextlib
import re
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import pytest
from rich.cells import cell_len

from support.fake_client import CHECKPOINT, DIGEST, GIB, LOADED, FakeClient, Terminal
from weightd.cli import main
from weightd.plan_report import (
    BudgetPlan,
    BudgetStep,
    Difference,
    DifferingTensors,
    NearDuplicate,
    PlannedCheckpoint,
    PlannedComponent,
    PlannedPair,
    PlanReport,
    SharedPart,
    SkippedPath,
)
from weightd.types import LeaseInfo

pytest.importorskip("typer")
tables = pytest.importorskip("weightd.cli.tables")
planning = pytest.importorskip("weightd.cli.planning")

if TYPE_CHECKING:
    from pathlib import Path

WIDTHS = (60, 80, 160)
PATHS = [f"/home/alice/models/a/folder/with/a/long/name/{part * 9}/llama-{part}.safetensors" for part in "abc"]


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")


def on_terminal(*arguments: str) -> str:
    """What a command writes to a terminal."""
    with contextlib.redirect_stdout(Terminal()) as stream:  # not by a fixture: capturing begins anew after those
        assert main(arguments) == 0
    return stream.getvalue()


def shown(*arguments: str) -> list[str]:
    """The lines that a command shows on a terminal, without bold and colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", on_terminal(*arguments)).splitlines()


def plan_report() -> PlanReport:
    """A report with everything that can be in one."""
    component = PlannedComponent("text_encoder", 3, GIB, GIB)
    named = DifferingTensors("model.layers.*.self_attn.q_proj.weight", 32, GIB)
    return PlanReport(
        total_bytes=3 * GIB,
        unique_bytes=GIB,
        saved_bytes=2 * GIB,
        saved_ratio=2 / 3,
        read_bytes=0,
        checkpoints=tuple(PlannedCheckpoint(path, 3, GIB, 0, GIB, 1, (component,)) for path in PATHS),
        pairs=(PlannedPair((PATHS[0], PATHS[1]), GIB, (SharedPart((PATHS[0], PATHS[1]), GIB),)),),
        pairs_left_out=3,
        differences=(Difference((PATHS[0], PATHS[1]), 9, 32, GIB, (named,), (1, 0), ((named,), ())),),
        near_duplicates=(NearDuplicate(PATHS[0], PATHS[1], 0.96, 0.1, 1 << 26),),
        budget=BudgetPlan(GIB, GIB, 1, tuple(BudgetStep(path, GIB, GIB, path == PATHS[0], ()) for path in PATHS)),
        skipped=(SkippedPath(PATHS[2], "may not be read by this user; check its permissions"),),
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("command", ["ls", "ps", "stats", "inspect", "plan"])
def test_every_table_fits(command: str, width: int, fake: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.answers["checkpoints"] = [
        replace(CHECKPOINT, names=(path,), owner=owner, device=device, state=state, pinned=pinned)
        for path, owner, device, state, pinned in zip(
            PATHS, ("alice", "bob", "weightd"), ("host", "GPU-0123abcd-11", "host"), ("resident", "loading", "lost"),
            (True, False, False), strict=True,
        )
    ]  # fmt: skip
    fake.answers["leases"] = [
        LeaseInfo(at, 4242, at, f"user{at}", f"python serve.py {path}", path, "host", GIB, LOADED, waiting=at == 1)
        for at, path in enumerate(PATHS)
    ]
    details = fake.inspect("base")
    fake.answers["inspect"] = replace(
        details, sources=tuple(details.sources[0]._replace(file=path) for path in PATHS), reference=PATHS[0]
    )
    monkeypatch.setattr(planning, "ask", lambda *_: {"plan": asdict(plan_report())})
    monkeypatch.setattr(planning, "require_daemon", lambda _: None)
    monkeypatch.setenv("COLUMNS", str(width))
    arguments = [command, *(["base"] if command in ("inspect", "plan") else [])]
    lines = shown(*arguments)
    assert max(map(cell_len, lines)) <= width, "\n".join(lines)
    if command != "stats" and width == min(WIDTHS):
        assert any("…" in line for line in lines)
    if command not in ("stats", "inspect"):
        assert any(PATHS[1] in line for line in shown(*arguments, "--wide")), "in full"
    if command == "ls":
        assert len({line.split()[0] for line in lines[1:4]}) == 3, "what differs stays"


@pytest.mark.parametrize("width", WIDTHS)
def test_what_all_rows_say_is_said_once(width: int, fake: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.answers["checkpoints"] = [replace(CHECKPOINT, names=(name,)) for name in ("base", "tuned")]
    monkeypatch.setenv("COLUMNS", str(width))
    lines = shown("ls")
    assert "OWNER" not in lines[0]
    assert lines[1].startswith("base ")
    assert "in every row: DEVICE host, STATE resident, OWNER ada, PINNED yes" in " ".join(lines[3:])
    assert "left out" not in " ".join(lines)
    fake.answers["checkpoints"] = [CHECKPOINT, replace(CHECKPOINT, owner="eve")]
    assert "OWNER" in shown("ls")[0], "not what differs"


def test_one_row_that_fits_is_whole(fake: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    lines = shown("ls")
    assert len(lines) == 2
    assert lines[0].split()[:5] == ["NAME", "DIGEST", "DEVICE", "STATE", "OWNER"]


def test_wide_is_everything_in_full(fake: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.answers["checkpoints"] = [replace(CHECKPOINT, names=(path,)) for path in PATHS]
    monkeypatch.setenv("COLUMNS", "60")
    for option in ("--wide", "-w", "--no-trunc"):
        lines = shown("ls", option)
        assert len(lines) == 4
        assert "OWNER" in lines[0]
        assert lines[1].split()[:2] == [PATHS[0], DIGEST]


def test_a_pipe_gets_everything(
    fake: FakeClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.answers["checkpoints"] = [replace(CHECKPOINT, names=(path,)) for path in PATHS]
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4, "also if colours are wanted there"
    assert all(path in line and "ada" in line for path, line in zip(PATHS, lines[1:], strict=True))


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)],
)
def test_states_have_colours(
    environment: dict[str, str], coloured: bool, fake: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("COLUMNS", "160")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fake.answers["checkpoints"] = [CHECKPOINT, replace(CHECKPOINT, state="lost")]
    printed = on_terminal("ls")
    assert ("\x1b[32mresident" in printed, "\x1b[31mlost" in printed) == (coloured, coloured)


def test_elided() -> None:
    assert tables.elided("abcdefghij", 10) == "abcdefghij"
    assert tables.elided("abcdefghijk", 10) == "abcde…hijk"
    assert [len(tables.elided("x" * 50, width)) for width in (3, 4, 20)] == [3, 4, 20]
    assert cell_len(tables.elided("模型" * 20, 21)) <= 21, "characters of two columns"
    path = "/srv/models/experiments/run-0042/model-final.safetensors"
    assert tables.elided(path, 30) == "/srv/…/model-final.safetensors", "the last part of a path stays"
    assert tables.elided(path, 23) == "model-final.safetensors"
    assert tables.elided(path, 15) == "model-f…tensors"
    assert tables.elided("org/adapter-merged", 15) == "org/ada…-merged", "a repository is no path"


def test_a_size_is_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    tables.emit_text("unique 19.5 MiB, saved 1.88 KiB (0.1 %)", 27, "  ")
    assert capsys.readouterr().out == "unique 19.5 MiB, saved\n  1.88 KiB (0.1 %)\n"


def test_equal_last_parts_are_told_apart(fake: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [f"/srv/models/with/a/long/name/run-{number}/model.safetensors" for number in range(3)]
    fake.answers["checkpoints"] = [replace(CHECKPOINT, names=(path,)) for path in paths]
    for width in WIDTHS:
        monkeypatch.setenv("COLUMNS", str(width))
        assert len({line.split()[0] for line in shown("ls")[1:4]}) == 3


@pytest.mark.parametrize(
    ("components", "said"),
    [
        (("vae", "vae"), "vae 1.00 GiB"),
        (("unet", "model"), "unet = model 1.00 GiB"),
        (("", "text_encoder"), "text_encoder 1.00 GiB"),
        (("", ""), "-"),
    ],
)
def test_what_a_pair_shares_is_named(components: tuple[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = PlannedPair(("org/a", "org/b"), GIB, (SharedPart(components, GIB),))
    monkeypatch.setattr(planning, "ask", lambda *_: {"plan": asdict(replace(plan_report(), pairs=(pair,)))})
    (row,) = (line for line in shown("plan", "org/a", "--wide") if re.match(r"\S+ GiB +org/a", line))
    assert re.split(r" {2,}", row.strip())[1:] == ["org/a", "org/b", said]


def test_what_to_remove_is_said_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(f"org/tuned-{number}" for number in range(5))
    steps = (BudgetStep("wanted", GIB, GIB, fits=False, remove=names), BudgetStep("huge", GIB, GIB, False, ()))
    checkpoints = tuple(PlannedCheckpoint(name, 1, size, 0, 0, 0, ()) for name, size in (("wanted", 1), ("huge", GIB)))
    report = replace(plan_report(), checkpoints=checkpoints, budget=BudgetPlan(GIB - 1, 0, 0, steps))
    monkeypatch.setattr(planning, "ask", lambda *_: {"plan": asdict(report)})
    for width in WIDTHS:
        monkeypatch.setenv("COLUMNS", str(width))
        lines = shown("plan", "wanted")
        at = next(number for number, line in enumerate(lines) if line.startswith("LOAD"))
        table = lines[at : at + 8]
        assert all(any(name in line for line in table) for name in names), "\n".join(table)
        assert max(map(cell_len, table)) <= width
        assert any(line.rstrip().endswith("too large") for line in table), width


def test_inspect_shortens_where_it_came_from(fake: FakeClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake.answers["inspect"] = replace(fake.inspect("base"), reference=f"{tmp_path}/{'x' * 100}")
    monkeypatch.setenv("COLUMNS", "60")
    (line,) = (line for line in shown("inspect", "base") if line.startswith("from "))
    assert len(line) == 60
    assert "…" in line
    assert f"{'x' * 100}" in "\n".join(shown("inspect", "base", "-w"))
