"""deploy/Dockerfile, built with buildah on a base that debootstrap makes, and daemon and clients run from it.

Run by `make test-containers`, as root: without an engine, isolation is a chroot. What only an engine does (limits of
memory, health checks, namespaces of processes) is not tested.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import weightd
from support import checkpoints
from support.daemon import ROOT
from support.leash import leashed

SECONDS = 300
PYTHON = "3.11"
"""That of the base: Debian 12's."""
EXTRAS = ("daemon", "gguf", "metrics")
UID = 6464
CLIENT = """
import hashlib, json, os, sys, weightd
with weightd.connect() as client, client.attach("/model.safetensors") as attachment:
    buffers = {key.name: attachment.buffer(key.name) for key in attachment.tensors}
    read = {name: hashlib.sha256(memoryview(buffer)).hexdigest() for name, buffer in buffers.items()}
    del buffers
    print(json.dumps({"uid": os.getuid(), "leases": len(client.leases()), "read": read}), flush=True)
    sys.stdin.read()
"""

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can build in a chroot"),
    *(
        pytest.mark.skipif(shutil.which(tool) is None, reason=f"no {tool}: on Debian, apt install {tool}")
        for tool in ("buildah", "debootstrap")
    ),
]


class Buildah:
    """buildah with a storage of its own."""

    def __init__(self, folder: Path) -> None:
        self._argv = ["buildah", "--root", f"{folder}/storage", "--runroot", f"{folder}/run"]
        self._environment = os.environ | {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"}

    def __call__(self, *arguments: str) -> str:
        """Run a command to its end."""
        done = subprocess.run(
            leashed([*self._argv, *arguments]), env=self._environment, capture_output=True, text=True, timeout=SECONDS,
            check=False, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout

    def start(self, container: str, volumes: Sequence[str], command: Sequence[str]) -> subprocess.Popen[str]:
        """Run something in a container."""
        mounts = [f"--volume={volume}" for volume in volumes]
        return subprocess.Popen(
            leashed([*self._argv, "run", *mounts, container, "--", *command]), env=self._environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    """buildah, with the image `weightd` built from the sources here."""
    folder = tmp_path_factory.mktemp("image")
    command = Buildah(folder)
    base, wheels = folder / "base", folder / "wheels"
    base.mkdir()
    for argv in (
        ["debootstrap", "--variant=minbase", "--include=python3,python3-venv", "bookworm", str(base / "root")],
        [
            sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(wheels), "--only-binary", ":all:",
            "--python-version", PYTHON, *requirements(),
        ],
    ):  # fmt: skip
        done = subprocess.run(leashed(argv), capture_output=True, text=True, timeout=SECONDS, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (base / "Dockerfile").write_text("FROM scratch\nCOPY root/ /\n")
    command("build", "--tag", "base", str(base))
    command(
        "build", "--format", "docker", "--pull=never", "--build-arg", "BASE=localhost/base",
        "--build-arg", "PIP_ARGS=--no-index --find-links=/wheels", "--volume", f"{wheels}:/wheels:ro",
        "--file", "deploy/Dockerfile", "--tag", "weightd", ".",
    )  # fmt: skip
    yield command
    command("rm", "--all")
    shutil.rmtree(folder)


def requirements() -> list[str]:
    """What the image installs beside weightd, and what builds weightd."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = settings["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    found = [*settings["build-system"]["requires"], *project["dependencies"]]
    found += [requirement for extra in ("cli", *EXTRAS) for requirement in extras[extra]]
    return [requirement for requirement in found if not requirement.startswith("weightd[")]


def test_what_the_image_says(buildah: Buildah) -> None:
    said: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", "weightd"))["Docker"]["config"]
    assert (said["User"], said["Entrypoint"], said["Cmd"]) == ("weightd", ["weightd"], ["serve"])
    assert said["Healthcheck"]["Test"] == ["CMD", "weightd", "ping"]


def test_two_containers_read_what_a_third_one_holds(buildah: Buildah, tmp_path: Path) -> None:
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    os.chown(sockets, UID, UID)
    model = checkpoints.write_random(tmp_path / "model.safetensors", 3, 1 << 20)
    os.chmod(model, 0o644)
    for name in ("daemon", "one", "other"):
        buildah("from", "--pull-never", "--name", name, "weightd")
    command = ["weightd", "serve", "--device", "host", "--budget", "64MiB"]
    serving = buildah.start("daemon", [f"{sockets}:/run/weightd"], command)
    clients: list[subprocess.Popen[str]] = []
    try:
        assert serving.stdout is not None
        assert serving.stdout.readline().startswith("weightd is ready on /run/weightd/weightd.sock")
        volumes = [f"{sockets}:/run/weightd:ro", f"{model}:/model.safetensors:ro"]
        answers = []
        for name in ("one", "other"):
            client = buildah.start(name, volumes, ["python", "-c", CLIENT])
            clients.append(client)
            assert client.stdout is not None
            answers.append(json.loads(client.stdout.readline()))
        assert [answer["uid"] for answer in answers] == [UID, UID]
        assert [answer["leases"] for answer in answers] == [1, 2]
        assert answers[0]["read"] == answers[1]["read"] != {}
        stats = json.loads(buildah("run", f"--volume={volumes[0]}", "one", "--", "weightd", "stats", "--format=json"))
        assert stats["checkpoints"] == 1
    finally:
        for process in (*clients, serving):
            assert process.stdin is not None
            process.stdin.close()
        stop(sockets / "weightd.sock")
        for process in (*clients, serving):
            assert process.stdout is not None
            process.stdout.close()
            assert process.wait(SECONDS) == 0


def stop(socket: Path) -> None:
    """End the daemon of a container as an engine would: by SIGTERM to its own process. A chroot hides no process."""
    with weightd.connect(socket) as client:
        pid = client.version().pid
    assert b"weightd_daemon\0serve" in Path(f"/proc/{pid}/cmdline").read_bytes()
    os.kill(pid, signal.SIGTERM)
