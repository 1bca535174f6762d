"""What the commands for a cluster of Ray print of the catalogue's answers, and what they ask it."""

from __future__ import annotations

from typing import Any

import pytest

from weightd.cli import main

CHECKPOINT = "b3:" + "0123456789abcdef" * 4
MEMORY = {"device": "host", "kind": "host", "budget_bytes": 4 << 30, "used_bytes": 2 << 30, "firm_bytes": 1 << 30}
LIVE = {"node": "id0", "name": "n0", "address": "10.0.0.1:7411", "state": "live", "problem": "", "devices": [MEMORY]}
UNKNOWN = LIVE | {"node": "id1", "name": "n1", "state": "unknown", "problem": "peer 10.0.0.2: refused", "devices": []}
LISTED = {
    "checkpoint": CHECKPOINT, "names": ["org/a"], "size_bytes": 3 << 30, "resident_on": ["id0", "gone"],
    "pinned_on": [], "served_by": ["id0"],
}  # fmt: skip
REPLICA = {"node": "id0", "name": "n0", "moved_bytes": 1 << 20, "local_bytes": 3 << 20, "seconds": 0.25}
LOADED = {"reference": "org/a", "replicas": [REPLICA], "skipped": [{"node": "id1", "name": "n1", "why": "is full"}]}
ANSWERS: dict[str, dict[str, Any]] = {
    "ls": {"checkpoints": [LISTED, LISTED | {"names": []}], "nodes": [LIVE, UNKNOWN]},
    "stats": {
        "checkpoints": 1, "replicas": 2, "resident_bytes": 2 << 30, "logical_bytes": 6 << 30, "transfers": 1,
        "moved_bytes": 1 << 20, "nodes": 2, "each": [LIVE, UNKNOWN],
    },
    "place": {"targets": [{"why": "n0: has all of its 3.00 GiB"}], "shortage": "1 of 2 replicas placed"},
    "load": LOADED,
    "drain": {"name": "n0", "copied": [LOADED], "only_here": ["org/b"]},
}  # fmt: skip
ANSWERS["catalogue"] = ANSWERS["stats"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the catalogue's program was started with."""
    arguments: list[list[str]] = []

    def answer(_: Any, module: str, given: list[str], *, quiet: bool) -> dict[str, Any]:
        assert (module, quiet) == ("weightd_fleet.engines.ray_asking", True)
        arguments.append(given)
        command = given[given.index("--") + 1]
        return {command: ANSWERS[command]}

    monkeypatch.setattr("weightd.cli.fleet_cluster.ask_fleet", answer)
    monkeypatch.setattr("weightd.cli.fleet_cluster.require", lambda *_: None)
    monkeypatch.setenv("COLUMNS", "200")
    return arguments


PRINTED = {
    ("ls",): (
        [],
        "NAME    DIGEST                SIZE   IN MEMORY ON   PINNED ON   SERVED BY\n"
        "org/a   b3:0123456789ab   3.00 GiB   gone, n0       -           n0\n"
        "-       b3:0123456789ab   3.00 GiB   gone, n0       -           n0\n",
        "weightd: node n1: peer 10.0.0.2: refused\n",
    ),
    ("stats", "--address=10.0.0.9:6379"): (
        ["--address=10.0.0.9:6379"],
        "NODE   STATE     DEVICE       USED       FIRM     BUDGET   AGENT\n"
        "n0     live      host     2.00 GiB   1.00 GiB   4.00 GiB   10.0.0.1:7411\n"
        "n1     unknown   -             0 B        0 B        0 B   10.0.0.1:7411\n"
        "\n"
        "1 checkpoint, 2 replicas in memory: 2.00 GiB used, 6.00 GiB without sharing. "
        "1 transfer running, 1.00 MiB moved.\n",
        "weightd: node n1: peer 10.0.0.2: refused\n",
    ),
    ("place", "org/a", "--replicas=2"): (
        ["--replicas=2"], "n0: has all of its 3.00 GiB\n1 of 2 replicas placed\n", ""
    ),
    ("load", "org/a", "--on=n0", "--pin"): (
        ["--on=n0", "--pin"],
        "org/a on n0: 1.00 MiB received, 3.00 MiB were there, 0.2 s\n",
        "weightd: n1: passed over: is full\n",
    ),
    ("drain", "n0", "--keep-replicas=2"): (
        ["--keep-replicas=2"],
        "org/a: copied to n0\nn0: drained, 1 checkpoint copied\n",
        "weightd: org/b: no other node serves it now\n",
    ),
    ("catalogue", "--port=7000", "--tls-dir=/tls"): (
        ["--port=7000", "--tls-dir=/tls"],
        "catalogue runs: 1 of 2 nodes answer\n",
        "weightd: node n1: peer 10.0.0.2: refused\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", PRINTED, ids=" ".join)
def test_a_command_asks_and_prints(
    command: tuple[str, ...], asked: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    options, printed, said = PRINTED[command]
    assert main(["fleet", *command]) == 0
    subject = command[1] if len(command) > 1 and not command[1].startswith("--") else ""
    assert asked == [[*options, "--", command[0], subject]]
    out, err = capsys.readouterr()
    assert (out, err) == (printed, said)
