"""`weightd doctor` against a real daemon, without one, with one that does not answer, and as another user."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.daemon import Daemon, environment
from support.users import BOB, needs_root
from weightd.cli.health import reach
from weightd.cli.health.asking import Answer
from weightd.cli.health.finding import Status

CHECK_KEYS = ["area", "check", "status", "found", "remedy"]
ABOUT_DAEMON = ("socket", "socket-folder", "access", "daemon", "devices", "daemon-descriptors", "budget", "state-dir")


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    daemon = Daemon(budget="64MiB")
    yield daemon
    daemon.close(check=True)


def checks(finished: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    """The checks of a report in JSON, by name; its exit code and its keys are right."""
    found = json.loads(finished.stdout)
    assert finished.stderr == ""
    assert list(found) == ["version", "status", "counts", "checks"]
    assert all(list(each) == CHECK_KEYS for each in found["checks"])
    assert finished.returncode == int(any(each["status"] == "bad" for each in found["checks"]))
    assert sum(found["counts"].values()) == len(found["checks"])
    return {each["check"]: each for each in found["checks"]}


def test_a_daemon_that_answers_is_good(daemon: Daemon) -> None:
    before = sorted(daemon.folder.rglob("*"))
    found = checks(daemon.command("doctor", "--format", "json", check=False))
    assert {name: found[name] for name in ABOUT_DAEMON if found[name]["status"] != "good"} == {}
    assert found["socket"]["found"] == str(daemon.socket)
    assert f"pid {daemon.pid}" in found["daemon"]["found"]
    assert found["budget"]["found"].startswith("64.0 MiB of host memory"), "the daemon's, not this user's settings"
    assert found["state-dir"]["found"].startswith(f"{daemon.folder / 'state'}, ")
    assert found["memfd"]["status"] == "good"
    assert sorted(daemon.folder.rglob("*")) == before, "it has written nothing"


def test_without_a_daemon_two_checks_are_bad(tmp_path: Path) -> None:
    finished = doctor(tmp_path / "w.sock")
    found = checks(finished)
    assert finished.returncode == 1
    assert {name for name in ABOUT_DAEMON if found[name]["status"] == "bad"} == {"socket", "daemon"}
    assert "weightd serve" in found["daemon"]["remedy"]
    assert found["socket-folder"]["status"] == "good"
    assert list(tmp_path.iterdir()) == []


def test_a_daemon_that_does_not_answer_is_doubtful(daemon: Daemon) -> None:
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        found = checks(daemon.command("doctor", "--format", "json", check=False))
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    assert found["daemon"]["status"] == "doubtful"
    assert found["socket"]["status"] == "good"
    assert found["daemon-descriptors"]["status"] == "unknown", "the limits of which process?"


def test_the_report_for_people_is_narrow(daemon: Daemon) -> None:
    shown = daemon.command("doctor", check=False).stdout
    assert max(len(line) for line in shown.splitlines() if str(daemon.folder) not in line) <= 80
    assert "\x1b" not in shown


def test_it_runs_without_the_extra_daemon(tmp_path: Path) -> None:
    """Its packages are hidden from every process of the command by modules of their names that cannot be imported."""
    for name in ("xxhash", "grpc_health", "grpc_reflection"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})\n")
    found = checks(doctor(tmp_path / "w.sock", PYTHONPATH=f"{tmp_path}:{environment()['PYTHONPATH']}"))
    assert {found[name]["status"] for name in ("budget", "memfd", "state-dir", "cgroup")} <= {"good", "doubtful"}


# Everything is imported before the step down: others may perhaps not read this interpreter or these sources.
AS_OTHER = """
import os, shutil, sys
import weightd.client, weightd._transport.rpc
from weightd.cli.health import daemon_look
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
for look in ("socket", "daemon"):
    daemon_look.main([look])
"""


@needs_root
def test_a_user_who_may_not_connect_learns_why(daemon: Daemon) -> None:
    """The daemon's folder lets only its user in."""
    variables = environment(daemon.socket)
    command = [sys.executable, "-c", AS_OTHER, str(BOB)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100, check=True)
    socket, answered = (Answer(json.loads(line)) for line in done.stdout.splitlines()[1::2])
    found = {each.check: each for each in [*reach.judge_socket(socket), *reach.judge_daemon(answered, "")]}
    assert found["access"].status is Status.BAD
    assert found["access"].remedy.startswith(f"only user root may enter {daemon.folder}")
    assert found["socket"].status is Status.UNKNOWN
    assert found["daemon"].status is Status.BAD
    assert found["devices"].status is Status.UNKNOWN


def doctor(socket: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "weightd", "doctor", "--format", "json"]
    return subprocess.run(
        command, env=environment(socket) | variables, capture_output=True, text=True, timeout=100, check=False
    )
