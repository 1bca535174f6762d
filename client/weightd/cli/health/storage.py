"""Judges the folder of the digest index. Without it loads read more, so nothing about its space is bad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightd._sizes import size
from weightd.cli.health.asking import Answer
from weightd.cli.health.finding import Finding, Status

_CHECK = "state-dir"
_LITTLE_SPACE = 64 << 20


def judge_state(answer: Answer, daemon: Mapping[str, Any]) -> list[Finding]:
    """Judge the answer of the look `state`; `daemon` are the facts of a daemon that answers, empty if none does."""
    if problem := daemon.get("index_problem", ""):
        told = f"the digest index {daemon['index']} cannot be used: {problem}; loads read more"
        return [Finding(_CHECK, Status.DOUBTFUL, told, "see the daemon's log; correct the folder named by `state_dir`")]
    return answer.failed(_CHECK) or [_folder(answer.facts)]


def _folder(facts: Mapping[str, Any]) -> Finding:
    folder = facts["folder"]
    if facts["error"]:
        return Finding(_CHECK, Status.UNKNOWN, facts["error"])
    if not facts["is_folder"]:
        return Finding(_CHECK, Status.DOUBTFUL, f"{folder} lies in or is a file: loads read more", "set `state_dir`")
    told = f"{folder}, {size(facts['free'])} free"
    if not facts["exists"]:
        told += "; it does not exist yet"
    elif facts["mode"] & 0o022:
        told += f", has mode {facts['mode']:04o}: other users may change what is taken for known"
        return Finding(_CHECK, Status.BAD, told, f"`chmod go-w {folder}`")
    if facts["writable"] is None:
        return Finding(_CHECK, Status.UNKNOWN, f"{told}; whether the daemon may write there is not known")
    if not facts["writable"]:
        remedy = f"give it to the daemon's user, or set `state_dir` (it belongs to uid {facts['uid']})"
        return Finding(_CHECK, Status.DOUBTFUL, f"{told}; the daemon may not write there: loads read more", remedy)
    if facts["free"] < _LITTLE_SPACE:
        return Finding(_CHECK, Status.DOUBTFUL, f"{told}: the digest index may not fit", "free some space there")
    return Finding(_CHECK, Status.GOOD, told)
