"""The program behind `weightd plan` (`python -m weightd_daemon.planning`): computes from files what sharing saves.

A composition root beside app.py, without a daemon: it reads files as the loader does, and the digest index as a daemon
left it. It answers in lines of JSON (answers.py), at the end {"plan"}; while it works it is "hashing" or "comparing".
It goes by digests; whether bytes are equal is compared only when they are loaded.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from weightd._references.files import open_regular, show
from weightd.errors import InvalidReferenceError, WeightdError
from weightd.plan_report import SkippedPath
from weightd.resolve import resolve
from weightd.scan import MOST_CHECKPOINTS, scan

from .answers import THREADS, ProgramAnswers, answer
from .config.notation import parse_size
from .config.settings import ConfigError, load
from .core.plan import PlannedTensor, make_plan, shared_contents
from .core.plan_bounds import make_bounds
from .core.plan_budget import fit
from .core.plan_compare import compare
from .formats import workload
from .plans import near_duplicates
from .plans.planned_files import PlannedCheckpoints
from .plans.tensor_digests import KeptDigests, TensorDigests

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from weightd.plan_report import NearDuplicate, PlanReport

    Advance = Callable[[str, int, int], None]
    Note = Callable[[str], None]

MOST_DIFFERENCES = 100
"""For how many pairs a plan says which tensors differ: those that share the most, and near duplicates."""


class Question(NamedTuple):
    """What to plan, and how.

    With `scan` the references are folders to search, none meaning the Hugging Face cache, and what cannot be read is
    skipped. Digests that were computed are kept in the folder `kept`, if there is one. `budget` is bytes.
    """

    references: Sequence[str] = ()
    manifests: Sequence[str] = ()
    variant: str | None = None
    scan: bool = False
    headers: bool = False
    budget: int | None = None
    state_dir: Path | None = None
    kept: Path | None = None
    threads: int = 1


class ReadContents(NamedTuple):
    """The checkpoints of a question, their tensors with what equal ones have in common, and the bytes read for that."""

    checkpoints: PlannedCheckpoints
    tensors: Mapping[str, Sequence[PlannedTensor]]
    read_bytes: int
    skipped: list[SkippedPath]


def plan(question: Question, *, advance: Advance = lambda *_: None, note: Note = lambda _: None) -> PlanReport:
    """Make the plan.

    `advance` is called as work gets on, from any thread: with "hashing" or "comparing", and the bytes that are done, of
    how many. `note` is called with what was chosen that nobody asked for, a line each.
    Errors: those of a reference and of a file; InvalidReferenceError for a checkpoint that is described twice, and for
    too many.
    """
    checkpoints, tensors, read, skipped = read_contents(question, advance=advance, note=note)
    if question.headers:
        report, contents = make_bounds(tensors)
    else:
        contents = shared_contents(tensors)
        report = replace(make_plan(tensors, contents), read_bytes=read)
        report = _compared(report, checkpoints, tensors, advance, note)
    budget = None if question.budget is None else fit(list(tensors), contents, question.budget)
    return replace(report, budget=budget, skipped=tuple(skipped))


def read_contents(question: Question, *, advance: Advance, note: Note) -> ReadContents:
    """Read what is planned, as far as it takes to know which tensors are equal. Arguments and errors: as for `plan`."""
    checkpoints = PlannedCheckpoints()
    skipped = _read_headers(question, checkpoints, note)
    for manifest in question.manifests:
        _describe(Path(manifest), checkpoints)
    if len(checkpoints.tensors) > MOST_CHECKPOINTS:
        raise InvalidReferenceError(
            f"{len(checkpoints.tensors)} checkpoints are more than {MOST_CHECKPOINTS}; plan fewer at a time"
        )
    if question.headers:
        return ReadContents(checkpoints, checkpoints.tensors, 0, skipped)
    digests = _digests(question, checkpoints, skipped, advance, note)
    return ReadContents(checkpoints, checkpoints.known(digests.get), digests.read_bytes, skipped)


def _read_headers(question: Question, checkpoints: PlannedCheckpoints, note: Note) -> list[SkippedPath]:
    """Enter the checkpoints of the references by their headers. Returns what a scan skipped."""
    skipped: list[SkippedPath] = []
    if question.scan:
        found, skipped = scan(question.references)
    else:
        resolved = (resolve(reference, question.variant) for reference in question.references)
        found = list({one.name: one for one in resolved}.values())
    for one in found:
        for line in filter(None, (*one.notes, one.hint)):
            note(line)
        try:
            checkpoints.read(one)
        except WeightdError as error:
            if not question.scan:
                raise
            skipped.append(_skipped(one.name, error))
    return skipped


def _skipped(name: str, error: WeightdError) -> SkippedPath:
    return SkippedPath(show(name), str(error).removeprefix(f"{show(name)}: "))


def _digests(
    question: Question,
    checkpoints: PlannedCheckpoints,
    skipped: list[SkippedPath],
    advance: Advance,
    note: Note,
) -> TensorDigests:
    """The digests of all tensors that may equal another. A scan loses the checkpoints whose files cannot be read."""
    kept = KeptDigests(question.kept) if question.kept else None
    try:
        digests = TensorDigests(checkpoints.files, kept)
        digests.look_up(question.state_dir)
        errors = digests.read(
            checkpoints.places(), question.threads, lambda done, total: advance("hashing", done, total)
        )
        if kept and kept.problem:
            note(f"{kept.problem}; what was hashed is not kept")
    finally:
        if kept:
            kept.close()
    if errors and not question.scan:
        raise next(iter(errors.values()))
    skipped += (_skipped(name, error) for name, error in checkpoints.remove_files(errors).items())
    return digests


def _compared(
    report: PlanReport,
    checkpoints: PlannedCheckpoints,
    tensors: Mapping[str, Sequence[PlannedTensor]],
    advance: Advance,
    note: Note,
) -> PlanReport:
    """The report with which tensors differ between checkpoints, and how much."""
    near = near_duplicates.candidates(checkpoints, tensors)
    pairs = dict.fromkeys([*near[:MOST_DIFFERENCES], *(pair.checkpoints for pair in report.pairs[:MOST_DIFFERENCES])])
    differences = tuple(compare(pair, tensors[pair[0]], tensors[pair[1]]) for pair in pairs)
    report = replace(report, differences=differences)
    if not near:
        return replace(report, near_duplicates=())
    if missing := near_duplicates.missing_extra():
        note(missing)
        return report
    listed = near[: near_duplicates.MOST_PAIRS]
    found: list[NearDuplicate] = []
    for done, pair in enumerate(listed):
        advance("comparing", done * near_duplicates.SAMPLED_BYTES, len(listed) * near_duplicates.SAMPLED_BYTES)
        try:
            found.append(near_duplicates.estimate(pair, checkpoints, tensors))
        except WeightdError as error:
            note(f"{show(pair[0])} and {show(pair[1])} cannot be compared: {error}")
    return replace(report, near_duplicates=tuple(found), near_duplicates_left_out=len(near) - len(listed))


def _describe(path: Path, checkpoints: PlannedCheckpoints) -> None:
    """Enter the checkpoints of a workload manifest."""
    manifest = show(path)
    found: dict[str, list[tuple[str, PlannedTensor]]] = {}
    for file, rows in workload.read_workload(manifest, _read(path)).items():
        checkpoint, component = workload.placed(file)
        tensors = found.setdefault(checkpoint, [])
        for name, dtype, shape, content, length in rows:
            tensor = PlannedTensor(component, name, length, (content, dtype, shape), dtype, shape)
            tensors.append((f"{manifest}: {file}", tensor))
    for checkpoint, tensors in found.items():
        if checkpoint in checkpoints.tensors:
            raise InvalidReferenceError(f"{manifest}: checkpoint {checkpoint!r} is planned already; rename one of them")
        checkpoints.add(checkpoint, tensors)


def _read(path: Path) -> bytes:
    try:
        descriptor, _ = open_regular(path)
    except InvalidReferenceError as error:
        raise InvalidReferenceError(f"{show(path)}: not a regular file; give a workload manifest") from error
    with open(descriptor, "rb") as file:
        return file.read(workload.MAX_BYTES + 1)


# -- the process -------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Answer one question. Returns the exit code: 0 also where the answer is an error."""
    return answer("plan", lambda options, answers: {"plan": _asked(options, answers)}, _parser(), arguments)


def _asked(options: argparse.Namespace, answers: ProgramAnswers) -> dict[str, Any]:
    gc.disable()  # hundreds of thousands of tensors, none of them garbage; the process ends soon
    logging.getLogger().addHandler(logging.NullHandler())  # of a cache that cannot be used, the plan says so itself
    question = Question(
        options.references,
        options.manifest,
        options.variant,
        scan=options.scan,
        headers=options.headers,
        budget=_budget(options.budget),
        state_dir=index_folder(options.state_dir),
        kept=Path(options.kept) if options.kept else None,
        threads=THREADS,
    )
    return asdict(plan(question, advance=answers.advance, note=answers.note))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="weightd_daemon.planning", allow_abbrev=False)
    parser.add_argument("--manifest", action="append", default=[])
    parser.add_argument("--variant")
    parser.add_argument("--state-dir")
    parser.add_argument("--scan", action="store_true")
    parser.add_argument("--headers", action="store_true")
    parser.add_argument("--budget")
    parser.add_argument("--kept", help="folder of the digests that are kept")
    parser.add_argument("references", nargs="*")
    return parser


def _budget(said: str | None) -> int | None:
    """Errors: InvalidReferenceError."""
    try:
        return None if said is None else parse_size(said)
    except ValueError as error:
        raise InvalidReferenceError(f"--budget: {error}") from error


def index_folder(said: str | None) -> Path | None:
    """The folder of the digest index; None where the daemon's settings cannot be read: then files are read instead."""
    if said is not None:
        return Path(said)
    try:
        return Path(load(None, {}, os.environ).settings.state_dir)
    except ConfigError:
        return None


if __name__ == "__main__":
    sys.exit(main())
