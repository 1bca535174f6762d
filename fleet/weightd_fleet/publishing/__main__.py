"""The program behind `weightd fleet publish` (`python -m weightd_fleet.publishing`). It ends with {"published"}."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from weightd_daemon.answers import answer

from .publish import publish
from .state import PublishedState, state_folder

if TYPE_CHECKING:
    from weightd_daemon.answers import ProgramAnswers


def main(arguments: list[str] | None = None) -> int:
    """Publish one reference. Returns the exit code: 0 also where the answer is an error."""
    parser = argparse.ArgumentParser(prog="weightd_fleet.publishing", allow_abbrev=False)
    parser.add_argument("--variant")
    parser.add_argument("--state-dir")
    parser.add_argument("reference")
    return answer("fleet publish", _published, parser, arguments)


def _published(options: argparse.Namespace, answers: ProgramAnswers) -> dict[str, Any]:
    found = publish(
        options.reference,
        PublishedState(state_folder(options.state_dir)),
        variant=options.variant,
        advance=lambda done, total: answers.advance("reading", done, total),
        note=answers.note,
    )
    origin = found.origin._asdict() if found.origin else None
    return {"published": {**asdict(found), "origin": origin}}


if __name__ == "__main__":
    sys.exit(main())
