"""Write the manual pages of the `weightd` command from its help, to man/man1 or the folder that is named.

The wheel carries them as share/man/man1, where man-db finds them beside a bin/ that is on PATH. A test holds them to
the help. They bear no date, so that they change with the help alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer.main import get_command

import weightd
from weightd.cli.app import app

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FOLDER = Path(__file__).resolve().parent.parent / "man" / "man1"
_AS_IT_IS = "\b"
"""Begins a paragraph of help whose lines are kept: a heading, then what belongs to it."""
_OF_TYPER = ("install_completion", "show_completion")
"""Options whose help typer writes, in other words from version to version."""
_COMPLETION = "weightd \\-\\-install\\-completion sets up completion for the current shell."


def pages() -> dict[str, str]:
    """Text of each manual page by the name of its file."""
    return {f"{name.replace(' ', '-')}.1": text for name, text in _pages_of("weightd", get_command(app))}


def _pages_of(name: str, command: Any, parent: Any = None) -> Iterator[tuple[str, str]]:
    context = command.make_context(name.split()[-1], [], parent, resilient_parsing=True)
    below = {key: one for key, one in getattr(command, "commands", {}).items() if not one.hidden}
    yield name, "\n".join(_page(name, command, context, below, parent)) + "\n"
    for key, one in below.items():
        yield from _pages_of(f"{name} {key}", one, context)


def _page(name: str, command: Any, context: Any, below: Mapping[str, Any], parent: Any) -> Iterator[str]:
    summary, *paragraphs = (command.help or "").split("\n\n")
    yield f'.TH "{name.replace(" ", "-").upper()}" "1" "" "weightd {weightd.__version__}" "weightd"'
    yield ".SH NAME"
    yield f"{_escaped(name.replace(' ', '-'))} \\- {_escaped(_joined(summary).rstrip('.'))}"
    yield ".SH SYNOPSIS"
    yield f"\\fB{_escaped(name)}\\fR {_escaped(' '.join(command.collect_usage_pieces(context)))}"
    if running := [text for text in paragraphs if not text.startswith(_AS_IT_IS)]:
        yield ".SH DESCRIPTION"
        for number, text in enumerate(running):
            if number:
                yield ".PP"
            yield _escaped(_joined(text))
    if options := [parameter for parameter in command.params if _is_shown(parameter)]:
        yield ".SH OPTIONS"
        for parameter in options:
            said = parameter.get_help_record(context)
            yield from _item(said[0], said[1]) if said else ()
    if below:
        yield ".SH COMMANDS"
        for key, one in below.items():
            yield from _item(f"{name}-{key}(1)".replace(" ", "-"), _joined((one.help or "").split("\n\n")[0]))
    for text in (*paragraphs, *(command.epilog or "").split("\n\n")):
        if text.startswith(_AS_IT_IS):
            yield from _section(text)
    if parent is None:
        yield ".SH COMPLETION"
        yield _COMPLETION
    else:
        yield ".SH SEE ALSO"
        yield f"{_escaped(parent.command_path.replace(' ', '-'))}(1)"


def _section(text: str) -> Iterator[str]:
    """A paragraph that keeps its lines, such as examples, as a section of its own."""
    heading, *lines = text.removeprefix(_AS_IT_IS).strip("\n").splitlines()
    yield f".SH {heading.rstrip(':').upper()}"
    yield from (".EX", *map(_escaped, lines), ".EE")


def _item(term: str, text: str) -> Iterator[str]:
    yield from (".TP", f"\\fB{_escaped(term)}\\fR", _escaped(_joined(text)))


def _is_shown(parameter: Any) -> bool:
    return not getattr(parameter, "hidden", False) and parameter.name not in _OF_TYPER


def _joined(text: str) -> str:
    return " ".join(text.split())


def _escaped(text: str) -> str:
    r"""Text for roff: `-` stays a hyphen-minus that can be copied, and no line begins a request."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


def main() -> None:
    """Write all pages, and remove those of commands that are no longer there."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    written = pages()
    for old in folder.glob("weightd*.1"):
        if old.name not in written:
            old.unlink()
    for name, text in written.items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main()
