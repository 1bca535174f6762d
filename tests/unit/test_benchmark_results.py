"""The form of benchmarks' results, and what `make bench-check` says about two runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "bench"))  # its scripts import each other so

import _results  # noqa: E402  # bench is on the path since the line before
import attacks  # noqa: E402  # as above
import check  # noqa: E402  # as above
import load  # noqa: E402  # as above
import suite  # noqa: E402
from _results import Comparison, Report, latest, read, to_json, turns  # noqa: E402

EVEN = [1.0, 1.1, 0.9, 1.0]


def comparison(
    ours: float, name: str = "warm", *, unit: str = "s", better: str = "less", others: tuple[str, ...] = ("mmap",)
) -> Comparison:
    """weightd takes so much more than others, with a spread of a few per cent."""
    samples = {"weightd": [round(ours * value, 3) for value in EVEN]} | {other: [1.0] * len(EVEN) for other in others}
    return Comparison(name, "a load", unit, samples, better="more" if better == "more" else "less")


def write(folder: Path, *comparisons: Comparison, size: int = 1, part: str = "peers") -> Path:
    """A folder with the results of a run."""
    report = Report(part, {"bytes": size})
    for one in comparisons:
        report.add(one)
    assert report.write(folder) is not None
    return folder


def compared(folder: Path, before: list[Comparison], after: list[Comparison], monkeypatch: pytest.MonkeyPatch) -> int:
    """What bench/check.py ends with."""
    old, new = write(folder / "old", *before), write(folder / "new", *after)
    monkeypatch.setattr(sys, "argv", ["check.py", str(old), str(new)])
    return check.main()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    one = comparison(2.0)
    write(tmp_path, one)
    (part,) = latest(tmp_path).values()
    assert part.comparisons == {"warm": one}
    assert part.head["parameters"] == {"bytes": 1}
    assert {"machine", "versions", "commit", "load_average", "seconds", "date", "command"} <= part.head.keys()
    assert {"cores", "architecture", "processor", "kernel", "python", "memory_gib"} == part.head["machine"].keys()


def test_a_comparison_may_have_aims(tmp_path: Path) -> None:
    aimed = Comparison("warm", "a load", "s", {"weightd": [2.0, 2.0], "mmap": [1.0, 1.0]}, "half", aims={"mmap": 0.5})
    write(tmp_path, aimed)
    assert latest(tmp_path)["peers"].comparisons["warm"] == aimed
    assert "aims" not in to_json(comparison(2.0)), "results from before have none, and stay the same"
    with pytest.raises(ValueError, match="no ratio to pread"):
        Comparison("warm", "a load", "s", {"weightd": [2.0, 2.0], "mmap": [1.0, 1.0]}, aims={"pread": 0.5})


@pytest.mark.parametrize(("ours", "better", "aim", "missed"), [
    ([2.0, 2.2], "less", 1.2, True),
    ([1.0, 1.8], "less", 1.2, False),  # the spread
    ([1.005, 1.005], "less", 1.0, False),  # no spread, but as good as
    ([1.02, 1.02], "less", 1.0, True),
    ([0.5, 0.5], "less", 1.0, False),
    ([0.5, 0.5], "more", 1.0, True),
    ([2.0, 2.0], "more", 1.0, False),
])  # fmt: skip
def test_a_prediction_is_missed_by_more_than_the_spread(
    ours: list[float], better: str, aim: float, missed: bool
) -> None:
    samples = {"weightd": ours, "mmap": [1.0, 1.0]}
    way: Any = better
    assert Comparison("warm", "", "s", samples, better=way, aims={"mmap": aim}).missed() == ["mmap"] * missed


def test_an_exponent_is_predicted_itself() -> None:
    assert Comparison("names", "", "", {"weightd": [0.8, 0.9]}, aims={"weightd": 0.3}).missed() == ["weightd"]


def test_what_a_run_writes_makes_no_sources_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false", *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    for path in ("bench/results/a.json", "bench/page.py", "docs/performance.md", "README.md", "client/a.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("before")
    monkeypatch.setattr(_results, "FOLDER", tmp_path / "bench/results")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message=all")
    clean = _results._commit()
    assert clean.isalnum()
    for path in ("bench/results/a.json", "docs/performance.md", "README.md"):
        (tmp_path / path).write_text("after")
    (tmp_path / "bench/results/new.json").write_text("new")
    assert _results._commit() == clean
    (tmp_path / "client/a.py").write_text("after")
    assert _results._commit() == f"{clean}+"


def test_attacks_are_comparisons_with_the_idle_daemon(tmp_path: Path) -> None:
    write(tmp_path, attacks.record("pins", "ping", [20.0, 20.0, 20.0], [2.0, 2.0, 2.0]), part="attacks")
    (one,) = latest(tmp_path)["attacks"].comparisons.values()
    assert one.missed() == [attacks.IDLE]
    assert one.ratio(attacks.IDLE).median == 10.0
    assert "attacks" not in suite.PARTS


def test_a_load_is_predicted_by_its_aims() -> None:
    seconds = {"load": [1.0, 1.0], "load_unhashed": [1.0, 1.0], "sendfile": [1.5, 1.5]}
    report = Report("load", {})
    load.record({"fresh": {"seconds": seconds}, "pooled": {"seconds": seconds}}, report)
    fresh, pooled = report.comparisons
    assert (1 / fresh.aims[load.SENDFILE], 1 / pooled.aims[load.SENDFILE]) == pytest.approx((1.3, 3.0))
    assert (fresh.missed(), pooled.missed()) == ([], [load.SENDFILE])


def test_fetches_are_predicted_beside_those_in_turn() -> None:
    fleet_fetch = pytest.importorskip("fleet_fetch")
    found = {"at_once": {"seconds": 1.0, "source_bytes": 3 << 20}, "in_turn": {"seconds": 1.0, "source_bytes": 4 << 20}}
    report = Report("fetch", {})
    fleet_fetch.record([found, found], report)
    assert [one.missed() for one in report.comparisons] == [[], [fleet_fetch.IN_TURN]]


def test_ratios_are_those_of_rounds(tmp_path: Path) -> None:
    """A machine that slows down by a factor of a hundred for some rounds changes no ratio."""
    samples = {"weightd": [1.0, 100.0, 10.0], "mmap": [2.0, 200.0, 20.0]}
    write(tmp_path, Comparison("warm", "a load", "s", samples))
    body = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert body["comparisons"][0]["ratios"]["mmap"] == {"median": 0.5, "low": 0.5, "high": 0.5}


def test_the_youngest_result_of_a_part_counts(tmp_path: Path) -> None:
    path = next(write(tmp_path, comparison(2.0)).glob("*.json"))
    path.rename(tmp_path / "1999-01-01-peers.json")
    write(tmp_path, comparison(3.0))
    assert latest(tmp_path)["peers"].comparisons["warm"] == comparison(3.0)


def test_nothing_is_written_without_a_folder() -> None:
    assert Report("peers", {}).write(None) is None


def test_sides_with_other_numbers_of_samples_were_not_in_turns() -> None:
    with pytest.raises(ValueError, match="not in turns"):
        Comparison("warm", "a load", "s", {"weightd": [1.0, 2.0], "mmap": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match="two samples"):
        Comparison("warm", "a load", "s", {"weightd": [1.0]})


def test_two_comparisons_of_one_name_are_an_error() -> None:
    report = Report("peers", {})
    report.add(comparison(2.0))
    with pytest.raises(ValueError, match="two comparisons"):
        report.add(comparison(3.0))


def test_a_file_of_another_form_is_named(tmp_path: Path) -> None:
    path = tmp_path / "2026-01-02-peers.json"
    for text in ("{", "{}", '{"form": 2}', '{"form": 1, "comparisons": [{"name": "warm"}]}', "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"2026-01-02-peers\.json is no result"):
            read(path)


def test_sides_take_turns_in_both_orders() -> None:
    calls: list[str] = []

    def side(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    found = turns({"a": lambda: side("a"), "b": lambda: side("b")}, rounds=3)
    assert "".join(calls) == "ab" + "ba" + "ab" + "ba"
    assert found == {"a": [4.0, 5.0, 8.0], "b": [3.0, 6.0, 7.0]}, "the first round does not count"
    assert turns({"a": lambda: side("a")}, rounds=2, warm_up=False) == {"a": [9.0, 10.0]}


def test_turns_end_in_time_but_not_before_three_rounds() -> None:
    assert turns({"a": lambda: 1.0}, rounds=100, seconds=0.0) == {"a": [1.0] * 3}


def test_the_same_run_has_not_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(tmp_path, [comparison(2.0)], [comparison(2.0)], monkeypatch) == 0
    assert capsys.readouterr().out == "1 ratios, of which 0 have moved by more than the spread, or are gone\n"


def test_a_ratio_within_the_spread_has_not_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compared(tmp_path, [comparison(2.0)], [comparison(2.04)], monkeypatch) == 0


@pytest.mark.parametrize(("better", "after", "said"), [
    ("less", 3.0, "worse"), ("less", 1.0, "better"), ("more", 1.0, "worse"), ("more", 3.0, "better"),
])  # fmt: skip
def test_a_ratio_that_has_moved_is_named(
    better: str, after: float, said: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ended = compared(tmp_path, [comparison(2.0, better=better)], [comparison(after, better=better)], monkeypatch)
    assert ended == (said == "worse")
    assert capsys.readouterr().out.startswith(f"{said}: peers/warm: mmap: 2 ×")


def test_small_ratios_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compared(tmp_path, [comparison(0.011)], [comparison(0.014)], monkeypatch)
    said = capsys.readouterr().out
    assert all(ratio in said for ratio in ("mmap: 0.011 ×", "now 0.014 ×")), said


def test_what_has_no_spread_moves_by_a_tenth_at_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exact(value: float) -> Comparison:
        return Comparison("1 × 1", "memory", "MiB", {"weightd": [value, value], "mmap": [100.0, 100.0]})

    assert compared(tmp_path, [exact(100.0)], [exact(105.0)], monkeypatch) == 0
    assert compared(tmp_path, [exact(100.0)], [exact(120.0)], monkeypatch) == 1


def test_an_exponent_is_compared_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = (comparison(value, unit="", others=()) for value in (0.2, 1.0))
    assert compared(tmp_path, [before], [after], monkeypatch) == 1
    assert "worse: peers/warm: weightd: 0.2 ×" in capsys.readouterr().out


def test_seconds_of_one_side_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compared(tmp_path, [comparison(1.0, others=())], [comparison(9.0, others=())], monkeypatch) == 0


def test_what_is_gone_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [comparison(2.0, others=("mmap", "pread")), comparison(2.0, "cold")]
    assert compared(tmp_path, before, [comparison(2.0)], monkeypatch) == 1
    said = capsys.readouterr().out
    assert "gone: peers/warm: pread, which was 2 ×" in said
    assert "gone: peers/cold" in said


@pytest.mark.parametrize(
    ("parts", "said"), [([], "attach"), (["--parts=peers,attach"], "attach"), (["--parts=peers"], "")]
)
def test_a_part_that_was_to_be_measured_and_was_not_is_gone(
    parts: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = write(tmp_path / "old", comparison(2.0)), write(tmp_path / "new", comparison(2.0))
    write(old, comparison(2.0), part="attach")
    write(old, comparison(2.0), part="engines-vllm")  # of `make bench-engines`, which the suite does not run
    monkeypatch.setattr(sys, "argv", ["check.py", str(old), str(new), *parts])
    assert check.main() == bool(said)
    gone = [line.split(",")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("gone")]
    assert gone == ([f"gone: {said}"] if said else [])


def test_runs_of_other_sizes_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = write(tmp_path / "old", comparison(2.0)), write(tmp_path / "new", comparison(9.0), size=2)
    monkeypatch.setattr(sys, "argv", ["check.py", str(old), str(new)])
    assert check.main() == 1
    assert "not compared: peers: {'bytes': 1} before, {'bytes': 2} now" in capsys.readouterr().out


def test_a_folder_without_results_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["check.py", str(write(tmp_path / "old", comparison(2.0))), str(tmp_path)])
    with pytest.raises(SystemExit):
        check.main()
    assert "has no results: `make bench` writes them" in capsys.readouterr().err


def test_the_suite_is_bounded() -> None:
    assert sum(part.limit for part in suite.PARTS.values()) <= suite.MOST_SECONDS


@pytest.mark.parametrize("name", suite.PARTS)
def test_a_part_of_the_suite_is_a_script(name: str) -> None:
    source = (ROOT / "bench" / suite.PARTS[name].script).read_text()
    assert f'Report("{name}"' in source or f'"{name}",' in source
    assert "add_options(parser" in source
    assert '"--folder"' in source


@pytest.mark.parametrize(("source", "said"), [
    ("", ""),
    ("raise SystemExit(3)", "ended with 3"),
    ("import time; time.sleep(1000)", "took more than 1 s"),
])  # fmt: skip
def test_a_part_that_fails_costs_only_itself(
    source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "part.py").write_text(source)
    monkeypatch.setattr(suite, "HERE", tmp_path)
    limit = 1.0 if "took" in said else 60.0
    assert suite.run(suite.Part("part.py", limit=limit), tmp_path, None, quick=True) == said


@pytest.mark.parametrize(("rounds", "quick", "given"), [
    (40, True, "3"), (2, True, "2"), (None, True, "3"), (40, False, "40"), (None, False, ""),
])  # fmt: skip
def test_a_quick_part_has_three_rounds_at_most(
    rounds: int | None, quick: bool, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "part.py").write_text(
        "import argparse, pathlib; parser = argparse.ArgumentParser(); parser.add_argument('--rounds', default='')\n"
        "options, rest = parser.parse_known_args(); pathlib.Path(rest[1], 'rounds').write_text(options.rounds)"
    )
    monkeypatch.setattr(suite, "HERE", tmp_path)
    part = suite.Part("part.py", ("--size", "1GiB"), rounds=rounds)
    assert suite.run(part, tmp_path, None, quick=quick) == ""
    assert (tmp_path / "rounds").read_text() == given


@pytest.mark.parametrize("name", suite.PARTS)
def test_no_part_overrides_its_rounds(name: str) -> None:
    assert "--rounds" not in suite.PARTS[name].arguments


@pytest.mark.parametrize("deaf", ["child", "parent"])
def test_a_late_part_that_does_not_end_is_killed_with_its_children(
    deaf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon or a script that ignores SIGTERM."""
    (tmp_path / "part.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "child = os.fork()\n"
        f"if (child == 0) == ({deaf!r} == 'child'):\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if child:\n"
        "    pathlib.Path(sys.argv[2], 'child').write_text(str(child))\n"
        "time.sleep(30)\n"
    )
    monkeypatch.setattr(suite, "HERE", tmp_path)
    monkeypatch.setattr(suite, "GRACE", 0.3)
    begun = time.monotonic()
    said = suite.run(suite.Part("part.py", limit=2.0), tmp_path, None, quick=False)
    child = int((tmp_path / "child").read_text())
    try:
        assert said == "took more than 2 s"
        assert time.monotonic() - begun < 15
        assert not _runs(child)
    finally:
        if _runs(child):
            os.kill(child, signal.SIGKILL)


def _runs(pid: int) -> bool:
    """Whether a process is there, and does not only wait to be reaped by whoever has inherited it."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        if state == "Z":
            return False
        time.sleep(0.02)
    return True
