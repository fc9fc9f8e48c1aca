"""From tables to what others read: CSV, Markdown, LaTeX, and Hugging Face model cards and evaluation results.

Every exporter keeps tables apart and names the protocol id of each number. Floors and ceilings are in the tables;
cards and evaluation results are of one system each.
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import EvalResult
from jinja2 import Environment, PackageLoader

from datamodules.shards import write_atomic
from sweeps.claims import Verdict, format_difference
from sweeps.leaderboard import (
    COSTS,
    TASKS,
    Column,
    Row,
    Table,
    describe,
    format_cost,
    format_entry,
    format_place,
    heading_of,
    label,
    note_of,
)
from sweeps.reported import BASES, Reported
from trainers.tasks import SystemInfo


def write_exports(
    tables: Sequence[Table],
    reported: Sequence[Reported],
    verdicts: Sequence[Verdict],
    infos: Mapping[str, SystemInfo],
    out: Path,
) -> None:
    """Writes ``leaderboard.csv``, ``.md``, ``.tex`` and, for each system, a folder below ``cards``.

    A system's folder has the layout of a Hugging Face model repository: ``README.md`` (the card, with ``model-index``)
    and ``.eval_results/facebench.yaml``.

    Args:
        tables: of one results file.
        reported: what others reported on the tasks of these tables.
        verdicts: what the papers' claims came to.
        infos: what is known of each system, by name.
        out: folder to write.
    """
    write_atomic(out / "leaderboard.csv", to_csv(tables).encode())
    write_atomic(out / "leaderboard.md", to_markdown(tables, reported, verdicts).encode())
    write_atomic(out / "leaderboard.tex", to_latex(tables).encode())
    for system in systems_of(tables):
        folder = out / "cards" / slug(system)
        write_atomic(folder / "README.md", model_card(system, tables, infos.get(system)).encode())
        write_atomic(folder / ".eval_results" / "facebench.yaml", to_eval_results(system, tables).encode())


def systems_of(tables: Iterable[Table]) -> list[str]:
    """Names of all systems, floors and ceilings left out, in order of appearance."""
    return list(dict.fromkeys(row.system for table in tables for row in table.rows if row.role == "system"))


def slug(text: str) -> str:
    """A name as part of a file name or an identifier: letters, digits, dots and hyphens."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.").lower() or "unnamed"


# CSV


def to_csv(tables: Iterable[Table]) -> str:
    """Every value as a row of its own: long form, easy to filter and to plot."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            *("task", "data", "split", "protocol", "system", "title", "role", "seeds", "samples", "people"),
            *("metric", "unit", "value", "low", "high", "error_bars_over", "rank", "place_low", "place_high"),
        ]
    )
    for table in tables:
        for row in table.rows:
            about = [table.task, table.data, table.split, table.protocol["id"], row.system, row.title, row.role]
            for column in table.columns:
                entry = row.entries[column.name]
                interval, place = entry.interval, entry.place
                counts = [len(row.seeds), entry.samples, entry.people or ""]
                bounds = [interval.value, interval.low, interval.high] if interval else ["", "", ""]
                places = [int(place.low), int(place.high)] if place else ["", ""]
                writer.writerow(
                    [*about, *counts, column.name, column.unit, *bounds, table.over, entry.rank or "", *places]
                )
            for name, value in row.costs.items():
                unit = row.throughput_unit if name == "throughput" else COSTS[name][1]
                writer.writerow([*about, len(row.seeds), "", "", name, unit, value, "", "", "", "", "", ""])
    return buffer.getvalue()


# Markdown


def to_markdown(tables: Iterable[Table], reported: Sequence[Reported] = (), verdicts: Sequence[Verdict] = ()) -> str:
    """For each table its scores, what stands behind each, its comparisons; then claims, and what others reported."""
    parts = []
    for table in tables:
        costs = _cost_names(table)
        headings = ["", "System", "Seeds", *(column.heading for column in table.columns)]
        lines = [f"## {_markdown(heading_of(table))}", ""]
        rows = []
        for row in table.rows:
            cells = [_rank(row, table), label(row), str(len(row.seeds))]
            scores = [_markdown(format_entry(row.entries[column.name], column)) for column in table.columns]
            scores = [
                f"**{text}**" if row.entries[column.name].rank == 1 else text
                for text, column in zip(scores, table.columns, strict=True)
            ]
            rows.append([*map(_markdown, cells), *scores, *(format_cost(name, row) for name in costs)])
        lines += _markdown_table([*headings, *(COSTS[name][0] for name in costs)], rows)
        lines += ["", f"{note_of(table)} Beside a rank: the 95 % interval of the place by the mean alone.", ""]
        lines += ["What stands behind each number:", ""]
        lines += _markdown_table(
            ["System", *(column.title for column in table.columns)],
            [
                [_markdown(label(row)), *(table.counts(row.entries[column.name]) for column in table.columns)]
                for row in table.rows
            ],
        )
        pairs = table.comparisons[table.primary]
        if pairs:
            column = table.primary_column
            lines += ["", f"{column.title}, paired comparisons (Holm-corrected):", ""]
            lines += [f"- {_markdown(describe(pair, table, column))}" for pair in pairs]
        parts.append("\n".join([*lines, ""]))
    if verdicts:
        rows = [[*map(_markdown, (v.claim.text, v.claim.comparison, format_difference(v))), v.word] for v in verdicts]
        lines = _markdown_table(["Claim", "Compared", "Difference [95 %]", "Verdict"], rows)
        parts.append("\n".join(["## What the papers claim", "", *lines, ""]))
    if reported:
        parts.append(_markdown_reported(reported))
    return "\n".join(parts)


def _markdown_reported(reported: Sequence[Reported]) -> str:
    rows = [
        [*map(_markdown, (number.system, number.data, number.metric, number.value, number.source)), BASES[number.basis]]
        for number in reported
    ]
    head = ["System", "Data", "Metric", "Value as printed", "Reported by", "How sure"]
    note = "Not measured here: other data, other protocols. These numbers cannot be set beside those above."
    return "\n".join(["## Reported elsewhere", "", note, "", *_markdown_table(head, rows), ""])


def _markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_~<>|#])", r"\\\1", " ".join(text.split())).replace("](", "\\](")


def _rank(row: Row, table: Table) -> str:
    entry = row.entries[table.primary]
    if entry.rank is None or entry.place is None:
        return ""
    place = format_place(entry.place)
    return f"{entry.rank}" if place == str(entry.rank) else f"{entry.rank} ({place})"


def _cost_names(table: Table) -> list[str]:
    return [name for name in COSTS if any(name in row.costs for row in table.rows)]


# LaTeX

_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}"},
    **{"↑": r"$\uparrow$", "↓": r"$\downarrow$", "→": r"$\rightarrow$", "²": r"$^2$", "×": r"$\times$", "−": "$-$"},
    **{"–": "--", "“": "``", "”": "''", '"': r"\textquotedbl{}"},
}


def to_latex(tables: Iterable[Table]) -> str:
    """A booktabs table for each table, intervals small beside the values, the best bold.

    Needs ``booktabs``, ``graphicx`` (tables are shrunk to the width of the text) and T1 fonts.
    """
    head = "% Needs \\usepackage{booktabs,graphicx} and \\usepackage[T1]{fontenc}.\n"
    return head + "\n".join(_latex_table(table) for table in tables)


def _latex_table(table: Table) -> str:
    costs = _cost_names(table)
    headings = ["System", "Rank", "Seeds", *(column.heading for column in table.columns)]
    headings += [COSTS[name][0] for name in costs]
    caption = f"{TASKS.get(table.task, table.task)}, {table.data}, {table.split} split. {note_of(table)}"
    lines = [
        "\\begin{table}",
        "  \\centering",
        f"  \\caption{{{_latex(caption)} Protocol \\texttt{{{_latex(table.protocol['id'])}}}.}}",
        f"  \\label{{tab:{slug(table.protocol['id'])}}}",
        "  \\resizebox{\\linewidth}{!}{%",
        f"  \\begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}",
        "    \\toprule",
        f"    {' & '.join(map(_latex, headings))} \\\\",
    ]
    role = None
    for row in table.rows:
        if (row.role == "system") != role:
            lines.append("    \\midrule")
            role = row.role == "system"
        cells = [_latex(label(row)), _latex(_rank(row, table)), str(len(row.seeds))]
        cells += [_latex_entry(row, column) for column in table.columns]
        cells += [_latex(format_cost(name, row)) or "--" for name in costs]
        lines.append(f"    {' & '.join(cells)} \\\\")
    return "\n".join([*lines, "    \\bottomrule", "  \\end{tabular}}", "\\end{table}", ""])


def _latex_entry(row: Row, column: Column) -> str:
    entry = row.entries[column.name]
    if entry.interval is None:
        return _latex(format_entry(entry, column))
    value, _, bounds = format_entry(entry, column).partition(" ")
    text = f"\\textbf{{{_latex(value)}}}" if entry.rank == 1 else _latex(value)
    return f"{text} {{\\scriptsize {_latex(bounds)}}}" if bounds else text


def _latex(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


# Hugging Face


def evaluations(system: str, tables: Iterable[Table]) -> list[EvalResult]:
    """A system's scores as entries of a ``model-index``; the data set's configuration is the protocol id."""
    return [
        EvalResult(
            task_type=table.task,
            task_name=TASKS.get(table.task, table.task),
            dataset_type=slug(table.data),
            dataset_name=table.data,
            dataset_config=table.protocol["id"],
            dataset_split=table.split,
            dataset_revision=table.sha256,
            metric_type=column.name,
            metric_name=column.heading,
            metric_value=entry.interval.value,
            metric_args={
                "unit": column.unit,
                "higher_is_better": column.higher_is_better,
                "interval_95": [entry.interval.low, entry.interval.high],
                "seeds": len(row.seeds),
                "samples": entry.samples,
            },
        )
        for table, row in _of(system, tables)
        for column in table.columns
        if (entry := row.entries[column.name]).interval is not None
    ]


def to_eval_results(system: str, tables: Iterable[Table]) -> str:
    """A system's scores as a file of ``.eval_results``; a task id is the protocol id and the metric's name."""
    entries = [
        EvalResultEntry(
            dataset_id=slug(table.data),
            task_id=f"{table.protocol['id']}/{column.name}",
            value=entry.interval.value,
            dataset_revision=table.sha256,
            notes=f"{column.heading}, {table.split} split: {format_entry(entry, column)}; {table.counts(entry)}",
        )
        for table, row in _of(system, tables)
        for column in table.columns
        if (entry := row.entries[column.name]).interval is not None
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True, width=120)


def model_card(system: str, tables: Sequence[Table], info: SystemInfo | None) -> str:
    """A card in Markdown: what the system is, its data, protocols, scores, costs and limits.

    Args:
        system: name of a system of the tables.
        tables: of one results file; those without the system are passed over.
        info: what is known of the system; None for one that is not installed here.
    """
    found = _of(system, tables)
    title = found[0][1].title
    data = ModelCardData(
        model_name=title,
        library_name="facebench",
        tags=sorted({table.task for table, _ in found}),
        eval_results=evaluations(system, tables) or None,
    )
    environment = Environment(  # Markdown, not HTML: the filter md escapes
        loader=PackageLoader("sweeps", "templates"),
        autoescape=False,  # noqa: S701
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = _markdown
    shown: dict[str, Any] = {
        "format_entry": format_entry,
        "format_place": format_place,
        "format_cost": format_cost,
        "label": label,
        "costs": COSTS,
        "tasks": TASKS,
        "commits": sorted({run.code[:10] for _, row in found for run in row.results if run.code}),
    }
    body = environment.get_template("card.md").render(title=title, found=found, info=info, **shown)
    return f"---\n{data.to_yaml()}\n---\n{body}"


def _of(system: str, tables: Iterable[Table]) -> list[tuple[Table, Row]]:
    return [(table, row) for table in tables for row in table.rows if row.system == system and row.role == "system"]
