"""`weightd top` without a terminal: what the daemon's answers become, line by line."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from support.fake_client import GIB, MIB
from weightd.types import CheckpointDetails, ComponentInfo

pytest.importorskip("typer")
lines = pytest.importorskip("weightd.top.lines")
memory = pytest.importorskip("weightd.top.memory")
panels = pytest.importorskip("weightd.top.panels")
rows = pytest.importorskip("weightd.top.checkpoint_rows")
table = pytest.importorskip("weightd.top.table")
details = pytest.importorskip("weightd.top.details")
snapshots = pytest.importorskip("support.top_snapshots")

ANSWERS, NOW, U = snapshots.ANSWERS, snapshots.NOW, lines.UNICODE
WIDTHS = [20, 40, 60, 80, 100, 160]


def texts(found: list[Any]) -> list[str]:
    return [lines.plain(line) for line in found]


def called(found: list[Any]) -> list[str]:
    return [row.checkpoint.name if row.process is None else f"pid {row.process.pid}" for row in found]


# Memory


def test_parts_add_up_to_the_budget() -> None:
    split = memory.parts(snapshots.HOST)
    assert sum(count for _, count in split.named()) == GIB
    assert (split.pinned, split.leased, split.idle) == (100 * MIB, 184 * MIB, 172 * MIB)
    assert (split.in_flight, split.holes, split.pool, split.free) == (240 * MIB, 8 * MIB, 32 * MIB, 288 * MIB)
    assert (split.others, split.outside, split.room) == (0, None, 500 * MIB)


def test_what_others_use_is_not_free() -> None:
    gpu = replace(snapshots.HOST, uuid="GPU-1", kind="cuda_vmm", device_free_bytes=100 * MIB)
    split = memory.parts(gpu, total=2 * GIB)
    assert (split.free, split.others, split.room) == (100 * MIB, 188 * MIB, 312 * MIB)
    assert split.outside == 2 * GIB - 100 * MIB - 736 * MIB
    assert sum(count for _, count in split.named()) == GIB


def test_a_daemon_that_does_not_say_what_is_pinned_has_no_negative_parts() -> None:
    old = replace(snapshots.HOST, pinned_bytes=0, leased_bytes=0, evictable_bytes=0, hole_bytes=0)
    assert memory.parts(old).idle == 456 * MIB
    odd = replace(snapshots.HOST, evictable_bytes=GIB, hole_bytes=GIB, pinned_bytes=GIB)
    assert min(count for _, count in memory.parts(odd).named()) == 0


@pytest.mark.parametrize("width", [4, 7, 40, 100])
def test_every_part_of_a_bar_is_seen(width: int) -> None:
    columns = lines.shares([1, 0, 10**9, 5], 10**9 + 6, width)
    assert sum(columns) <= width
    assert columns[1] == 0
    assert min(columns[0], columns[2], columns[3]) >= 1
    assert lines.shares([1, 2], 0, width) == [0, 0]


# Lines


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("glyphs", [lines.UNICODE, lines.ASCII])
def test_tables_and_panels_fit(width: int, glyphs: Any) -> None:
    found = rows.chosen(rows.checkpoint_rows(ANSWERS), rows.TableView())
    shown = panels.head(snapshots.SNAPSHOT, width, glyphs) + panels.recent(snapshots.SNAPSHOT, width, 8, glyphs)
    if width >= 40:
        shown += panels.devices(ANSWERS, width, glyphs)
    if width >= 60:
        shown += table.table(found, rows.TableView(selected=found[1].key), 0, 20, width, NOW, glyphs)
    assert max(map(lines.width_of, shown)) <= width


def test_sizes_are_not_broken() -> None:
    text = "It has 92.0 MiB of 1.00 GiB and 17 B"
    for width in range(12, 40):
        for line in texts(lines.wrapped(text, width, 9)):
            assert not line.endswith(("92.0", "1.00", "17"))
    assert texts(lines.wrapped("a b c d e f g", 3, 2)) == ["a b", "c …"]
    assert lines.wrapped(text, 20, 0) == []


def test_a_hostile_name_steers_no_terminal() -> None:
    evil = replace(snapshots.CHECKPOINTS[0], names=("\x1b[2Jx\u202e\n",), owner="\x07")
    lease = snapshots.lease(1, 1, "\x1b[2Jx\u202e\n", "\x1b]0;t\x07", "\x9b")
    answers = replace(ANSWERS, checkpoints=(evil,), leases=(lease,), pairs=())
    everything = rows.checkpoint_rows(answers)
    found = rows.chosen(everything, rows.TableView())
    shown = texts(table.table(found, rows.TableView(), 0, 20, 160, NOW, U))
    shown += [table.about(row, everything, U) for row in found]
    shown += texts(details.details(everything[0], None, everything, 160, NOW, U))
    shown += texts(
        panels.loads(replace(ANSWERS, loads=(replace(snapshots.LOAD, names=("\x1b[2J",), user="\x1b"),)), 80, U)
    )
    shown += texts(panels.head(replace(snapshots.SNAPSHOT, problem="\x1b[2J"), 80, U))
    assert len(shown) > 10
    assert all(line.isprintable() for line in shown)


def test_ages() -> None:
    assert [panels.duration(seconds) for seconds in (-1, 0, 59.9, 60, 7200, 86400 * 9)] == [
        "0 s", "0 s", "59 s", "1 m", "2 h", "9 d",
    ]  # fmt: skip
    assert panels.age(None, NOW) == ""


# Panels


def test_the_head_says_how_long_nobody_has_answered() -> None:
    gone = replace(snapshots.SNAPSHOT, problem="no daemon there", since=NOW - timedelta(seconds=90))
    assert texts(panels.head(gone, 80, U))[1] == "no daemon there"
    assert "NO ANSWER for 1 m: what follows is old" in texts(panels.head(gone, 80, U))[0]
    assert "NO ANSWER" in texts(panels.head(replace(gone, answers=None, since=None), 80, U))[0]
    draining = replace(ANSWERS, stats=replace(ANSWERS.stats, state="draining"))
    assert "draining" in texts(panels.head(replace(snapshots.SNAPSHOT, answers=draining), 80, U))[0]


def test_devices_have_a_legend_of_what_is_there() -> None:
    gpu = replace(
        snapshots.HOST, uuid="GPU-01234567-89ab-cdef-0123-456789abcdef", kind="cuda_vmm", name="NVIDIA H100",
        device_free_bytes=100 * MIB,
    )  # fmt: skip
    lost = replace(snapshots.HOST, uuid="GPU-1", kind="cuda_vmm", name="other", absence="the driver does not answer")
    answers = replace(
        ANSWERS, stats=replace(ANSWERS.stats, devices=(snapshots.HOST, gpu, lost)), totals={gpu.uuid: 2 * GIB}
    )
    shown = "\n".join(texts(panels.devices(answers, 160, U)))
    for said in (
        "used by others 188 MiB",
        "others use 1.18 GiB of the whole GPU",
        "absent: the driver does not answer",
    ):
        assert said in shown
    assert "a load can get 500 MiB" in shown
    assert len(panels.devices(answers, 160, U, explained=False)) == 3


def test_loads_say_how_far_they_are() -> None:
    waiting = replace(snapshots.LOAD, load=10, names=(), progress=None, user="")
    (first, second) = texts(panels.loads(replace(ANSWERS, loads=(snapshots.LOAD, waiting)), 120, U))
    assert "copying" in first
    assert " 40 % of 240 MiB  49.6 MiB/s  3 s left  by eve" in first
    assert "waits for its turn" in second
    many = replace(ANSWERS, loads=tuple(replace(snapshots.LOAD, load=at) for at in range(9)))
    assert texts(panels.loads(many, 120, U))[-1] == "and 5 loads more"
    assert panels.loads(replace(ANSWERS, loads=None), 120, U) == []


def test_a_refusal_stays_until_it_is_old_or_the_load_succeeds() -> None:
    refused, after = snapshots.REFUSED, snapshots.event("detached", 1)
    assert panels.refusal([refused, after], NOW) is refused
    assert panels.refusal([refused, after], NOW + timedelta(minutes=11)) is None
    other = snapshots.event("load_ended", 5, names=("tuned",), reason="OK")
    assert panels.refusal([refused, other], NOW) is refused
    assert panels.refusal([refused, replace(other, names=refused.names)], NOW) is None
    shown = texts(panels.recent(snapshots.SNAPSHOT, 60, 6, U))
    assert shown[0][8:] == " not loaded: huge.safetensors: 900 MiB do not fit on"
    assert len(shown) == 6
    assert texts(panels.recent(snapshots.SNAPSHOT, 60, 0, U)) == []


# Rows


def test_processes_stand_under_what_they_hold() -> None:
    found = rows.chosen(rows.checkpoint_rows(ANSWERS), rows.TableView())
    assert called(found) == [
        "SmolLM2-135M-Instruct.safetensors", "pipelines/sd-a", "pid None", "pipelines/sd-b",
        "base", "pid 99", "pid 4242", "tuned", "pid 4242",
    ]  # fmt: skip
    twice = replace(ANSWERS, leases=(*ANSWERS.leases, snapshots.lease(8, 4242, "tuned", snapshots.SERVE)))
    assert called(rows.chosen(rows.checkpoint_rows(twice), rows.TableView())) == called(found)


def test_sorting_and_filtering() -> None:
    everything = rows.checkpoint_rows(ANSWERS)

    def names(**view: Any) -> list[str]:
        return [row.checkpoint.name for row in rows.chosen(everything, rows.TableView(**view)) if row.process is None]

    assert names(sort="name") == [
        "SmolLM2-135M-Instruct.safetensors",
        "base",
        "pipelines/sd-a",
        "pipelines/sd-b",
        "tuned",
    ]
    assert names(sort="size")[:2] == ["base", "tuned"]
    assert names(sort="leases")[0] == "base"
    assert names(sort="used")[-1] == names(sort="used", reverse=True)[0] == "SmolLM2-135M-Instruct.safetensors"
    assert names(wanted="SD-") == ["pipelines/sd-a", "pipelines/sd-b"]
    assert names(wanted="c" * 9) == ["pipelines/sd-a"]
    assert called(rows.chosen(everything, rows.TableView(wanted="chat.py"))) == ["base", "pid 99"]
    assert names(wanted="nothing") == []
    assert set(rows.ORDERS) <= set(table._COLUMNS)


def test_the_selection_stays_with_its_row() -> None:
    found = rows.chosen(rows.checkpoint_rows(ANSWERS), rows.TableView())
    assert rows.place(found, found[4].key, 0) == 4
    assert rows.place(found, ("host", "gone"), 3) == 3
    assert rows.place(found, None, 99) == len(found) - 1
    assert rows.place([], None, 3) == 0


def test_paths_are_called_by_their_last_part_unless_two_are_alike() -> None:
    one, other = (replace(snapshots.CHECKPOINTS[0], names=(f"/{at}/model",), content_digest=at * 64) for at in "ab")
    assert [row.name for row in rows.checkpoint_rows(replace(ANSWERS, checkpoints=(one,)))] == ["model"]
    assert [row.name for row in rows.checkpoint_rows(replace(ANSWERS, checkpoints=(one, other)))] == [
        "/a/model",
        "/b/model",
    ]
    nameless = replace(one, names=(), content_digest="sha256:" + "0" * 64)
    assert rows.checkpoint_rows(replace(ANSWERS, checkpoints=(nameless,)))[0].name == "0" * 12


def test_what_is_loading_is_listed_once() -> None:
    loading = replace(snapshots.CHECKPOINTS[0], state="loading", content_digest="", names=("new",))
    assert rows.checkpoint_rows(replace(ANSWERS, checkpoints=(loading,))) == []
    assert len(rows.checkpoint_rows(replace(ANSWERS, checkpoints=(loading,), loads=None))) == 1


# The selected row


def about(wanted: str, answers: Any = ANSWERS) -> str:
    everything = rows.checkpoint_rows(answers)
    row = next(row for row in rows.chosen(everything, rows.TableView()) if wanted in called([row]))
    return table.about(row, everything, U)


def test_the_selected_row_is_explained() -> None:
    assert about("base") == (
        "base: removing it gives back 14.0 MiB of 200 MiB. It shares 186 MiB with tuned. "
        "It is pinned and held by pid 99 (bob) and pid 4242 (ada)."
    )
    assert about("pipelines/sd-b").endswith("Nobody holds it: it may be evicted.")
    assert about("pipelines/sd-a").endswith("It is held by an unknown process (?).")
    assert "It shares nothing." in about("SmolLM2-135M-Instruct.safetensors")
    assert about("pid 4242") == (
        "pid 4242 (ada) holds base and tuned. It has 12.0 MiB of private copies, made by writing to weights. "
        "python serve.py --port 8000"
    )
    assert "How much it has copied by writing to weights is not known" in about("pid 99")
    unknown = replace(ANSWERS, pairs=None)
    assert "186 MiB are shared." in about("base", unknown)
    lost = replace(ANSWERS, checkpoints=(replace(snapshots.CHECKPOINTS[0], state="lost"),))
    assert about("base", lost) == "base is lost."
    assert table.about(None, [], U) == "nothing is loaded"


def test_details_name_partners_by_component_and_what_both_give_back() -> None:
    everything = rows.checkpoint_rows(ANSWERS)
    row = next(row for row in everything if row.name == "pipelines/sd-a")
    found = CheckpointDetails(row.info, (ComponentInfo("vae", 3, MIB, 0),), 1, (), "host", "a note", "/models/sd-a")
    shown = "\n".join(texts(details.details(row, found, everything, 120, NOW, U)))
    for said in ("vae", "a note", "/models/sd-a", "text_encoder 20.0 MiB, vae 10.0 MiB", "110 MiB", "unknown"):
        assert said in shown
    assert "COMPONENT" not in "\n".join(texts(details.details(everything[4], None, everything, 120, NOW, U)))
