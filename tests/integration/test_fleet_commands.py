"""`weightd fleet plan` and `weightd fleet publish`: as commands, without a daemon but in the test that compares."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import checkpoints, workloads
from support.command import run as run_weightd
from support.daemon import Daemon, environment
from weightd._sizes import size

KIB, MIB = 1 << 10, 1 << 20
DEEPFLOYD = workloads.DATA / "deepfloyd_if_I_II_f32.json.gz"


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run_weightd(
        ["fleet", *map(str, arguments)],
        environment() | {"WEIGHTD_STATE_DIR": "/nonexistent"} | variables,
        environment(),
    )


def planned(*arguments: str | Path) -> dict[str, Any]:
    finished = run("plan", *arguments, "--format", "json")
    assert (finished.returncode, finished.stderr) == (0, "")
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


def failure(*arguments: str | Path) -> tuple[int, str]:
    finished = run(*arguments)
    assert finished.stdout == ""
    assert finished.stderr.startswith("weightd: ")
    assert finished.stderr.count("\n") == 1
    return finished.returncode, finished.stderr


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints of 1 MiB with 768 KiB in common, and another one of 1 MiB."""
    folder = tmp_path_factory.mktemp("family")
    common = {number: ("common", number) for number in range(6)}
    return [
        checkpoints.write_random(folder / "base.safetensors", 8, 128 * KIB, "base", common),
        checkpoints.write_random(folder / "tuned.safetensors", 8, 128 * KIB, "tuned", common),
        checkpoints.write_random(folder / "loner.safetensors", 8, 128 * KIB, "loner"),
    ]


def test_checkpoints_that_share_go_on_one_node(family: list[Path]) -> None:
    base, tuned, loner = map(str, family)
    found = planned("--nodes", "3", "--budget", "1300KiB", *family)
    nodes = {node["name"]: node for node in found["nodes"]}
    assert list(nodes) == ["node-1", "node-2", "node-3"]
    assert sorted(sorted(node["checkpoints"]) for node in nodes.values()) == [[], [base, tuned], [loner]]
    for node in nodes.values():
        assert list(node) == ["name", "checkpoints", "used_bytes", "budget_bytes"]
        assert node["used_bytes"] <= node["budget_bytes"] == 1300 * KIB
    assert found["total_bytes"] == 3 * MIB
    assert found["placed_bytes"] == sum(node["used_bytes"] for node in nodes.values())
    assert 2 * MIB + 256 * KIB <= found["placed_bytes"] <= 2 * MIB + 256 * KIB + 3 * 4 * KIB, "a page of each"
    assert (found["least_nodes"], found["least_nodes_apart"], found["unplaced"]) == (2, 3, [])
    (why,) = (each["why"] for each in found["placements"] if each["checkpoint"] == base)
    assert why == f"shares 768 KiB of 1.00 MiB there, 768 KiB of it with {tuned}"


def test_the_daemon_takes_what_was_planned_and_no_more(family: list[Path], start_daemon: Callable[..., Daemon]) -> None:
    found = planned("--nodes", "1", "--budget", "1GiB", *family)
    client = start_daemon(budget=found["nodes"][0]["used_bytes"], pool=0).connect()
    for path in family:
        client.load(path)
    (device,) = client.stats().devices
    assert device.budget_bytes - 3 * 4 * KIB <= device.used_bytes <= device.budget_bytes
    assert len(client.checkpoints()) == 3, "nothing was evicted"


def test_what_does_not_fit_is_named_with_the_reason(family: list[Path]) -> None:
    found = planned("--nodes", "1", "--budget", "1300KiB", *family)
    assert found["unplaced"] == [str(family[2])]
    assert found["least_nodes"] is None
    finished = run("plan", "--nodes", "1", "--budget", "1300KiB", *family)
    assert finished.returncode == 0
    taken = f"What was placed takes {size(found['placed_bytes'])}; without sharing 2.00 MiB."
    assert f"\n1 of 3 checkpoints does not fit on 1 node. {taken}\n" in finished.stdout, "of 2 that were placed"
    assert finished.stdout.endswith(
        f"{family[2]}: 1 replica not placed: needs 1.00 MiB or more on a node, and the emptiest has 12.0 KiB left\n"
    )


def test_replicas_are_on_different_nodes(family: list[Path]) -> None:
    found = planned("--nodes", "2", "--budget", "3MiB", "--replicas", "2", *family[:2])
    assert [sorted(node["checkpoints"]) for node in found["nodes"]] == [sorted(map(str, family[:2]))] * 2
    found = planned("--nodes", "1", "--budget", "3MiB", "--replicas", "2", family[0])
    assert found["unplaced"] == [str(family[0])]
    assert "every node has a replica" in found["left_over"][0]["why"]


def test_a_page_of_a_gpu_counts(family: list[Path]) -> None:
    found = planned("--nodes", "1", "--budget", "4MiB", "--page", "2MiB", *family[:2])
    assert found["unplaced"] != []


def test_references_come_back_as_they_were_given(family: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family[0].parent)
    found = planned("--nodes", "1", "--budget", "1GiB", "./base.safetensors", "--manifest", DEEPFLOYD)
    assert found["nodes"][0]["checkpoints"] == ["./base.safetensors"]
    assert sorted(found["unplaced"]) == ["IF-I-XL-v1.0", "IF-II-L-v1.0"]


def test_the_founding_figure_on_nodes() -> None:
    found = planned("--nodes", "3", "--budget", "48GiB", "--manifest", DEEPFLOYD)
    assert (found["least_nodes"], found["least_nodes_apart"]) == (1, 2)
    finished = run("plan", "--nodes", "3", "--budget", "48GiB", "--manifest", DEEPFLOYD)
    assert finished.stdout.splitlines()[-1] == (
        "2 checkpoints fit on 1 node; without sharing 2 nodes are needed. They take 39.3 GiB; without sharing 58.2 GiB."
    )


def test_the_report_is_one_page(family: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    assert run("plan", "--nodes", "2", "--budget", "1300KiB", "--html", page, *family).returncode == 0
    text = page.read_text()
    assert "<title>weightd fleet plan</title>" in text
    drawn = json.loads(text.partition('id="report">')[2].partition("</script>")[0])["nodes"]
    assert [node["name"] for node in drawn] == ["node-1", "node-2"]
    for node in drawn:
        assert (0 < node["alone_bytes"] <= node["used_bytes"] <= node["budget_bytes"]) == bool(node["checkpoints"])
    code, line = failure("plan", "--nodes", "2", "--budget", "1GiB", "--html", tmp_path, *family)
    assert (code, "cannot be written" in line) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["plan", "--nodes", "1", "--budget", "much", "x"], 2, "--budget"),
        (["plan", "--nodes", "0", "--budget", "1GiB", "x"], 2, "--nodes"),
        (["plan", "--nodes", "1", "--budget", "1GiB"], 2, "give at least one reference"),
        (["plan", "--nodes", "1", "--budget", "1GiB", "/nonexistent/a"], 3, "/nonexistent/a"),
        (["plan", "--nodes", "1", "--budget", "0", "--manifest", DEEPFLOYD], 2, "must be more than 0"),
        (["publish", "/nonexistent/a"], 3, "/nonexistent/a"),
        (["publish"], 2, "REF"),
        (["fetch"], 2, "fetch"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str | Path], code: int, said: str) -> None:
    found, line = failure(*arguments)
    assert (found, said in line) == (code, True), line


def test_a_checkpoint_is_named_once(family: list[Path]) -> None:
    code, line = failure("plan", "--nodes", "1", "--budget", "1GiB", family[0], family[0])
    assert code == 2
    assert "are one checkpoint; name it once, and ask for --replicas" in line


def test_publish_names_the_bytes(family: list[Path], tmp_path: Path) -> None:
    state = f"--state-dir={tmp_path}"
    finished = run("publish", state, "--format", "json", family[0])
    assert (finished.returncode, finished.stderr) == (0, "")
    found = json.loads(finished.stdout)
    assert found["digest"].startswith("b3:")
    assert found["manifest"] == str(tmp_path / "manifests" / found["digest"][3:])
    assert (found["name"], found["tensors"], found["total_bytes"]) == (str(family[0]), 8, MIB)
    assert run("publish", state, "-q", family[0]).stdout == f"{found['digest']}\n"
    said = run("publish", family[0], WEIGHTD_FLEET_STATE_DIR=str(tmp_path)).stdout.splitlines()
    assert said == [
        found["digest"],
        f"8 tensors, {size(MIB)} in 1 file; 0 small files, 0 B; not from a hub's cache",
    ]


def test_without_the_extra_its_name_is_said(tmp_path: Path) -> None:
    """Help needs nothing; whatever runs says what to install."""
    blocked = tmp_path / "sitecustomize.py"
    blocked.write_text(
        "import importlib.util, sys\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'blake3' else real(name, *rest)\n"
        "sys.modules['blake3'] = None\n"
    )
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    assert "publish" in run("--help", PYTHONPATH=path).stdout
    for command in (["plan", "--nodes", "1", "--budget", "1GiB", "x"], ["publish", "x"]):
        finished = run(*command, PYTHONPATH=path)
        assert finished.returncode == 1
        assert finished.stderr == (
            f"weightd: fleet {command[0]} needs blake3, which is not installed: "
            "pip install '.[fleet]' in weightd's checkout\n"
        )
