"""The figures as tables: rows of words, written for a terminal, as plain text or as Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spolia_fidelity.report.words import NONE, divergence, duration, nats, percent, points, share
from spolia_fidelity.result import EvalResult, Figures

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True, slots=True)
class Table:
    """Words in rows. The first `num_names` columns are names, the others figures."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_names: int = 1

    def plain(self) -> str:
        """Aligned columns, no decoration."""
        lines = (self.header, *self.rows)
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if place < self.num_names else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def markdown(self) -> str:
        """A Markdown table."""
        rule = ["---"] * self.num_names + ["---:"] * (len(self.header) - self.num_names)
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.header, rule, *self.rows))

    def rich(self) -> RichTable:
        """For a terminal; needs the `cli` extra."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=self.title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.title_justify, table.title_style = "left", "bold"
        for place, name in enumerate(self.header):
            is_name = place < self.num_names
            table.add_column(name, justify="left" if is_name else "right", no_wrap=not is_name)
        for row in self.rows:
            table.add_row(*map(Text, row))  # as text: brackets are intervals here, not markup
        return table


def summary_table(result: EvalResult) -> Table:
    """One row a policy: what it computes, and how far its predictions are from full recompute's."""
    rows = tuple(
        (
            policy.name,
            percent(policy.recomputed_share),
            nats(policy.overall.nll_increase),
            divergence(policy.overall.kl_mean),
            divergence(policy.overall.kl_p99),
            share(policy.overall.agreement),
            duration(policy.seconds),
        )
        for policy in result.policies
    )
    header = ("policy", "recomputed", "ΔNLL, nats/token", "mean KL, nats", "p99 KL, nats", "top-1 agreement", "time")
    return Table("Distance from full recompute, all questions", header, rows)


def brief_summary(result: EvalResult) -> Table:
    """`summary_table` for a terminal of 80 columns: an interval for ΔNLL only."""
    rows = tuple(
        (
            policy.name,
            percent(policy.recomputed_share),
            nats(policy.overall.nll_increase),
            f"{policy.overall.kl_mean.value:.4f}",
            f"{policy.overall.kl_p99.value:.3f}",
            percent(policy.overall.agreement.value),
        )
        for policy in result.policies
    )
    header = ("policy", "computed", "ΔNLL, nats/token", "KL", "KL p99", "top-1")
    return Table("Distance from full recompute, all questions", header, rows)


def brief_tasks(result: EvalResult) -> Table:
    """`task_table` for a terminal of 80 columns: under each task's name its policies."""
    rows: list[tuple[str, ...]] = []
    for task in result.tasks:
        rows.append((task, "", "", ""))
        for policy in result.policies:
            figures = _figures(policy.figures(task))
            right = NONE if figures.exact is None else percent(figures.exact.value)
            rows.append((f"  {policy.name}", right, points(figures.loss_points), nats(figures.nll_increase)))
    return Table("By task", ("policy", "exact", "loss, points", "ΔNLL, nats/token"), tuple(rows))


def task_table(result: EvalResult) -> Table:
    """One row a task and policy: exact match and what was lost of it."""
    rows = tuple(
        (
            figures.task,
            policy.name,
            str(figures.num_questions),
            nats(figures.nll_increase),
            share(figures.exact),
            points(figures.loss_points),
            NONE if figures.exact is None else str(figures.num_changed),
        )
        for task in result.tasks
        for policy in result.policies
        for figures in [_figures(policy.figures(task))]
    )
    header = ("task", "policy", "questions", "ΔNLL, nats/token", "exact match", "loss, points", "changed")
    return Table("By task", header, rows, num_names=2)


def f1_table(result: EvalResult) -> Table | None:
    """Token F1 of generated answers, one row a task and policy; None where nothing was generated."""
    rows = tuple(
        (task, policy.name, share(figures.f1))
        for task in result.tasks
        for policy in result.policies
        for figures in [_figures(policy.figures(task))]
        if figures.f1 is not None
    )
    return Table("Generated answers", ("task", "policy", "F1"), rows, num_names=2) if rows else None


def print_result(result: EvalResult) -> None:
    """Prints brief tables and the notes, for a terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    for table in (brief_summary(result), brief_tasks(result)):
        if table.rows:
            console.print(table.rich())
    for note in result.notes:
        console.print(note, markup=False)


def _figures(found: Figures | None) -> Figures:
    assert found is not None, "every policy has figures of every task"
    return found
