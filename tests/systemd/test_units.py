"""The units that are shipped, and what `weightd unit` makes of them: checked by systemd's own tools, without a systemd.

Where those are missing (Debian: the package `systemd`), the tests that need them are skipped.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest

import weightd
from support.daemon import ROOT, environment
from weightd.cli import main
from weightd.cli import unit as unit_command
from weightd_daemon.config.settings import Settings, load

UNITS = ROOT / "systemd"
SYSTEM, USER = "weightd.service", "weightd-user.service"
MOST_EXPOSED = 20  # in tenths, as --threshold takes them
PRESERVE = "FileDescriptorStorePreserve=yes"
COMMAND = [sys.executable, "-P", "-m", "weightd_daemon", "serve"]


def needs(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"no {tool}: on Debian, apt install systemd")


def run(command: list[str | Path], **variables: str) -> subprocess.CompletedProcess[str]:
    variables = environment() | variables
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)


def rendered(name: str, version: int | None = None, command: list[str] = COMMAND) -> str:
    return unit_command.render((UNITS / name).read_text(), command, version)


def settings(text: str) -> dict[str, str]:
    """The [Service] section; of a key that is repeated the last value."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters="=", comment_prefixes="#")
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # as its documentation says: keep the case
    parser.read_string(text)
    return dict(parser["Service"])


def verify(text: str, folder: Path, *flags: str) -> str:
    """What systemd has to say against a unit."""
    file = folder / "weightd.service"
    file.write_text(text)
    runtime = folder / "runtime"
    runtime.mkdir(mode=0o700, exist_ok=True)
    # Without --recursive-errors=yes systemd 252 exits with 0 on a key that it does not know.
    command = ["systemd-analyze", *flags, "verify", "--man=no", "--recursive-errors=yes", str(file)]
    done = run([*command], XDG_RUNTIME_DIR=str(runtime))
    return done.stdout + done.stderr + (f"exit {done.returncode}" if done.returncode else "")


def exposure(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    file = folder / "weightd.service"
    file.write_text(text)
    return run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={MOST_EXPOSED}", str(file)]
    )


# -- systemd's own tools ---------------------------------------------------------------------------------------------


@needs("systemd-analyze")
@pytest.mark.parametrize(("name", "flags"), [(SYSTEM, ()), (USER, ("--user",))])
def test_units_verify_for_this_systemd(name: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    assert verify(rendered(name, unit_command.systemd_version()), tmp_path, *flags) == ""


@needs("systemd-analyze")
def test_a_path_that_needs_quotes_verifies(tmp_path: Path) -> None:
    program = tmp_path / "a b 100%n $HOME @c" / "python"
    program.parent.mkdir()
    program.symlink_to(sys.executable)
    assert verify(rendered(SYSTEM, command=[str(program), *COMMAND[1:]]), tmp_path) == ""


@needs("systemd-analyze")
@pytest.mark.parametrize(
    ("line", "by"),
    [
        ("KillMode=mixed", "KilMode=mixed"),
        ("Type=notify", "Type=notifies"),
        (f"ExecStart={sys.executable}", "ExecStart=/no"),
    ],
)
def test_verify_can_fail(line: str, by: str, tmp_path: Path) -> None:
    text = rendered(SYSTEM)
    assert line in text
    assert verify(text.replace(line, by), tmp_path) != ""


@needs("systemd-analyze")
def test_the_systems_service_is_hardened(tmp_path: Path) -> None:
    done = exposure(rendered(SYSTEM), tmp_path)
    assert done.returncode == 0, done.stdout


@needs("systemd-analyze")
def test_hardening_can_be_missed(tmp_path: Path) -> None:
    weaker = re.sub(r"^(Protect|Restrict|SystemCall).*\n", "", rendered(SYSTEM), flags=re.MULTILINE)
    assert exposure(weaker, tmp_path).returncode == 1


@needs("systemd-sysusers")
def test_sysusers_makes_user_and_group(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("systemd-sysusers --root asks for root")
    (tmp_path / "etc").mkdir()
    done = run(["systemd-sysusers", f"--root={tmp_path}", UNITS / "weightd.sysusers"])
    assert done.returncode == 0, done.stderr
    (user,) = [
        line.split(":") for line in (tmp_path / "etc/passwd").read_text().splitlines() if line.startswith("weightd:")
    ]
    groups = {line.split(":")[0]: line.split(":") for line in (tmp_path / "etc/group").read_text().splitlines()}
    assert user[3] == groups["weightd"][2]
    assert user[5:] == ["/var/lib/weightd", "/usr/sbin/nologin"]
    assert groups["video"][3] == "weightd"


# -- what the units promise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SYSTEM, USER])
def test_what_weights_rely_on(name: str) -> None:
    text = (UNITS / name).read_text()
    assert "\nStartLimitIntervalSec=0\n" in text.partition("[Service]")[0]
    found = settings(text)
    expected = {
        "Type": "notify", "Restart": "always", "RestartPreventExitStatus": "78", "KillMode": "mixed",
        "FileDescriptorStoreMax": "4096", "LimitNOFILE": "65536", "RuntimeDirectory": "weightd",
    }  # fmt: skip
    assert expected.items() <= found.items()
    assert float(found["WatchdogSec"]) >= 10
    assert PRESERVE.partition("=")[0] not in found


def test_the_system_unit_has_gpus_ready_before_it_starts() -> None:
    """What makes NVIDIA's devices runs first, and may make device files; where it is not there, nothing fails."""
    text = (UNITS / SYSTEM).read_text()
    after = re.findall(r"^After=(.*)$", text, re.MULTILINE)[0].split()
    wanted = re.findall(r"^Wants=(.*)$", text, re.MULTILINE)[0].split()
    assert {"nvidia-fabricmanager.service", "nvidia-persistenced.service", "modprobe@nvidia_uvm.service"} == {*after}
    assert {*after} - {*wanted} == {"nvidia-fabricmanager.service"}  # which ends with an error where no NVSwitch is
    found = settings(text)
    assert found["ExecStartPre"] == "-+/usr/bin/nvidia-modprobe -c0 -u"
    assert found["DeviceAllow"] == "char-nvidia* rwm"
    assert "ExecStartPre" not in settings((UNITS / USER).read_text())  # a setuid program, without new rights


def test_user_and_sockets_go_together() -> None:
    text = (UNITS / SYSTEM).read_text()
    variables = dict(re.findall(r"^Environment=(\w+)=(.*)$", text, re.MULTILINE))
    loaded = load(UNITS / "weightd.toml", {}, variables)
    assert (loaded.settings.socket, loaded.settings.socket_mode) == ("/run/weightd/weightd.sock", "0660")
    found = settings(text)
    assert (found["User"], found["Group"], found["RuntimeDirectoryMode"]) == ("weightd", "weightd", "0750")
    assert re.search(r"^u weightd ", (UNITS / "weightd.sysusers").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", [SYSTEM, USER])
def test_every_group_of_directives_says_why(name: str) -> None:
    body = (UNITS / name).read_text().partition("[Service]\n")[2].partition("[Install]")[0]
    groups = [group.splitlines() for group in re.split(r"\n\n+", body) if group.strip()]
    assert len(groups) >= 5
    assert [group for group in groups if not group[0].startswith("# ")] == []


def test_the_example_of_settings_is_good(tmp_path: Path) -> None:
    text = (UNITS / "weightd.toml").read_text()
    examples = re.findall(r"^# (\w+ = .*|\[\[preload\]\])$", text, re.MULTILINE)
    settings = {line.partition(" = ")[0] for line in examples[: examples.index("[[preload]]")]} | {"preload"}
    assert settings == {field.name for field in fields(Settings)}
    file = tmp_path / "weightd.toml"
    file.write_text("\n".join(examples))
    assert sum(origin.startswith(str(file)) for origin in load(file, {}, {}).origins.values()) == len(settings)


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "name"), [([], SYSTEM), (["--user"], USER)])
@pytest.mark.parametrize(
    ("version", "exchanged"),
    [
        (254, {"ExecStart=weightd serve", f"#{PRESERVE}"}),
        (253, {"ExecStart=weightd serve"}),
        (None, {"ExecStart=weightd serve"}),
    ],
)
def test_the_command_prints_the_shipped_file(
    flags: list[str], name: str, version: int | None, exchanged: set[str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(unit_command, "systemd_version", lambda: version)
    assert main(["unit", *flags]) == 0
    captured = capsys.readouterr()
    pairs = list(zip((UNITS / name).read_text().splitlines(), captured.out.splitlines(), strict=True))
    assert {before for before, after in pairs if before != after} == exchanged
    assert f"ExecStart={' '.join(COMMAND)}" in captured.out.splitlines()
    assert (PRESERVE in captured.out.splitlines()) == (f"#{PRESERVE}" in exchanged)
    assert ("no systemd is installed" in captured.err) == (version is None)


@pytest.mark.parametrize(
    ("printed", "version"),
    [("systemd 252 (252.38-1~deb12u1)\n+PAM", 252), ("systemd 257.3-1\n", 257), ("", None), ("no systemd 9", None)],
)
def test_the_version_of_systemd(
    printed: str, version: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "systemctl"
    program.write_text(f"#!/bin/sh\nprintf '%s' '{printed}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert unit_command.systemd_version() == version


def test_an_old_systemd_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(unit_command, "systemd_version", lambda: 249)
    assert main(["unit"]) == 0
    assert "systemd 249 is installed here" in capsys.readouterr().err


def test_an_interpreter_that_the_service_cannot_see_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "python"
    link.symlink_to("/home/alice/bin/python3.12")
    for path, hidden in ((link, "/home/alice/bin/python3.12"), (Path("/root/v/bin/python"), "/root/v/bin/python")):
        monkeypatch.setattr(unit_command, "_HIDDEN", ("/home", "/root"))
        monkeypatch.setattr(sys, "executable", str(path))
        assert main(["unit"]) == 0
        assert f"{hidden} is hidden from the service" in capsys.readouterr().err
        assert main(["unit", "--user"]) == 0
        assert "hidden" not in capsys.readouterr().err
    assert unit_command.hidden_path("/opt/weightd/bin/python", "/usr") is None


@pytest.mark.parametrize("path", ['/opt/"a"/python', "/opt/a\\b/python", "/opt/a\nb/python"])
def test_a_path_that_systemd_cannot_start_is_1(
    path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", path)
    assert main(["unit", "--user"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("weightd: systemd cannot start /opt/")
    assert captured.err.count("\n") == 1


def test_wrong_usage_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unit", "--system"]) == 2
    assert "--system" in capsys.readouterr().err


def test_the_wheel_has_the_files(tmp_path: Path) -> None:
    wheels = pytest.importorskip("hatchling.builders.wheel", reason="no hatchling: pip install '.[dev]'")
    wheel = next(wheels.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    assert Path(wheel).name == f"weightd-{weightd.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    pages = {file.name for file in (tmp_path / "site").glob("*.data/data/share/man/man1/*")}
    assert pages == {file.name for file in (ROOT / "man/man1").iterdir()}
    protos = {file.name: file.read_bytes() for file in (ROOT / "protos/weightd/v1").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "site/weightd/protos/weightd/v1").iterdir()} == protos
    assets = ROOT / "client/weightd/page/assets"
    carried = tmp_path / "site/weightd/page/assets"
    assert sorted(file.name for file in carried.iterdir()) == sorted(file.name for file in assets.iterdir())
    folder = tmp_path / "site/weightd/cli/systemd"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in UNITS.iterdir()
    }
    done = run([sys.executable, "-P", "-m", "weightd", "unit"], PYTHONPATH=str(tmp_path / "site"))
    assert done.stdout == rendered(SYSTEM, unit_command.systemd_version())


# -- make install-systemd ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("make") is None, reason="no make: on Debian, apt install make")
def test_make_install_systemd(tmp_path: Path) -> None:
    command = ["make", "--no-print-directory", "install-systemd", f"DESTDIR={tmp_path}"]
    command += [f"WEIGHTD={sys.executable} -m weightd"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "systemctl daemon-reload" in done.stdout
    unit, users, config = (
        tmp_path / "etc" / name
        for name in ("systemd/system/weightd.service", "sysusers.d/weightd.conf", "weightd/weightd.toml")
    )
    assert unit.read_text() == rendered(SYSTEM, unit_command.systemd_version())
    assert users.read_text() == (UNITS / "weightd.sysusers").read_text()
    assert config.read_text() == (UNITS / "weightd.toml").read_text()
    assert {oct(path.stat().st_mode & 0o777) for path in (unit, users, config)} == {"0o644"}
    config.write_text("max_loads = 2\n")
    unit.write_text("an older one")
    assert (
        subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, timeout=60, check=False).returncode
        == 0
    )
    assert config.read_text() == "max_loads = 2\n"
    assert unit.read_text() == rendered(SYSTEM, unit_command.systemd_version())


@pytest.mark.skipif(shutil.which("make") is None, reason="no make: on Debian, apt install make")
def test_make_install_systemd_without_a_daemon(tmp_path: Path) -> None:
    command = ["make", "install-systemd", f"DESTDIR={tmp_path}", "WEIGHTD=false"]
    assert subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, timeout=60, check=False).returncode
    assert list(tmp_path.iterdir()) == []
