"""Judges the packages that are installed against the ranges that weightd's own metadata asks for."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Mapping
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from weightd.cli.health.finding import EXTRAS, Finding, Status

_PROJECT = Path(__file__).parents[4] / "pyproject.toml"
"""Of a checkout, whose sources run uninstalled, or installed from another state of it."""
_REQUIREMENT = re.compile(
    r"([A-Za-z0-9._-]+)(?:\[([\w,-]+)\])?\s*\(?([^;()]*)\)?(?:;\s*extra\s*==\s*[\"']([\w-]+)[\"'])?\s*"
)
_GIVES = {
    "cli": "the `weightd` command",
    "daemon": "the daemon",
    "torch": "tensors of torch",
    "transformers": "models of transformers",
    "diffusers": "pipelines of diffusers",
    "cuda": "memory of NVIDIA GPUs",
    "gguf": "GGUF files",
    "metrics": "the page for Prometheus",
    "plan": "near duplicates in `weightd plan`",
    "top": "`weightd top`",
    "web": "`weightd web`",
    "fleet": "`weightd fleet`",
}
_BASE = "base-packages"


class Requirement(NamedTuple):
    """A package that an extra needs ("" is weightd itself), and its range, such as ">=2.8,<3".

    `own` is False where it comes with another extra that this one includes.
    """

    extra: str
    package: str
    range: str
    own: bool = True


def requirements(project: Path = _PROJECT) -> list[Requirement]:
    """What weightd and its extras need, by the checkout or by the installed metadata; empty if neither is there."""
    lines: list[tuple[str, str]] = []
    try:
        said = tomllib.loads(project.read_text())["project"]
        lines = [("", line) for line in said["dependencies"]]
        lines += [(extra, line) for extra, needed in said["optional-dependencies"].items() for line in needed]
        if said["name"] != "weightd":
            raise KeyError(said["name"])
    except (OSError, ValueError, KeyError, TypeError):
        try:
            lines = [("", line) for line in metadata.requires("weightd") or ()]
        except metadata.PackageNotFoundError:
            return []
    return _expanded(lines)


def _expanded(lines: list[tuple[str, str]]) -> list[Requirement]:
    found: list[Requirement] = []
    within: dict[str, list[str]] = {}
    for said, line in lines:
        match = _REQUIREMENT.fullmatch(line)
        if match is None:
            continue
        package, inner, wanted, marked = match.groups()
        extra = marked or said
        if package == "weightd":
            within.setdefault(extra, []).extend((inner or "").split(","))
        else:
            found.append(Requirement(extra, package, wanted.strip()))

    def all_of(extra: str) -> list[Requirement]:
        own = [each for each in found if each.extra == extra]
        return own + [
            each._replace(extra=extra, own=False) for other in within.get(extra, ()) for each in all_of(other)
        ]

    return [each for extra in ("", *EXTRAS) for each in all_of(extra)]


def installed(packages: set[str]) -> dict[str, str]:
    """The versions of those packages that are installed; empty where a package's metadata is damaged."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package) or ""
        except metadata.PackageNotFoundError:
            continue
        except Exception:  # noqa: BLE001 - damaged metadata raises whatever it likes, KeyError and ValueError for a start
            found[package] = ""
    return found


def fits(version: str, wanted: str) -> bool | None:
    """Whether a version lies in a range; None if either is not understood."""
    have = _release(version)
    for clause in filter(None, map(str.strip, wanted.split(","))):
        match = re.fullmatch(r"(>=|<=|==|!=|<|>)\s*([\w.]+)", clause)
        if match is None or not have or not _release(match[2]):
            return None
        pairs = [*zip_longest(have, _release(match[2]), fillvalue=0)]
        left, right = tuple(a for a, _ in pairs), tuple(b for _, b in pairs)
        holds = {
            ">=": left >= right, "<=": left <= right, "==": left == right, "!=": left != right,
            "<": left < right, ">": left > right,
        }  # fmt: skip
        if not holds[match[1]]:
            return False
    return True if have else None


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def judge_packages(needed: list[Requirement], have: Mapping[str, str], *, gpu: bool | None) -> list[Finding]:
    """Judge the base packages and every extra. `gpu` is whether there is one, which needs the extra `cuda`."""
    by_extra = {extra: [each for each in needed if each.extra == extra] for extra in ("", *EXTRAS)}
    if not needed:
        told = "the ranges are not known: weightd has no metadata here"
        return [Finding(check, Status.UNKNOWN, told) for check in (_BASE, *(f"extra-{extra}" for extra in EXTRAS))]
    return [
        _extra(_BASE, "", by_extra[""], have, gpu=gpu),
        *(_extra(f"extra-{extra}", extra, by_extra[extra], have, gpu=gpu) for extra in EXTRAS),
    ]


def _extra(check: str, extra: str, needed: list[Requirement], have: Mapping[str, str], *, gpu: bool | None) -> Finding:
    missing = [each.package for each in needed if each.package not in have]
    inside = f"'.[{extra}]'" if extra else "."
    install = f"pip install {inside} in weightd's checkout"
    if extra and not any(each.package in have for each in needed if each.own):
        told = f"not installed; it gives {_GIVES[extra]}"
        if extra == "cuda" and gpu:
            return Finding(check, Status.DOUBTFUL, f"{told}, and there is a GPU", install)
        return Finding(check, Status.GOOD, told)
    verdicts = {each: fits(have[each.package], each.range) for each in needed if each.package in have}
    wrong = [
        f"{each.package} {have[each.package]} is not {each.range}" for each, fit in verdicts.items() if fit is False
    ]
    if missing or wrong:
        lacking = [f"{', '.join(missing)} missing"] if missing else []
        status = Status.DOUBTFUL if extra else Status.BAD
        return Finding(check, status, "; ".join([*lacking, *wrong]), f"{install}; {sys.executable} is the interpreter")
    unknown = [each.package for each, fit in verdicts.items() if fit is None]
    if unknown:
        return Finding(check, Status.UNKNOWN, f"the version of {', '.join(unknown)} is not understood", install)
    return Finding(check, Status.GOOD, ", ".join(f"{each.package} {have[each.package]}" for each in needed))
