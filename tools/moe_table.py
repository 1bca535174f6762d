"""Measure how much of the experts of each family of transformers is views, and write it into docs/integrations.md.

Models are small and random (tests/support/shrunk.py), saved by transformers and loaded by the integration, through a
daemon of its own. Run in the virtual environment: `.venv/bin/python tools/moe_table.py [TYPE ...]`.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("client", "daemon", "tests")]

import torch  # noqa: E402  # after the path is set

import weightd  # noqa: E402
from support import shrunk  # noqa: E402
from support.daemon import Daemon  # noqa: E402

DOCUMENT = ROOT / "docs" / "integrations.md"
HEAD = "| `model_type` | class | expert bytes that are views |\n|---|---|---|\n"


def measure(daemon: Daemon, kind: str) -> str:
    """The row of a type; empty where its shrunk model has no experts, or cannot be built or saved."""
    from weightd.integrations.transformers import from_pretrained, report

    for cls in shrunk.classes(kind)[:1]:
        model = shrunk.build(cls, kind, torch.float32)
        if model is None or not shrunk.experts(model):
            return ""
        with tempfile.TemporaryDirectory() as folder:
            if not shrunk.save(model, Path(folder)):
                return ""
            with weightd.connect(daemon.socket) as client:
                loaded = from_pretrained(folder, model_class=cls, client=client)
                every = shrunk.experts(loaded)
                copied = sum(one.nbytes for one in report(loaded).copied if shrunk.is_expert(one.name))
                return f"| `{kind}` | {cls.__name__} | {(every - copied) / every:.0%} |\n"
    return ""


def main(kinds: list[str]) -> None:
    """Print the rows; without arguments, those of all types, and write them where the document has them."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    rows = []
    for kind in kinds or shrunk.types():
        daemon = Daemon()  # each begins with an empty store: nothing of another model is shared
        try:
            rows.append(measure(daemon, kind))
        finally:
            daemon.close(check=False)
        print(rows[-1], end="", flush=True)
    if not kinds:
        before, _, rest = DOCUMENT.read_text().partition(HEAD)
        _, _, after = rest.partition("\n\n")
        DOCUMENT.write_text(f"{before}{HEAD}{''.join(rows)}\n{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
