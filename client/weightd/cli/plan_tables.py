"""Tables of `weightd plan`."""

from __future__ import annotations

from collections.abc import Sequence

from weightd._sizes import size
from weightd.cli.output import emit, plural
from weightd.cli.tables import Column, emit_table, emit_text
from weightd.plan_report import (
    BudgetPlan,
    Difference,
    DifferingTensors,
    NearDuplicate,
    PlannedPair,
    PlanReport,
    SharedPart,
)

_LISTED = 20
"""Most rows of a table that may have one for each pair."""
_MATRIX = range(3, 11)
"""Of how many checkpoints there is a matrix: of two it says what the table of pairs does, of more it is too wide."""
_COMPARED = 5
"""For how many pairs is said which tensors differ."""
_NAMED = 4
"""How many names of differing tensors a line has."""
_FEW = 20
"""Tensors that only one checkpoint has are named if there are at most so many: more are of another model."""


def print_plan(report: PlanReport, width: int | None) -> None:
    """Print everything but the total."""
    listed = None if width is None else _LISTED
    _print_checkpoints(report, width)
    _print_matrix(report, width)
    _print_pairs(report, width, listed)
    _print_differences(report.differences, width)
    _print_near_duplicates(report, width, listed)
    if report.budget is not None:
        _print_budget(report.budget, width, at_most=report.at_most)
    _print_skipped(report, width, listed)
    emit("")


def print_total(report: PlanReport, width: int | None) -> None:
    """Print one sentence: how many checkpoints, and what they take without sharing and with it."""
    least, most = ("at least ", "at most ") if report.at_most else ("", "")
    emit_text(
        f"{plural(len(report.checkpoints), 'checkpoint')}, total {size(report.total_bytes)}, "
        f"unique {least}{size(report.unique_bytes)}, "
        f"saved {most}{size(report.saved_bytes)} ({report.saved_ratio * 100:.1f} %)",
        width,
    )
    if report.at_most:
        emit_text(
            "by headers alone: tensors of equal size may be equal; without --headers their bytes are compared", width
        )


def _shared(report: PlanReport) -> Column:
    return Column("SHARED AT MOST" if report.at_most else "SHARED", right=True)


def _print_checkpoints(report: PlanReport, width: int | None) -> None:
    columns = (
        Column("CHECKPOINT", elided=True),
        Column("TENSORS", right=True, spare=2),
        Column("SIZE", right=True),
        _shared(report),
        Column("WITH", spare=1),
    )
    rows = [
        (
            found.name,
            str(found.tensors),
            size(found.total_bytes),
            size(found.shared_bytes),
            plural(found.shared_with, "other") if found.shared_with else "-",
        )
        for found in report.checkpoints
    ]
    emit_table(columns, rows, width)
    if any(component.name for found in report.checkpoints for component in found.components):
        emit("")
        columns = (
            Column("COMPONENT", elided=True),
            Column("OF", elided=True),
            Column("TENSORS", right=True, spare=1),
            Column("SIZE", right=True),
            _shared(report),
        )
        rows = [
            (
                component.name or "-",
                found.name,
                str(component.tensors),
                size(component.total_bytes),
                size(component.shared_bytes),
            )
            for found in report.checkpoints
            for component in sorted(found.components, key=lambda part: -part.shared_bytes)
        ]
        emit_table(columns, rows, width)


def _print_matrix(report: PlanReport, width: int | None) -> None:
    """What share of a row's checkpoint the checkpoint of a column has, too."""
    names = [found.name for found in report.checkpoints]
    if len(names) not in _MATRIX or not report.pairs:
        return
    shared = {frozenset(pair.checkpoints): pair.shared_bytes for pair in report.pairs}
    emit("")
    rows = []
    for number, found in enumerate(report.checkpoints, start=1):
        cells = [_percent(shared.get(frozenset((found.name, name)), 0), found.total_bytes) for name in names]
        cells[number - 1] = "-"
        rows.append((str(number), found.name, *cells))
    numbers = (Column(str(number), right=True) for number in range(1, len(names) + 1))
    emit_table((Column("#", right=True), Column("HAS IN COMMON WITH", elided=True), *numbers), rows, width)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part // whole}%" if whole and part else "0"


def _print_pairs(report: PlanReport, width: int | None, most: int | None) -> None:
    if report.pairs:
        emit("")
        columns = (_shared(report), *(Column(title, elided=True) for title in ("BETWEEN", "AND", "WHAT")))
        rows = [(size(pair.shared_bytes), *pair.checkpoints, _parts(pair)) for pair in report.pairs]
        _emit_some(columns, rows, width, most, report.pairs_left_out)


def _parts(pair: PlannedPair) -> str:
    """`text_encoder 17.7 GiB, vae = unet/vae 317 MiB`, the biggest first; a dash if there are no components."""
    if not any(name for part in pair.parts for name in part.components):
        return "-"
    return ", ".join(f"{_named(part)} {size(part.shared_bytes)}" for part in pair.parts)


def _named(part: SharedPart) -> str:
    first, second = part.components
    return first or "-" if first == second else f"{first or '-'} = {second or '-'}"


def _print_differences(differences: Sequence[Difference], width: int | None) -> None:
    """Say for the first pairs which tensors differ, in lines: names do not fit a table."""
    found = [one for one in differences if one.differing_tensors or any(one.only_tensors)]
    for one in found[:_COMPARED]:
        first, second = one.checkpoints
        counts = (
            f"{plural(one.equal_tensors, 'tensor')} equal",
            f"{one.differing_tensors} differ" if one.differing_tensors else "",
            f"{one.only_tensors[0]} only in the first" if one.only_tensors[0] else "",
            f"{one.only_tensors[1]} only in the second" if one.only_tensors[1] else "",
        )
        emit("")
        emit_text(f"{first} and {second}: {', '.join(filter(None, counts))}", width)
        _print_names("differ", one.differing, width)
        for number, rows, count in zip(("first", "second"), one.only, one.only_tensors, strict=True):
            if count <= _FEW:
                _print_names(f"only in the {number}", rows, width)
    if len(found) > _COMPARED:
        emit_text(f"and {plural(len(found) - _COMPARED, 'more pair')} with differences, in --format json", width)


def _print_names(what: str, rows: Sequence[DifferingTensors], width: int | None) -> None:
    if rows:
        named = ", ".join(row.name if row.count == 1 else f"{row.name} ({row.count})" for row in rows[:_NAMED])
        emit_text(f"- {what}: {named}{', ...' if len(rows) > _NAMED else ''}", width)


def _print_near_duplicates(report: PlanReport, width: int | None, most: int | None) -> None:
    if not report.near_duplicates:
        return
    emit("")
    columns = (
        Column("ELEMENTS EQUAL", right=True),
        Column("DELTA", right=True),
        Column("NEAR DUPLICATE", elided=True),
        Column("OF", elided=True),
    )
    rows = [_near(found) for found in report.near_duplicates]
    _emit_some(columns, rows, width, most, report.near_duplicates_left_out)
    emit_text(
        "DELTA is the size of a lossless difference, relative to the checkpoint. Sampled; weightd does not save it.",
        width,
    )


def _near(found: NearDuplicate) -> tuple[str, str, str, str]:
    return f"{found.equal_elements * 100:.1f} %", f"{found.delta_ratio * 100:.1f} %", found.b, found.a


def _print_budget(budget: BudgetPlan, width: int | None, *, at_most: bool) -> None:
    emit("")
    columns = [
        Column("LOAD", right=True),
        Column("CHECKPOINT", elided=True),
        Column("ADDS", right=True),
        Column("TOGETHER", right=True, spare=1),
        Column("FITS"),
        Column("REMOVE TO FIT", elided=True),
    ]
    rows = [
        [
            str(number),
            step.name,
            size(step.added_bytes),
            size(step.total_bytes),
            "yes" if step.fits else "no",
            ", ".join(step.remove) or "-",
        ]
        for number, step in enumerate(budget.order, start=1)
    ]
    if budget.fitting == len(budget.order):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    emit_table(columns, rows, width)
    fitting = "at most " if at_most else ""
    emit_text(
        f"{fitting}{budget.fitting} of {plural(len(budget.order), 'checkpoint')} fit {size(budget.budget_bytes)}, "
        f"together {size(budget.used_bytes)}. Next is always the one that adds the fewest bytes to those before it.",
        width,
    )


def _print_skipped(report: PlanReport, width: int | None, most: int | None) -> None:
    """Say in lines what was skipped: reasons are sentences."""
    if report.skipped:
        emit("")
        for skipped in report.skipped[:most]:
            emit_text(f"skipped {skipped.path}: {skipped.reason}", width)
        if hidden := len(report.skipped) - len(report.skipped[:most]):
            emit_text(f"and {hidden:,} more; --wide and --format json list more", width)


def _emit_some(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None, most: int | None, left_out: int = 0
) -> None:
    """Print a table of at most `most` rows, and how many more there are."""
    shown = rows[:most]
    emit_table(columns, shown, width)
    if hidden := len(rows) - len(shown) + left_out:
        emit_text(f"and {hidden:,} more; --wide and --format json list more", width)
