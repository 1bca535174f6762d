"""The `weightd` command against a real daemon: JSON keys, exit codes, Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import weightd
from support import checkpoints
from support.daemon import Daemon, environment, eventually
from support.gated import gated_argv
from support.launch import waiters_of
from support.worker import Worker

Spawn = Callable[[Daemon], Worker]
StartDaemon = Callable[..., Daemon]
MIB = 1 << 20

LOAD_KEYS = [
    "name", "content_digest", "tensors", "total_bytes", "unique_bytes", "shared_bytes", "read_bytes", "seconds",
    "device", "evicted", "evicted_others", "order", "groups", "ignored_groups",
]  # fmt: skip
LS_KEYS = [
    "name", "content_digest", "device", "tensors", "total_bytes", "exclusive_bytes", "shared_bytes", "leases", "pinned",
    "loaded_at", "last_used_at", "state", "names", "owner", "owner_uid",
]  # fmt: skip
GROUP_KEYS = ["component", "name", "tensors", "bytes", "in_a_row", "remembered", "reason"]
PS_KEYS = ["lease", "pid", "uid", "user", "command", "checkpoint", "device", "bytes", "since", "waiting"]
DEVICE_KEYS = {
    "uuid", "kind", "name", "budget_bytes", "used_bytes", "live_bytes", "reusable_bytes", "free_bytes", "segments",
}  # fmt: skip
STATS_KEYS = {
    "devices", "logical_bytes", "resident_bytes", "saved_bytes", "saved_ratio", "checkpoints", "blobs", "leases",
}  # fmt: skip


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """One that was started by the command itself; each test leaves it empty."""
    daemon = Daemon(argv=[sys.executable, "-m", "weightd"], budget="64MiB")
    yield daemon
    daemon.close(check=True)


@pytest.fixture
def path(tmp_path: Path, daemon: Daemon) -> Iterator[Path]:
    """A checkpoint of 3 MiB that is not loaded yet."""
    yield checkpoints.write_random(tmp_path / "m.safetensors", 3, MIB)
    with weightd.connect(daemon.socket, timeout=20.0) as client:
        for checkpoint in client.checkpoints():
            client.remove(checkpoint.content_digest)


def as_json(daemon: Daemon, *arguments: str | Path) -> Any:
    finished = daemon.command(*arguments, "--format", "json")
    assert finished.stderr == ""
    return json.loads(finished.stdout)


def failure(daemon: Daemon, *arguments: str | Path) -> tuple[int, str]:
    """Exit code and the one line on standard error."""
    finished = daemon.command(*arguments, check=False)
    lines = finished.stderr.splitlines()
    assert len(lines) == 1, finished.stderr
    assert lines[0].startswith("weightd: ")
    return finished.returncode, lines[0]


# -- what the commands print -----------------------------------------------------------------------------------------


def test_inspect_says_which_groups_lie_in_a_row(daemon: Daemon, path: Path, tmp_path: Path) -> None:
    """Equal k and v share one place; so no layer but the first can have all three behind one another."""
    names = [f"layers.{layer}.self_attn.{part}_proj.weight" for layer in range(2) for part in "qkv"]
    same = checkpoints.random_bytes("k and v", 64 << 10)
    tensors = {name: ("U8", (len(same),), same) for name in names if ".q_proj" not in name}
    tensors |= {name: ("U8", (len(same),), checkpoints.random_bytes(name, len(same))) for name in names[::3]}
    checkpoints.write(path, tensors)
    daemon.command("load", path, "--name", "rows")
    before = as_json(daemon, "ls")
    found = as_json(daemon, "inspect", "rows")["groups"]
    assert [list(group) for group in found] == [GROUP_KEYS] * 2
    assert [(group["tensors"], group["bytes"], group["in_a_row"]) for group in found] == [(3, 3 << 16, False)] * 2
    assert "groups     0 of 2 in a row\n" in daemon.command("inspect", "rows").stdout
    assert [*as_json(daemon, "inspect", "rows", "--tensors")["groups"][1]["members"]] == names[3:]
    assert as_json(daemon, "ls") == before, "it is no use of the checkpoint"
    daemon.command("rm", "rows")
    checkpoints.write(path, {name: ("U8", (256,), checkpoints.random_bytes(name, 256)) for name in names})
    daemon.command("load", path, "--name", "rows")
    printed = daemon.command("inspect", "rows").stdout
    assert "groups     2 of 2 in a row\n" in printed
    assert printed.splitlines()[-1].split() == ["layers.*.self_attn.qkv_proj.weight", "2", "of", "2", "1.50", "KiB"]
    assert max(map(len, printed[printed.index("GROUP") :].splitlines())) <= 80


def test_load_ls_inspect_stats(daemon: Daemon, path: Path) -> None:
    (loaded,) = as_json(daemon, "load", path, "--name", "mine")
    assert list(loaded) == LOAD_KEYS
    assert (loaded["name"], loaded["tensors"], loaded["device"]) == ("mine", 3, "host")
    assert [loaded[key] for key in LOAD_KEYS[3:7]] == [3 * MIB, 3 * MIB, 0, 3 * MIB]
    (again,) = as_json(daemon, "load", path, "--name", "also")
    assert (again["content_digest"], again["shared_bytes"]) == (loaded["content_digest"], 3 * MIB)

    (listed,) = as_json(daemon, "ls")
    assert list(listed) == LS_KEYS
    expected = {"content_digest": loaded["content_digest"], "tensors": 3, "total_bytes": 3 * MIB, "leases": 0}
    expected |= {"exclusive_bytes": 3 * MIB, "shared_bytes": 0, "pinned": False, "state": "resident", "device": "host"}
    assert {key: listed[key] for key in expected} == expected
    assert listed["loaded_at"].endswith(("Z", "+00:00"))
    assert (listed["name"], listed["names"]) == ("also", ["also", "mine"])
    assert (listed["owner"], listed["owner_uid"]) == (pwd.getpwuid(os.geteuid()).pw_name, os.geteuid())
    assert daemon.command("ls", "-q").stdout == "also\nmine\n"
    assert "mine" in daemon.command("ls").stdout

    details = as_json(daemon, "inspect", "mine")
    assert details["checkpoint"]["names"] == ["also", "mine"]
    assert details["components"] == [{"name": "", "tensors": 3, "total_bytes": 3 * MIB, "shared_bytes": 0}]
    tensors = as_json(daemon, "inspect", "mine", "--tensors")["tensors"]
    assert [(tensor["name"], tensor["length"]) for tensor in tensors] == [(f"t{i}", MIB) for i in range(3)]

    stats = as_json(daemon, "stats")
    assert set(stats) >= STATS_KEYS
    (device,) = stats["devices"]
    assert set(device) >= DEVICE_KEYS
    assert (device["uuid"], device["kind"], device["budget_bytes"]) == ("host", "host", 64 * MIB)
    assert (stats["logical_bytes"], stats["resident_bytes"]) == (3 * MIB, 3 * MIB)
    assert (stats["checkpoints"], stats["blobs"]) == (1, 3)


def test_load_of_several(daemon: Daemon, path: Path, tmp_path: Path) -> None:
    other = checkpoints.write_random(tmp_path / "n.safetensors", 2, MIB, seed=1)
    missing = tmp_path / "missing.safetensors"
    finished = daemon.command("load", path, missing, other, "--format", "json", check=False)
    assert finished.returncode == 3
    assert "missing.safetensors" in finished.stderr
    assert [loaded["name"] for loaded in json.loads(finished.stdout)] == [str(path), str(other)]


def test_load_says_what_was_evicted_for_it(daemon: Daemon, path: Path, tmp_path: Path) -> None:
    files = [checkpoints.write_random(tmp_path / f"{name}.safetensors", 20, MIB, seed=name) for name in "abc"]
    for file in files:
        finished = daemon.command("load", file, "--name", file.stem)
        assert finished.stderr == ""
    large = checkpoints.write_random(tmp_path / "large.safetensors", 40, MIB, seed="large")
    finished = daemon.command("load", large, "--name", "large")
    assert finished.stdout.startswith("loaded large on host: ")
    assert finished.stderr == "weightd: evicted a, b to make room\n"
    (loaded,) = as_json(daemon, "load", files[0], "--name", "a")
    assert (loaded["evicted"], loaded["evicted_others"]) == (["c"], 0)
    (ended,) = [e for e in daemon.connect().events() if e.kind == "load_ended" and e.names == ("large",)]
    assert ended.evicted == ("a", "b")
    gone = [e for e in daemon.connect().events() if e.kind == "evicted" and e.load == ended.load]
    assert [(e.names, e.reason, e.pid) for e in gone] == [((name,), "capacity", ended.pid) for name in "ab"]
    lines = daemon.logged().splitlines()
    who = f"by {pwd.getpwuid(os.geteuid()).pw_name} (pid {ended.pid})"
    assert any(f"loaded large {who}, evicted a, b content={ended.content_digest[:19]} device=host" in s for s in lines)
    assert any(f"evicted a for load {ended.load} {who} content=sha256:" in line for line in lines)


def test_ps_shows_who_holds_what(daemon: Daemon, path: Path, spawn: Spawn) -> None:
    assert as_json(daemon, "ps") == []
    daemon.command("load", path, "--name", "mine")
    worker = spawn(daemon)
    worker.run("import weightd; attachment = weightd.connect(timeout=60).attach('mine')")
    (lease,) = as_json(daemon, "ps")
    assert list(lease) == PS_KEYS
    assert (lease["pid"], lease["uid"], lease["checkpoint"]) == (worker.pid, os.geteuid(), "mine")
    assert (lease["user"], lease["device"], lease["bytes"]) == (pwd.getpwuid(os.geteuid()).pw_name, "host", 3 * MIB)
    assert "support.worker" in lease["command"]
    assert as_json(daemon, "ls")[0]["leases"] == 1
    assert str(worker.pid) in daemon.command("ps").stdout
    code, line = failure(daemon, "rm", "mine")
    assert code == 4
    assert f"pid {worker.pid}" in line
    worker.close()
    eventually(lambda: as_json(daemon, "ps") == [], what="the end of the lease")


def test_pin_unpin_rm(daemon: Daemon, path: Path) -> None:
    daemon.command("load", path, "--name", "mine", "--pin")
    assert as_json(daemon, "ls")[0]["pinned"] is True
    daemon.command("unpin", "mine")
    assert as_json(daemon, "ls")[0]["pinned"] is False
    digest = as_json(daemon, "ls")[0]["content_digest"]
    assert daemon.command("pin", digest).returncode == 0
    assert as_json(daemon, "ls")[0]["pinned"] is True
    assert "freed 3.00 MiB" in daemon.command("rm", "mine").stdout
    assert as_json(daemon, "ls") == []
    assert daemon.command("ls", "-q").stdout == ""


def test_verify(daemon: Daemon, path: Path, tmp_path: Path) -> None:
    daemon.command("load", path, "--name", "mine")
    daemon.command("load", checkpoints.write_random(tmp_path / "n.safetensors", 1, MIB, seed=1), "--name", "other")
    assert "4 blobs" in daemon.command("verify").stdout
    assert "3 blobs" in daemon.command("verify", "mine").stdout
    assert failure(daemon, "verify", "nope")[0] == 3
    change_a_byte(daemon, checkpoints.random_bytes((1, 0), MIB))
    assert "3 blobs" in daemon.command("verify", "mine").stdout
    for arguments in (["verify"], ["verify", "other"]):
        code, line = failure(daemon, *arguments)
        assert code == 1
        assert "1 of" in line
        assert "other" in line
    daemon.command("rm", "other")
    assert daemon.command("verify", "-q").stdout == ""


def change_a_byte(daemon: Daemon, content: bytes) -> None:
    """Change the last byte of a tensor in the daemon's memory, as a bad memory module might."""
    for entry in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if not os.readlink(entry).startswith("/memfd:weightd-"):
                continue
            os.chmod(entry, 0o600)
            with entry.open("r+b") as segment:
                place = segment.read().find(content)
                if place >= 0:
                    segment.seek(place + len(content) - 1)
                    segment.write(bytes([content[-1] ^ 1]))
                    return
    raise AssertionError("the bytes are in no segment")


def test_ping_and_version(daemon: Daemon) -> None:
    assert daemon.command("ping").stdout.endswith(f" ms from {daemon.socket}\n")
    version = as_json(daemon, "version")
    assert version["client"] == weightd.__version__
    assert version["socket"] == str(daemon.socket)
    assert (version["daemon"]["version"], version["daemon"]["pid"]) == (weightd.__version__, daemon.pid)
    assert daemon.command("--version").stdout == f"weightd {weightd.__version__}\n"


def test_config_says_where_each_value_comes_from(daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "weightd.toml"
    file.write_text('budget = "3GiB"\nmax_loads = 2\npool = "1MiB"\n')
    settings = json.loads(daemon.command("config", "--config", file, "--pool=2MiB", "--format", "json").stdout)
    assert settings["budget"] == {"value": "3GiB", "origin": f"{file}: line 1"}
    assert settings["pool"] == {"value": "2MiB", "origin": "--pool"}
    assert settings["socket"] == {"value": str(daemon.socket), "origin": "WEIGHTD_SOCKET"}
    assert settings["isolation"] == {"value": "shared", "origin": "default"}
    assert f'budget          = "3GiB"  # {file}' in daemon.command("config", "--config", file).stdout


# -- exit codes ------------------------------------------------------------------------------------------------------


def test_usage_is_2(daemon: Daemon, tmp_path: Path) -> None:
    assert failure(daemon, "frobnicate")[0] == 2
    assert failure(daemon, "load")[0] == 2
    assert failure(daemon, "ls", "--format", "yaml")[0] == 2
    (tmp_path / "m.pt").write_bytes(b"pickle")
    code, line = failure(daemon, "load", tmp_path / "m.pt")
    assert code == 2
    assert "save_file" in line  # how to convert it
    assert failure(daemon, "load", tmp_path / "m.pt", tmp_path / "n.pt", "--name", "both")[0] == 2
    assert daemon.command(check=False).returncode == 2


def test_not_found_is_3(daemon: Daemon, tmp_path: Path) -> None:
    for command in ("inspect", "pin", "unpin", "rm", "verify"):
        code, line = failure(daemon, command, "nope")
        assert (command, code) == (command, 3)
        assert "'nope'" in line
    assert failure(daemon, "load", tmp_path / "nope.safetensors")[0] == 3


def test_does_not_fit_is_5(daemon: Daemon, path: Path, tmp_path: Path) -> None:
    large = checkpoints.write_random(tmp_path / "large.safetensors", 17, 4 * MIB)
    code, line = failure(daemon, "load", large)
    assert code == 5
    assert "do not fit on host" in line
    assert daemon.command("load", path).returncode == 0


def test_corrupt_file_is_1(daemon: Daemon, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])
    code, line = failure(daemon, "load", path)
    assert code == 1
    assert "m.safetensors" in line
    finished = daemon.command("--debug", "load", path, check=False)
    assert "Traceback" in finished.stderr


def test_unreachable_is_69(daemon: Daemon, tmp_path: Path) -> None:
    for command in (["ls"], ["load", checkpoints.write_random(tmp_path / "m.safetensors", 1, 10)], ["ping"], ["stats"]):
        code, line = failure(daemon, *command, "--socket", tmp_path / "nobody.sock")
        assert code == 69
        assert f"no weightd daemon at {tmp_path / 'nobody.sock'}" in line
    version = daemon.command("version", "--socket", tmp_path / "nobody.sock", "--format", "json", check=False)
    assert version.returncode == 69
    assert json.loads(version.stdout) == {
        "client": weightd.__version__, "daemon": None, "socket": str(tmp_path / "nobody.sock")
    }  # fmt: skip


AS_USER = """
import os, sys
import weightd.cli.app
# Before the step down, as others may perhaps not read this interpreter: imports whatever the commands need.
assert weightd.cli.app.run(["inspect", "mine"]) == 0
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
sys.exit(weightd.cli.app.run(sys.argv[2:]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_not_permitted_is_77(start_daemon: StartDaemon, path: Path) -> None:
    daemon = start_daemon(socket_mode="0666")
    daemon.folder.chmod(0o755)
    daemon.command("load", path, "--name", "mine")
    for command in (["rm", "mine"], ["pin", "mine"], ["unpin", "mine"]):
        finished = subprocess.run(
            [sys.executable, "-c", AS_USER, "54321", *command],
            env=environment(daemon.socket), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert finished.returncode == 77, finished.stderr
        assert "mine belongs to uid 0" in finished.stderr
    assert as_json(daemon, "ls")[0]["name"] == "mine"


@pytest.mark.parametrize(
    ("flag", "words"),
    [("--budget=lots", "--budget"), ("--device=cuda:x", "--device"), ("--socket-mode=rw", "octal"),
     ("--isolation=none", "shared, uid"), ("--max-loads=0", "at least 1")],
)  # fmt: skip
def test_bad_configuration_is_78(flag: str, words: str, daemon: Daemon, tmp_path: Path) -> None:
    for command in ("config", "serve"):
        code, line = failure(daemon, command, flag, "--socket", tmp_path / "other.sock", "--state-dir", tmp_path)
        assert code == 78
        assert words in line


def test_a_bad_configuration_file_is_78_and_says_where(daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "weightd.toml"
    file.write_text("\nbugdet = 1\n")
    code, line = failure(daemon, "serve", "--config", file)
    assert code == 78
    assert f"{file}: line 2: bugdet" in line


def test_second_daemon_on_a_path_is_1_and_names_the_first(daemon: Daemon, tmp_path: Path) -> None:
    code, line = failure(daemon, "serve", "--socket", daemon.socket, "--state-dir", tmp_path)
    assert code == 1
    assert f"pid {daemon.pid}" in line
    assert daemon.command("ping").returncode == 0


def test_output_that_nobody_reads(daemon: Daemon) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    finished = subprocess.run(
        [sys.executable, "-m", "weightd", "ls", "--format", "json"],
        env=environment(daemon.socket), stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip
    os.close(writing)
    assert (finished.returncode, finished.stderr) == (141, "")


# -- loads that are left ---------------------------------------------------------------------------------------------


class Gate:
    """A daemon whose loads stand still until `open`."""

    def __init__(self, start_daemon: StartDaemon, folder: Path) -> None:
        self._path = folder / "gate"
        self.daemon = start_daemon(argv=gated_argv(self._path))
        self.client = self.daemon.connect()

    def open(self) -> None:
        self._path.touch()

    def states(self) -> dict[str, str]:
        """State by name."""
        return {checkpoint.name: checkpoint.state for checkpoint in self.client.checkpoints()}

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Begin a command, without waiting."""
        return subprocess.Popen(
            [sys.executable, "-m", "weightd", *map(str, arguments)],
            env=environment(self.daemon.socket), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def in_flight(self) -> int:
        return self.client.stats().devices[0].in_flight_bytes


@pytest.fixture
def gate(start_daemon: StartDaemon, tmp_path: Path) -> Gate:
    return Gate(start_daemon, tmp_path)


def test_ctrl_c_cancels_the_load(gate: Gate, path: Path) -> None:
    loading = gate.start("load", path, "--name", "mine")
    eventually(lambda: gate.states() == {"mine": "loading"} and gate.in_flight() > 0, what="the load in mid-copy")
    loading.send_signal(signal.SIGINT)
    output, error = loading.communicate(timeout=60)
    assert (loading.returncode, output) == (130, "")
    assert error.startswith("weightd: interrupted: the load of ")
    assert len(error.splitlines()) == 1
    eventually(lambda: gate.states() == {}, what="the cancelled load to be gone")
    eventually(lambda: gate.in_flight() == 0, what="its memory")
    eventually(lambda: gate.daemon.loaders() == [], what="the end of its loader")
    gate.open()
    assert as_json(gate.daemon, "load", path, "--name", "mine")[0]["shared_bytes"] == 0


def test_ctrl_c_leaves_the_load_to_others(gate: Gate, path: Path) -> None:
    checkpoints.rest(path)  # two loads of a file become one only when it has rested
    loading = [gate.start("load", path, "--name", name) for name in ("first", "second")]
    eventually(lambda: gate.in_flight() > 0, what="the load in mid-copy")
    eventually(lambda: waiters_of(gate.daemon) == 2, what="both wait")
    before = gate.daemon.loaders()
    loading[0].send_signal(signal.SIGINT)
    loading[0].communicate(timeout=60)
    assert loading[0].returncode == 130
    eventually(lambda: gate.daemon.connections() == 2, what="the first command's connection to end")
    assert list(gate.states().values()) == ["loading"]
    assert gate.daemon.loaders() == before
    gate.open()
    _, error = loading[1].communicate(timeout=60)
    assert (loading[1].returncode, error) == (0, "")
    assert gate.states() == {"second": "resident"}


def test_no_wait_goes_on_after_the_command_has_left(gate: Gate, path: Path) -> None:
    leaving = gate.start("load", path, "--name", "mine", "--no-wait", "--format", "json")
    output, error = leaving.communicate(timeout=60)
    assert (leaving.returncode, error) == (0, "")
    assert json.loads(output) == [{"name": "mine", "state": "loading"}]
    eventually(lambda: gate.daemon.connections() == 1, what="the command's connection to end")
    assert gate.states() == {"mine": "loading"}
    gate.open()
    eventually(lambda: gate.states() == {"mine": "resident"}, what="the detached load")
    with gate.client.attach("mine") as attachment:
        assert attachment.buffer("t2") == checkpoints.random_bytes((0, 2), MIB)
