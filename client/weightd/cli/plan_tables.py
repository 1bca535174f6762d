"""Tables of `weightd plan`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from weightd._sizes import size
from weightd.cli.output import emit, plural
from weightd.cli.tables import Column, emit_table, emit_text
from weightd.plan_report import (
    BudgetPlan,
    BudgetStep,
    Difference,
    DifferingTensors,
    PlannedPair,
    PlanReport,
    SharedPart,
)

_LISTED = 20
"""Most rows of a table, in a terminal, that may have one for each pair."""
_MATRIX = range(3, 11)
"""Of how many checkpoints there is a matrix: of two it says what the table of pairs does, of more it is too wide."""
_COMPARED = 5
"""For how many pairs is said which tensors differ."""
_NAMED = 4
"""How many names of differing tensors a line has."""
_FEW = 20
"""Tensors that only one checkpoint has are named if there are at most so many: more are of another model."""


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


class PlanTables:
    """Everything in a report but the total, in at most `width` columns if there is a width.

    Then names of checkpoints begin below the folder that all paths among them have in common, which is said once.
    """

    def __init__(self, report: PlanReport, width: int | None) -> None:
        self._report = report
        self._width = width
        self._sizes = {found.name: found.total_bytes for found in report.checkpoints}
        self._most = None if width is None else _LISTED
        paths = [found.name for found in report.checkpoints if os.path.isabs(found.name)]
        self._folder = os.path.commonpath(map(os.path.dirname, paths)) if width is not None and len(paths) > 1 else "/"

    def print(self) -> None:
        """Print the tables, and an empty line after each."""
        if self._folder != "/":
            emit_text(f"below {self._folder}:", self._width)
        self._print_checkpoints()
        self._print_components()
        self._print_matrix()
        self._print_pairs()
        self._print_differences()
        self._print_near_duplicates()
        if self._report.budget is not None:
            self._print_budget(self._report.budget)
        self._print_skipped()
        emit("")

    def _name(self, name: str) -> str:
        return name if self._folder == "/" else name.removeprefix(f"{self._folder}/")

    def _shared(self) -> Column:
        return Column("SHARED AT MOST" if self._report.at_most else "SHARED", right=True)

    def _print_checkpoints(self) -> None:
        columns = (
            Column("CHECKPOINT", elided=True),
            Column("TENSORS", right=True, spare=2),
            Column("SIZE", right=True),
            self._shared(),
            Column("WITH", spare=1),
        )
        rows = [
            (
                self._name(found.name),
                str(found.tensors),
                size(found.total_bytes),
                size(found.shared_bytes),
                plural(found.shared_with, "other") if found.shared_with else "-",
            )
            for found in self._report.checkpoints
        ]
        emit_table(columns, rows, self._width)

    def _print_components(self) -> None:
        columns = (
            Column("COMPONENT", elided=True),
            Column("OF", elided=True),
            Column("TENSORS", right=True, spare=1),
            Column("SIZE", right=True),
            self._shared(),
        )
        rows = [
            (
                component.name or "-",
                self._name(found.name),
                str(component.tensors),
                size(component.total_bytes),
                size(component.shared_bytes),
            )
            for found in self._report.checkpoints
            if any(component.name for component in found.components)
            for component in sorted(found.components, key=lambda part: -part.shared_bytes)
        ]
        if rows:
            emit("")
            emit_table(columns, rows, self._width)

    def _print_matrix(self) -> None:
        """What share of a row's checkpoint the checkpoint of a column has, too."""
        checkpoints = self._report.checkpoints
        if len(checkpoints) not in _MATRIX or not self._report.pairs:
            return
        shared = {frozenset(pair.checkpoints): pair.shared_bytes for pair in self._report.pairs}
        rows = []
        for number, found in enumerate(checkpoints, start=1):
            cells = [_percent(shared.get(frozenset((found.name, at.name)), 0), found.total_bytes) for at in checkpoints]
            cells[number - 1] = "-"
            rows.append((str(number), self._name(found.name), *cells))
        numbers = (Column(str(number), right=True) for number in range(1, len(checkpoints) + 1))
        title = "HAS AT MOST IN COMMON WITH" if self._report.at_most else "HAS IN COMMON WITH"
        emit("")
        emit_table((Column("#", right=True), Column(title, elided=True), *numbers), rows, self._width)

    def _print_pairs(self) -> None:
        if self._report.pairs:
            columns = (self._shared(), *(Column(title, elided=True) for title in ("BETWEEN", "AND", "WHAT")))
            rows = [
                (size(pair.shared_bytes), *map(self._name, pair.checkpoints), _parts(pair))
                for pair in self._report.pairs
            ]
            emit("")
            self._emit_some(columns, rows, self._report.pairs_left_out)

    def _print_differences(self) -> None:
        """Say for the first pairs which tensors differ, in lines: names do not fit a table."""
        found = [one for one in self._report.differences if one.differing_tensors or any(one.only_tensors)]
        for one in found[:_COMPARED]:
            emit("")
            emit_text(f"{' and '.join(map(self._name, one.checkpoints))}: {_counts(one)}", self._width)
            self._print_names("differ", one.differing)
            for number, rows, count in zip(("first", "second"), one.only, one.only_tensors, strict=True):
                if count <= _FEW:
                    self._print_names(f"only in the {number}", rows)
        if len(found) > _COMPARED:
            more = plural(len(found) - _COMPARED, "more pair")
            emit_text(f"and {more} with differences, in --format json", self._width)

    def _print_names(self, what: str, rows: Sequence[DifferingTensors]) -> None:
        if rows:
            named = ", ".join(row.name if row.count == 1 else f"{row.name} ({row.count})" for row in rows[:_NAMED])
            emit_text(f"- {what}: {named}{', ...' if len(rows) > _NAMED else ''}", self._width, "  ")

    def _print_near_duplicates(self) -> None:
        if not self._report.near_duplicates:
            return
        columns = (
            Column("EQUAL ELEMENTS", right=True),
            Column("DELTA", right=True),
            Column("BETWEEN", elided=True),
            Column("AND", elided=True),
        )
        rows = [
            (
                f"{found.equal_elements * 100:.1f} %",
                f"{found.delta_ratio * 100:.1f} %",
                self._name(found.a),
                self._name(found.b),
            )
            for found in self._report.near_duplicates
        ]
        emit("")
        self._emit_some(columns, rows, self._report.near_duplicates_left_out)
        emit_text(
            "Near duplicates, by samples: DELTA is the size of a lossless difference, relative to one checkpoint. "
            "weightd does not save this today.",
            self._width,
        )

    def _print_budget(self, budget: BudgetPlan) -> None:
        columns = [
            Column("LOAD", right=True),
            Column("CHECKPOINT", elided=True),
            Column("ADDS", right=True),
            Column("TOGETHER", right=True, spare=1),
            Column("FITS"),
            Column("REMOVE TO FIT", listed=True),
        ]
        rows = [
            [
                str(number),
                self._name(step.name),
                size(step.added_bytes),
                size(step.total_bytes),
                "yes" if step.fits else "no",
                self._to_remove(step, budget.budget_bytes),
            ]
            for number, step in enumerate(budget.order, start=1)
        ]
        if budget.fitting == len(budget.order):
            columns, rows = columns[:-1], [row[:-1] for row in rows]
        emit("")
        emit_table(columns, rows, self._width)
        emit_text(
            f"{'at most ' if self._report.at_most else ''}{budget.fitting} of "
            f"{plural(len(budget.order), 'checkpoint')} fit {size(budget.budget_bytes)}, together "
            f"{size(budget.used_bytes)}. Next is always the one that adds the fewest bytes to those before it.",
            self._width,
        )

    def _to_remove(self, step: BudgetStep, budget_bytes: int) -> str:
        """Say without which checkpoints one fits, or that it never does."""
        if not step.fits and self._sizes[step.name] > budget_bytes and not step.remove:
            return "too large"
        return ", ".join(map(self._name, step.remove)) or "-"

    def _print_skipped(self) -> None:
        """Say in lines what was skipped: reasons are sentences."""
        if self._report.skipped:
            shown = self._report.skipped[: self._most]
            emit("")
            for skipped in shown:
                emit_text(f"skipped {skipped.path}: {skipped.reason}", self._width)
            self._say_hidden(len(self._report.skipped) - len(shown))

    def _emit_some(self, columns: Sequence[Column], rows: Sequence[Sequence[str]], left_out: int) -> None:
        shown = rows[: self._most]
        emit_table(columns, shown, self._width)
        self._say_hidden(len(rows) - len(shown) + left_out)

    def _say_hidden(self, count: int) -> None:
        if count:
            emit_text(f"and {count:,} more; --wide and --format json list more", self._width)


def _percent(part: int, whole: int) -> str:
    """Rounded, but neither nothing nor all unless it is."""
    if not part:
        return "0"
    if 100 * part < whole:
        return "<1%"
    return "100%" if part == whole else f"{min(99, round(100 * part / whole))}%"


def _parts(pair: PlannedPair) -> str:
    """`text_encoder 17.7 GiB, vae = unet/vae 317 MiB`, the biggest first; a dash if there are no components."""
    if not any(name for part in pair.parts for name in part.components):
        return "-"
    return ", ".join(f"{_named(part)} {size(part.shared_bytes)}" for part in pair.parts)


def _named(part: SharedPart) -> str:
    """The component's name, or both names if they differ; a checkpoint without components has none."""
    return " = ".join(dict.fromkeys(filter(None, part.components))) or "-"


def _counts(one: Difference) -> str:
    """`89 tensors equal, 12 differ, 1 only in the second`."""
    counts = (
        f"{plural(one.equal_tensors, 'tensor')} equal",
        f"{one.differing_tensors} differ" if one.differing_tensors else "",
        f"{one.only_tensors[0]} only in the first" if one.only_tensors[0] else "",
        f"{one.only_tensors[1]} only in the second" if one.only_tensors[1] else "",
    )
    return ", ".join(filter(None, counts))
