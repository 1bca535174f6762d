"""The daemon and client of an earlier commit, as the repository's history has them: for tests of an upgrade."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from support.daemon import ROOT, Daemon
from support.worker import Worker

COMMIT = "cf42aabab11d4e8af9c6091507cbdc0d0f917178"
"""0.1.0 as it was before the daemon's rooms were moved: leases are locks on manifests, the root record has schema 1."""

_FOLDERS = "client", "daemon", "tests/support"


class MissingHistoryError(Exception):
    """This checkout does not have the commit."""


class Released:
    """An earlier commit's sources in a folder. They run with this interpreter's packages."""

    def __init__(self, folder: Path, commit: str = COMMIT) -> None:
        """Errors: MissingHistoryError."""
        self.folder = folder
        archive = folder.parent / f"{folder.name}.tar"
        git = ["git", "-C", str(ROOT), "archive", f"--output={archive}"]
        try:
            subprocess.run([*git, commit, *_FOLDERS], check=True, capture_output=True, text=True, timeout=100)
        except (OSError, subprocess.CalledProcessError) as error:
            why = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
            raise MissingHistoryError(f"git cannot read commit {commit[:7]}: {why}") from error
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")

    @property
    def path(self) -> str:
        """PYTHONPATH of its processes."""
        return ":".join(str(self.folder / name) for name in ("client", "daemon", "tests"))

    @property
    def argv(self) -> list[str]:
        """The `argv` of a Daemon of this commit."""
        env = shutil.which("env")
        assert env is not None
        return [env, f"PYTHONPATH={self.path}", sys.executable, "-m", "weightd_daemon"]

    def worker(self, daemon: Daemon) -> Worker:
        """A client process with this commit's `weightd`."""
        return Worker(daemon.socket, {**daemon.backend.environment, "PYTHONPATH": self.path})
