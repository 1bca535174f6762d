"""The documents agree with the code: settings, exit codes, commands, files, tests, links. They are read as text."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from typer.main import get_command

from support.filled import Filled
from support.readme import blocks, steps, words
from weightd import errors
from weightd._proto.v1 import daemon_pb2
from weightd._transport import protocol
from weightd.cli.app import OUTPUT_CLOSED, app
from weightd.cli.context import INTERRUPTED
from weightd.cli.events import EVENT_KEYS
from weightd_daemon.__main__ import _parser
from weightd_daemon.api.context import TOKEN
from weightd_daemon.config.settings import ConfigError, Settings, TemporaryConfigError
from weightd_daemon.handles import handle_server
from weightd_daemon.handles.manifests import LOCK_BASE
from weightd_daemon.loader import intake
from weightd_daemon.monitoring import event_stream, http
from weightd_daemon.monitoring.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
OPERATIONS = ROOT / "docs" / "operations.md"
PROTOCOL = ROOT / "docs" / "protocol.md"
LIFETIMES = ROOT / "docs" / "lifetimes.md"

PACKAGES = ("daemon/weightd_daemon", "client/weightd", "fleet/weightd_fleet")
# Folders that a path in a document may start from: documents name modules as `loader/source.py`.
BASES = [
    ROOT,
    *(ROOT / name for name in ("client", "daemon", "fleet", "protos/weightd/v1")),
    *(ROOT / name for name in PACKAGES),
]
SUBFOLDERS = tuple(path.name for root in PACKAGES for path in (ROOT / root).iterdir() if path.is_dir())
OUR_FOLDERS = ("bench", "client", "daemon", "docs", "examples", "fleet", "protos", "systemd", "tests", "tools")


def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def section(path: Path, title: str) -> str:
    """What stands under a heading, up to the next one of its level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", path.read_text(), re.DOTALL | re.MULTILINE)
    assert found, f"{path.name} has no section {title!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of a table's rows, without its head."""
    lines = [line.replace(r"\|", "\0") for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip().replace("\0", "|") for cell in line.strip("|").split("|")] for line in lines]
    return cells[2:]


def code_spans(text: str) -> Iterator[str]:
    """What stands between single backticks."""
    yield from re.findall(r"`([^`\n]+)`", text)


def subclasses(kind: type[errors.WeightdError]) -> Iterator[type[errors.WeightdError]]:
    yield kind
    for heir in kind.__subclasses__():
        yield from subclasses(heir)


def named_tests(text: str) -> list[tuple[str, str]]:
    """(file, name) of every `tests/…::name`."""
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)


def has_test(source: str, name: str) -> bool:
    """Whether a module defines a test function of that name, alone or in a class."""
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return any(node.name == name for node in functions)


def test_settings_are_documented() -> None:
    table = {row[0].strip("`"): row for row in rows(section(OPERATIONS, "Settings"))}
    assert set(table) == {setting.name for setting in fields(Settings)}
    for name, row in table.items():
        assert row[1:3] == [f"`--{name.replace('_', '-')}`", f"`WEIGHTD_{name.upper()}`"]


def test_plain_defaults_are_documented() -> None:
    table = {row[0].strip("`"): row[3] for row in rows(section(OPERATIONS, "Settings"))}
    plain = {setting.name: setting.default for setting in fields(Settings) if setting.default not in ("",)}
    known = {name: str(value) for name, value in plain.items() if isinstance(value, str | int)}
    assert len(known) >= 12
    assert {name: table[name].strip("`") for name in known} == known


def test_exit_codes_are_documented() -> None:
    documented = {int(row[0]) for row in rows(section(OPERATIONS, "Exit codes"))}
    raised = {kind.exit_code for kind in subclasses(errors.WeightdError)}
    assert documented == raised | {
        0,
        *(kind.exit_code for kind in (ConfigError, TemporaryConfigError)),
        INTERRUPTED,
        OUTPUT_CLOSED,
    }


def test_metrics_are_documented() -> None:
    metrics = Metrics(Filled(1).statistics)
    metrics.called("DaemonService/GetStats", "OK")
    page = metrics.page().decode()
    types = dict(re.findall(r"^# TYPE (weightd_\w+) (\w+)$", page, re.MULTILINE))
    labels: dict[str, set[str]] = {name: set() for name in types}
    for name, braced in re.findall(r"^(weightd_\w+)(?:\{(.*)\})? \S+$", page, re.MULTILINE):
        family = name if name in types else re.sub(r"_(bucket|count|sum)$", "", name)
        labels[family] |= set(re.findall(r'(\w+)="', braced)) - {"le"}
    table = [row for row in rows(section(OPERATIONS, "Monitoring")) if row[0].startswith("`weightd_")]
    assert {row[0].strip("`"): (row[1], set(code_spans(row[2]))) for row in table} == {
        name: (kind, labels[name]) for name, kind in types.items()
    }


def test_events_are_documented() -> None:
    table = {
        name: set(code_spans(row[2])) for row in rows(section(OPERATIONS, "Events")) for name in code_spans(row[0])
    }
    kinds = {name.removeprefix("EVENT_KIND_").lower() for name in daemon_pb2.EventKind.DESCRIPTOR.values_by_name} - {
        "unspecified"
    }
    assert table == {kind: set(EVENT_KEYS.get(kind, ())) for kind in kinds}


def test_limits_of_events_and_pages_are_documented() -> None:
    events, monitoring = section(OPERATIONS, "Events"), section(OPERATIONS, "Monitoring")
    assert f"the last {event_stream.REMEMBERED:,} events" in events
    assert f"{event_stream.BACKLOG:,} events wait" in events
    assert f"No more than {event_stream.MOST_READERS} read" in events
    assert f"get {event_stream.BURST:,} events at once, and then {event_stream.PER_SECOND:,.0f} a second" in events
    assert f"at most {event_stream.MOST_NAMES}." in events
    assert f"may have {http.MAX_REQUEST >> 10} KiB and take {http.SECONDS:.0f} s" in monitoring
    assert f"there may be {http.MOST_CONNECTIONS} at a time" in monitoring


def test_commands_are_documented() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]  # a group, says typer's documentation
    visible = {name for name, command in commands.items() if not command.hidden}
    documented = {row[0].strip("`").split()[1] for row in rows(section(OPERATIONS, "Commands"))}
    assert documented == visible


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_command_is_made_up(path: Path) -> None:
    commands = set(get_command(app).commands)  # type: ignore[attr-defined]  # a group, says typer's documentation
    text = "\n".join(line for line in path.read_text().splitlines() if "not yet" not in line.lower())
    used = {word for span in code_spans(text) for word in re.findall(r"^weightd ([a-z]+)", span)}
    used |= set(re.findall(r"^\$ weightd ([a-z]+)", text, re.MULTILINE))
    assert used <= commands


def command_lines(path: Path) -> list[str]:
    """What a document's blocks tell a reader to type, but for synopses."""
    typed = [words(step.command) for block in blocks(path) for step in steps(block)]
    return [line for line in typed if not re.search(r"\[|\.\.\.", re.sub(r"'[^']*'", "", line))]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_command_lines_are_understood(path: Path) -> None:
    for line in command_lines(path):
        name, *arguments = shlex.split(re.split(r"&&|[<>|]", line)[0])
        if name.split("/")[-1] == "weightd":
            parse(arguments)


def parse(arguments: list[str]) -> None:
    """Parse a command line of `weightd`, without running it. Errors: KeyError, SystemExit, and those of typer."""
    if arguments[0] == "--socket":
        arguments = arguments[2:]
    command = get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]  # a group, as above
    command.make_context(arguments[0], arguments[1:])
    if arguments[0] in ("serve", "config"):  # and the process that the command becomes
        _parser().parse_args(arguments)


@pytest.mark.parametrize(
    "arguments",
    [["loda", "x"], ["load"], ["load", "x", "--pinn"], ["serve", "--bugdet", "1GiB"], ["serve", "x"], ["ls", "x"]],
)
def test_a_command_line_that_is_wrong_is_noticed(arguments: list[str]) -> None:
    with pytest.raises((Exception, SystemExit)):  # typer's errors are of a private module
        parse(arguments)


def test_installations_name_extras_and_recipes_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    recipes = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCS:
        text = path.read_text()
        named = {name for group in re.findall(r"'\.\[([\w,]+)\]'", text) for name in group.split(",")}
        assert named <= extras, path
        typed = [line.split()[1] for line in command_lines(path) if re.match(r"make [a-z]", line)]
        assert set(typed) <= recipes, path
    table = {name for row in rows(section(ROOT / "README.md", "In Python")) for name in code_spans(row[0])}
    assert table == extras


def test_nobody_is_sent_to_an_index_for_weightd() -> None:
    """It is on none: whoever registers the name first would be installed."""
    files = [
        *DOCS,
        *ROOT.glob("client/**/*.py"),
        *ROOT.glob("daemon/**/*.py"),
        *ROOT.glob("fleet/**/*.py"),
        *ROOT.glob("examples/*.py"),
    ]
    assert len(files) > 100
    assert [
        path for path in files if re.search(r"pip install[^\n]*\bweightd\[|pip install weightd", path.read_text())
    ] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(path: Path) -> None:
    missing = []
    for span in code_spans(prose(path)):
        name = span.split("::")[0]
        is_ours = re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", name) and name.split("/")[0] in OUR_FOLDERS and "/" in name
        is_module = re.fullmatch(r"[\w/]+\.(py|proto)", name)
        places = [base / folder for base in BASES for folder in ("", *SUBFOLDERS)]
        if "NNNN" in name:  # a pattern
            continue
        if (is_ours or is_module) and not any((place / name).exists() for place in places):
            missing.append(name)
    assert missing == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path: Path) -> None:
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)) if ":" not in target]
    assert [target for target in targets if target and not (path.parent / target).exists()] == []


def test_every_page_is_in_the_readme() -> None:
    links = set(re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text()))
    assert {str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")} <= links


def test_lifetimes_name_tests_that_exist() -> None:
    named = named_tests(LIFETIMES.read_text())
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (ROOT / file).exists() or not has_test((ROOT / file).read_text(), name)
    ]
    assert sorted(set(missing)) == []


@pytest.mark.parametrize("title", ["Held by tests", "On a GPU, held by tests"])
def test_each_lifetime_has_a_test(title: str) -> None:
    table = rows(section(LIFETIMES, title))
    assert len(table) >= 7
    assert [row[0] for row in table if not named_tests(row[-1])] == []


def test_a_test_that_does_not_exist_is_noticed() -> None:
    source = "class TestA:\n    def test_b(self): ...\ntest_c = 1\n"
    assert has_test(source, "test_b")
    assert not has_test(source, "test_c")


def test_python_in_the_readme_compiles() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


def test_protocol_states_the_limits_of_the_code() -> None:
    text = PROTOCOL.read_text()
    assert protocol.MAX_FRAME == 64 << 10
    assert "at most 64 KiB" in text
    assert f"room for {protocol.MAX_DESCRIPTORS} descriptors" in text
    assert f"within {handle_server.HELLO_SECONDS:.0f} s, and once" in text
    assert f"has arrived, within {handle_server.ACK_SECONDS:.0f} s" in text
    assert f"{handle_server.MAX_OFFERS} intakes" in text
    assert f"each batch within {intake.INTAKE_SECONDS:.0f} s" in text
    assert f"`hello {{protocol: {protocol.PROTOCOL}}}`" in text
    assert LOCK_BASE == 1 << 40
    assert "2^40 + `lease`" in text
    assert f"metadata key `{TOKEN}`" in text


def test_protocol_lists_the_errors() -> None:
    text = section(PROTOCOL, "Errors")
    table = {row[0].strip("`"): row[1] for row in rows(text)}
    known = {kind.reason: kind.grpc_code for kind in subclasses(errors.WeightdError)}
    assert table.items() <= known.items()
    assert {reason for reason in known if f"`{reason}`" not in text} == set()
