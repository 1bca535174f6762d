"""weightd-user.service under a real `systemd --user`, as a person's machine has one; a container usually has none."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.daemon import ROOT, environment, eventually
from weightd.cli import unit as unit_command
from weightd.client import Client
from weightd.errors import DaemonUnreachableError

RUNTIME = os.environ.get("XDG_RUNTIME_DIR", "")


def systemctl(*arguments: str) -> str:
    """What `systemctl --user` prints; fails with what it says where it fails."""
    command = ["systemctl", "--user", "--no-pager", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def missing() -> str:
    """Why there is no `systemd --user` here; empty where there is one."""
    if shutil.which("systemctl") is None or not RUNTIME:
        return "no systemctl, or no XDG_RUNTIME_DIR"
    try:
        systemctl("show", "--property=Version")
    except AssertionError as error:
        return str(error).splitlines()[0]
    return ""


class Service:
    """weightd-user.service under a name and in folders of its own, beside one that the user may have."""

    def __init__(self, state: Path) -> None:
        self.name = f"weightd-test-{os.getpid()}"
        self.socket = Path(RUNTIME) / self.name / "w.sock"
        self.file = Path(RUNTIME) / "systemd" / "user" / f"{self.name}.service"
        # A path with no space in it: pytest's folders and a checkout's have none that systemd would split at.
        command = [sys.executable, "-P", "-m", "weightd_daemon", "serve", f"--socket={self.socket}"]
        command += [f"--state-dir={state}", "--device=host", "--budget=256MiB"]
        shipped = (ROOT / "systemd" / "weightd-user.service").read_text()
        text = unit_command.render(shipped, command, unit_command.systemd_version())
        text = text.replace("RuntimeDirectory=weightd\n", f"RuntimeDirectory={self.name}\n")
        variables = {key: environment()[key] for key in ("PYTHONPATH", "XDG_CONFIG_HOME")}
        lines = "".join(f'Environment="{key}={value}"\n' for key, value in variables.items())
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(text.replace("[Service]\n", f"[Service]\n{lines}"))
        systemctl("daemon-reload")

    def show(self, *properties: str) -> dict[str, str]:
        lines = systemctl("show", f"--property={','.join(properties)}", self.name).splitlines()
        return dict(line.split("=", 1) for line in lines)

    def connect(self) -> Client:
        return weightd.connect(self.socket, timeout=60.0)

    def remove(self) -> None:
        try:
            systemctl("stop", self.name)
            subprocess.run(
                ["systemctl", "--user", "clean", "--what=all", self.name], capture_output=True, timeout=60, check=False
            )
        finally:
            self.file.unlink()
            systemctl("daemon-reload")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    if reason := missing():
        pytest.skip(f"NOT TESTED under a real systemd, for want of a `systemd --user`: {reason}")
    service = Service(tmp_path / "state")
    yield service
    service.remove()


def test_a_users_service(service: Service, tmp_path: Path) -> None:
    systemctl("start", service.name)  # returns when the daemon has said that it is ready
    found = service.show("ActiveState", "Type", "WatchdogUSec", "FileDescriptorStoreMax", "StatusText", "MainPID")
    assert (found["ActiveState"], found["Type"]) == ("active", "notify")
    assert (found["WatchdogUSec"], found["FileDescriptorStoreMax"]) == ("30s", "4096")
    assert found["StatusText"].startswith("Serving 0 checkpoints, ")
    assert service.socket.parent.stat().st_mode & 0o777 == 0o700
    path = checkpoints.write_random(tmp_path / "m.safetensors", 3, 1 << 20)
    with service.connect() as client:
        client.load(path, name="mine")
        assert client.version().pid == int(found["MainPID"])
    eventually(lambda: service.show("StatusText")["StatusText"].startswith("Serving 1 checkpoint,"), what="a status")

    os.kill(int(found["MainPID"]), signal.SIGKILL)
    eventually(lambda: service.show("NRestarts", "ActiveState") == {"NRestarts": "1", "ActiveState": "active"})
    with service.connect() as client:
        assert client.version().pid == int(service.show("MainPID")["MainPID"])
        client.load(path, name="mine")

    systemctl("stop", service.name)
    assert service.show("ActiveState", "Result") == {"ActiveState": "inactive", "Result": "success"}
    with pytest.raises(DaemonUnreachableError):
        service.connect()
