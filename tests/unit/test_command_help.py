"""Help of the `weightd` command: one parser, an option for each setting, examples that parse, completion for shells."""

from __future__ import annotations

import re
import shlex
import threading
import tomllib
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import pytest

from support.fake_client import FakeClient
from weightd._settings import SETTINGS
from weightd.cli import main
from weightd.types import NameInfo
from weightd_daemon.__main__ import main as daemon_main
from weightd_daemon.config.settings import Settings, load
from weightd_daemon.config.toml_file import toml_value

pytest.importorskip("typer")
context = pytest.importorskip("weightd.cli.context")
app = pytest.importorskip("weightd.cli.app")
man_pages = pytest.importorskip("tools.man_pages")

if TYPE_CHECKING:
    from pathlib import Path

COMMANDS: dict[str, Any] = app.get_command(app.app).commands


NESTED: dict[str, Any] = {
    f"{group} {name}": command
    for group, commands in COMMANDS.items()
    for name, command in getattr(commands, "commands", {}).items()
}


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*command.split(), "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", [*COMMANDS, *NESTED])
def test_every_command_has_examples_that_parse(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(name, capsys)
    examples = re.search(r"^  Examples:\n((?:    .*\n)+)", text, re.MULTILINE)
    assert examples, text
    lines = examples[1].splitlines()
    assert max(map(len, text.splitlines())) <= 80
    for line in lines:
        first = re.split(r"\s{2,}| \| | >", line.strip())[0]
        command, *arguments = shlex.split(first)
        words = ["ls"] if name == "list" else name.split()
        assert [command, *arguments[: len(words)]] == ["weightd", *words]
        (COMMANDS | NESTED)[name].make_context(name, arguments[len(words) :])


def test_manual_pages_say_what_the_help_says() -> None:
    found = {path.name: path.read_text() for path in man_pages.FOLDER.iterdir()}
    assert found == man_pages.pages(), "run `make man`"
    assert {f"weightd-{name}.1" for name, command in COMMANDS.items() if not command.hidden} < set(found)
    text = found["weightd-ls.1"]
    assert ".SH EXAMPLES\n.EX\n  weightd ls" in text
    assert "\\fB\\-q, \\-\\-quiet\\fR\nPrint only" in text


def test_every_summary_of_a_group_fits_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    groups = [name for name, command in COMMANDS.items() if getattr(command, "commands", None)]
    assert groups == ["fleet"]
    assert main(["fleet", "--help"]) == 0
    assert "..." not in capsys.readouterr().out.split("Commands:")[1]


@pytest.mark.parametrize("command", ["serve", "config"])
def test_every_setting_is_an_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(SETTINGS) == [setting.name for setting in fields(Settings)]
    shown = re.sub(r"\s+", " ", help_of(command, capsys))
    for name, setting in SETTINGS.items():
        assert f"--{name.replace('_', '-')} {setting.metavar} " in shown
        assert setting.help in shown
    assert main([command, "--bugdet", "1GiB"]) == 2
    assert re.search(r"--bugdet.*--budget.*see 'weightd \w+ --help'\n", capsys.readouterr().err)


def test_config_prints_toml_that_can_be_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roots = ["/models/é\u2028😀", '/with "quotes"\\and\x7f\x01']
    file = tmp_path / "first.toml"
    preload = {"ref": "/models/a, b", "name": 'n"', "device": "host", "pin": True, "wait": True}
    file.write_text(f"model_roots = {toml_value(roots)}\npreload = [{toml_value(preload)}, 'org/name']\n")
    flags = ["--device=host", "--device=cuda:0", "--budget=host=1GiB", "--max-loads=2", f"--socket={tmp_path}/s"]
    assert daemon_main(["config", f"--config={file}", *flags]) == 0
    printed = capsys.readouterr().out
    again = tmp_path / "again.toml"
    again.write_text(printed)
    said = {"device": ["host", "cuda:0"], "budget": ["host=1GiB"], "max_loads": "2", "socket": f"{tmp_path}/s"}
    settings = load(file, said, {}).settings
    assert settings.model_roots == tuple(roots)
    assert load(again, {}, {}).settings == settings
    assert set(tomllib.loads(printed)) == set(SETTINGS)
    assert 'budget          = "host=1GiB"  # --budget\n' in printed


# Completion


def completed(words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What bash would offer for the last word of a command line."""
    monkeypatch.setenv("_WEIGHTD_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    with pytest.raises(SystemExit):
        main([])
    return capsys.readouterr().out.split()


def names(*found: str) -> list[NameInfo]:
    return [NameInfo(name, "ab" * 32, "resident", 0, "root", is_default=False) for name in found]


@pytest.mark.parametrize("command", ["pin", "unpin", "rm", "inspect", "verify"])
def test_names_are_completed(
    command: str, fake: FakeClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.names = lambda: names("org/base", "other", "base", "o\x1bx")  # type: ignore[attr-defined]
    assert completed(f"weightd {command} o", capsys, monkeypatch) == ["org/base", "other"]
    assert completed(f"weightd --socket /s {command} b", capsys, monkeypatch) == ["base"]
    assert fake.asked == "/s"


def test_devices_commands_and_types_are_completed(
    fake: FakeClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert completed("weightd pin x --device ", capsys, monkeypatch) == ["host"]
    assert completed("weightd un", capsys, monkeypatch) == ["unpin", "unit"]
    assert completed("weightd events --type ev", capsys, monkeypatch) == ["evicted"]
    assert "--max-loads" in completed("weightd serve --max-", capsys, monkeypatch)


def test_a_daemon_that_does_not_answer_holds_up_no_shell(
    fake: FakeClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()
    fake.names = lambda: never.wait(600) and names("base")  # type: ignore[attr-defined]
    monkeypatch.setattr(context, "_ANSWER_SECONDS", 0.01)
    assert completed("weightd pin b", capsys, monkeypatch) == []
    never.set()


def test_no_daemon_is_no_error(
    fake: FakeClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.answers["connect"] = OSError("none")
    assert completed("weightd pin b", capsys, monkeypatch) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown(shell: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_WEIGHTD_COMPLETE", f"source_{shell}")
    with pytest.raises(SystemExit):
        main([])
    assert "_WEIGHTD_COMPLETE=complete_" in capsys.readouterr().out


def test_a_wrong_choice_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "--format", "yaml"]) == 2
    said = "weightd: Invalid value for '--format': 'yaml' is not one of 'table', 'json'; see 'weightd ls --help'\n"
    assert capsys.readouterr().err == said
