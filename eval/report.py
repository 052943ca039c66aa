"""One Markdown table, and a plot, of many results: systems by data sets.

RESULTS are result files of ``python -m eval`` or of mteb, or folders of them. A system is a model with its options; its
results on BEIR, STS and USEB share one row. Rows that are marked "published" are other people's numbers, from
eval/published.json, for the data sets at hand. Under the table stands every row's command.

  python -m eval report OUT1 OUT2 --output report.md --plot report.pdf --x depth
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from etils import epath

from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import atomic_write

from .datasets import AVERAGES
from .labels import label, models_of
from .pictures import MARKERS, check_path, legend, panels, save, sizes, style
from .provenance import command
from .results import Result, find_results, mean_metrics, split_of

_PUBLISHED = epath.Path(__file__).parent / "published.json"
_SIZE = re.compile(r"-?[0-9.]+[MB]\b.*")  # of a model's name: the size and what follows
_ORDER = ("msmarco", *AVERAGES["average_18"])


@dataclass
class Row:
    """A system's line: its values by column, its commands, and what a plot has on its x axis."""

    name: str
    values: dict[str, float] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    parameters: int | None = None
    depth: int | None = None
    kind: str = "bi-encoder"
    seconds: dict[str, float] = field(default_factory=dict)  # by column
    intervals: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # of values with some for every query
    published: str | None = None  # where the numbers are from, if they are not ours
    per_query: dict[str, dict[str, float]] = field(default_factory=dict)  # column -> query -> value
    revisions: tuple[Any, ...] = ()  # of its models
    lengths: dict[str, tuple[Any, ...]] = field(
        default_factory=dict
    )  # kind of result -> max_seq_length of each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "results", nargs="+", type=epath.Path, metavar="RESULTS", help="result file, or folder of results"
    )
    parser.add_argument("--metric", default="ndcg@10", help="for BEIR (default: %(default)s)")
    parser.add_argument(
        "--published",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="add the published rows (nDCG@10)",
    )
    parser.add_argument(
        "--significance",
        action="store_true",
        help="also compare any two rows on each BEIR data set: difference, and p of the paired bootstrap",
    )
    parser.add_argument("--output", type=epath.Path, metavar="FILE", help="Markdown file (default: print)")
    parser.add_argument(
        "--plot",
        type=epath.Path,
        metavar="FILE",
        help="figure of the metric, a panel for each data set: .png, .pdf or .svg",
    )
    parser.add_argument(
        "--x",
        choices=("parameters", "depth", "seconds"),
        help="the plot's x axis: model size, documents re-ranked, or the time of the whole evaluation, for results of "
        "one machine (default: parameters)",
    )


def main(args: argparse.Namespace) -> None:
    """Writes the table and the plot."""
    if args.plot:
        check_path(args.plot)
    elif args.x:
        raise InputError("--x: only for a --plot")
    rows = collect([result for _, result in find_results(args.results)], args.metric)
    if args.published and args.metric == "ndcg@10":
        rows += published({column for row in rows for column in row.values})
    made_by = command(sys.argv[1:])
    text = as_table(rows, args.metric, made_by, comparisons(rows) if args.significance else [])
    if args.output:
        with atomic_write(args.output) as stream:
            stream.write(text.encode())
    else:
        print(text, end="")
    if args.plot:
        plot(rows, args.metric, args.x or "parameters", args.plot)


def collect(results: list[Result], metric: str = "ndcg@10") -> list[Row]:
    """Rows of results, in the order in which their systems appear.

    A system is a label and the revisions of its models; results of one kind also have its models' max_seq_length in
    common. A second result of the same system on the same data set begins a row of its own.

    Raises:
        InputError: no result has the metric.
    """
    rows: list[Row] = []
    for result in results:
        column, value = _cell(result, metric)
        if column is None or value is None or result["name"].startswith("cqadupstack-"):
            continue
        name, kind = label(result), result["kind"]
        revisions, lengths = (
            tuple(model.get(key) for model in models_of(result)) for key in ("revision", "max_seq_length")
        )
        row = next(
            (
                row
                for row in rows
                if (row.name, row.revisions) == (name, revisions)
                and row.lengths.get(kind, lengths) == lengths
                and column not in row.values
            ),
            None,
        )
        if row is None:
            row = Row(name, revisions=revisions)
            rows.append(row)
        row.lengths[kind] = lengths
        row.values[column] = value
        if metric in (per_query := result.get("per_query", {})) and len(per_query[metric]) > 1:
            row.intervals[column] = interval(per_query[metric])
        if seconds := result.get("seconds", {}).get("total"):
            row.seconds[column] = seconds
        if metric in result.get("per_query", {}):
            row.per_query[column] = dict(zip(result["queries"], result["per_query"][metric], strict=True))
        if result.get("command") not in (None, *row.commands):
            row.commands.append(result["command"])
        system = result.get("cross_encoder") or result.get("model") or {}
        row.kind = "cross-encoder" if result.get("cross_encoder") else "bi-encoder"
        row.parameters = system.get("parameters")
        row.depth = (result.get("settings", {}).get("cross_encoder") or {}).get("rerank_depth")
    if not rows:
        raise InputError(f"none of the results has {metric}")
    _tell_apart(rows)
    for row in rows:
        for key, names in AVERAGES.items():
            if all(name in row.values for name in names):
                row.values[key] = mean_metrics([{key: row.values[name]} for name in names])[key]
    return rows


def _tell_apart(rows: list[Row]) -> None:
    """Adds to names that several rows have what these rows differ in: revisions, or how many tokens are read."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.name, []).append(row)
    for name, group in groups.items():
        revisions = [" and ".join(str(revision)[-8:] for revision in row.revisions) for row in group]
        tokens = [
            " and ".join(dict.fromkeys(str(length) for each in row.lengths.values() for length in each))
            for row in group
        ]
        for row, revision, length in zip(group, revisions, tokens, strict=True):
            row.name = name + (f", revision {revision}" if len(set(revisions)) > 1 else "")
            row.name += f", {length} tokens" if len(set(tokens)) > 1 else ""


def _cell(result: Result, metric: str) -> tuple[str | None, float | None]:
    """The column that a result belongs to, and its value there."""
    kind, name, metrics = result["kind"], result.get("name"), result["metrics"]
    if name and (split := split_of(result)):
        name = f"{name}, {split}"
    if kind == "beir":
        return name, metrics.get(metric)
    if kind == "sts":
        return f"{name} (Spearman)", metrics.get("spearman_cosine")
    if kind == "mteb" and metric in metrics:  # a retrieval task, measured as BEIR's are
        return name, metrics[metric]
    if kind == "mteb" and result.get("main_score") is not None:
        return f"{name} (main score)", result["main_score"]
    if kind == "useb":
        return f"{name} (average precision)", metrics.get("avg")
    return None, None


def published(columns: set[str]) -> list[Row]:
    """The published rows that have a number for one of the columns; averages where the table has them."""
    rows = []
    for entry in json.loads(_PUBLISHED.read_text(encoding="utf-8"))["rows"]:
        values = {column: value for column, value in entry["values"].items() if column in columns}
        for key, names in AVERAGES.items():
            if key in columns and all(name in entry["values"] for name in names):
                values[key] = sum(entry["values"][name] for name in names) / len(names)
        if values:
            rows.append(
                Row(
                    entry["name"],
                    values,
                    parameters=entry.get("parameters"),
                    depth=entry.get("depth"),
                    kind="cross-encoder" if "depth" in entry else "bi-encoder",
                    published=entry["source"],
                )
            )
    return rows


def comparisons(rows: list[Row]) -> list[str]:
    """Markdown: for each data set with values for every query, each two rows' difference and its p.

    The p-value is that of the paired bootstrap of ``python -m eval significance``, two-sided. No correction is made
    for how many pairs there are.
    """
    from .significance import compare, shown  # imports scipy.stats, which a report does not need otherwise

    lines = []
    for column in dict.fromkeys(name for row in rows for name in row.per_query):
        numbered = [(n, row.per_query[column]) for n, row in enumerate(rows, 1) if column in row.per_query]
        if len(numbered) < 2:
            continue
        lines += [
            f"{column}: row minus column, and in brackets p (paired bootstrap over queries, two-sided)",
            "",
            f"| | {' | '.join(f'[{number}]' for number, _ in numbered[:-1])} |",
            f"|--|{'--:|' * (len(numbered) - 1)}",
        ]
        for place, (number, values) in enumerate(numbered[1:], 1):
            cells = []
            for other, others in numbered[:place]:
                if values.keys() != others.keys():
                    raise InputError(
                        f"{column}: rows {other} and {number} were measured on different queries"
                    )
                pairs = np.array([(others[query], values[query]) for query in others])
                found = compare(pairs[:, 0], pairs[:, 1])
                cells.append(f"{found.difference:+.4f} ({shown(found.p_bootstrap)})")
            cells += [""] * (len(numbered) - 1 - len(cells))
            lines.append(f"| [{number}] | {' | '.join(cells)} |")
        lines.append("")
    return lines


def as_table(rows: list[Row], metric: str, made_by: str, below: Sequence[str] = ()) -> str:
    """The Markdown table, what stands `below`, the rows' commands and sources, and the command that made it."""
    found = dict.fromkeys(column for row in rows for column in row.values)
    order = [*_ORDER, *[column for column in found if column not in (*_ORDER, *AVERAGES)], *AVERAGES]
    columns = [column for column in order if column in found]
    lines = [
        "# Results",
        "",
        f"Columns without a measure of their own: {metric}.",
        "",
        f"| system | {' | '.join(columns)} |",
        f"|--|{'--:|' * len(columns)}",
    ]
    for number, row in enumerate(rows, 1):
        cells = [f"{row.values[column]:.4f}" if column in row.values else "" for column in columns]
        mark = " (published)" if row.published else ""
        name = row.name.replace("|", "\\|")
        lines.append(f"| {name}{mark} [{number}] | {' | '.join(cells)} |")
    lines += ["", *below]
    for number, row in enumerate(rows, 1):
        if row.published:
            lines.append(f"{number}. published: {row.published}")
        else:
            lines.append(f"{number}. " + "; ".join(f"`{command}`" for command in row.commands))
    lines += ["", f"Made by `{made_by}`"]
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], metric: str, x: str, path: epath.Path) -> None:
    """A figure of the metric over model size, time or re-rank depth, a panel for each data set.

    A system has one colour and marker in all panels and one entry in the legend; published points are hollow, bars are
    the 95 % interval of the bootstrap over queries. What is no model, such as BM25, is a line; a model without a value
    for the x axis is left out.

    Raises:
        InputError: no row has a value for the x axis.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not any(_x(row, x, column) for row in rows for column in row.values):
        raise InputError(f"no result has {x} for the x axis of a plot")
    rows = [row for row in rows if row.parameters is None or any(_x(row, x, name) for name in row.values)]
    columns = dict.fromkeys(name for row in rows for name in row.values)
    ours = dict.fromkeys(name for row in rows if not row.published for name in row.values)
    shown = [name for name in ours or columns if not name.endswith(")")] or list(columns)
    systems = list(dict.fromkeys(_series(row, x) for row in rows))
    with style():
        figure, grid = panels(len(shown))
        for axes, column in zip(grid, shown, strict=True):
            for number, system in enumerate(systems):
                members = [row for row in rows if _series(row, x) == system and column in row.values]
                _draw(axes, members, x, column, number, system)
            axes.set_xscale("log")
            low, high = axes.get_xlim()
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
            axes.xaxis.set_major_formatter(FuncFormatter(sizes))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(
                {"parameters": "parameters", "depth": "documents re-ranked", "seconds": "seconds"}[x]
            )
            axes.set_ylabel(metric.replace("ndcg", "nDCG"))
            axes.set_title(column, fontsize=7)
            axes.grid(alpha=0.3)
        legend(figure, grid)
        save(figure, path)


def _draw(axes: Any, members: list[Row], x: str, column: str, number: int, label: str) -> None:
    """One system in one panel."""
    look = {"color": f"C{number % 10}", "label": label}
    for row in members:
        if not _x(row, x, column):
            axes.axhline(row.values[column], linestyle=":" if row.published else "--", **look)
    placed = sorted(
        ((_x(row, x, column), row) for row in members if _x(row, x, column)), key=lambda pair: pair[0] or 0
    )
    if not placed:
        return
    values = [row.values[column] for _, row in placed]
    bounds = [row.intervals.get(column, (row.values[column],) * 2) for _, row in placed]
    hollow = placed[0][1].published is not None
    errors = [
        [value - low for value, (low, _) in zip(values, bounds, strict=True)],
        [high - value for value, (_, high) in zip(values, bounds, strict=True)],
    ]
    axes.errorbar(
        [place for place, _ in placed],
        values,
        yerr=errors if any(map(any, errors)) else None,
        marker=MARKERS[number % len(MARKERS)],
        markerfacecolor="white" if hollow else None,
        linestyle=":" if hollow else "-",
        capsize=1.5,
        elinewidth=0.6,
        **look,
    )


def _x(row: Row, x: str, column: str) -> float | None:
    return row.seconds.get(column) if x == "seconds" else getattr(row, x)


def _series(row: Row, x: str) -> str:
    """What a row is one point of: a model at several depths, or the published models of one kind in several sizes."""
    if row.published and x == "depth" and row.depth:
        return f"{row.name.replace(f'@{row.depth}', '')}, published"
    if row.published and row.parameters:
        return f"{_SIZE.sub('', row.name)}, published"
    if row.published:
        return f"{row.name}, published"
    return row.name.replace(f", top {row.depth}", "") if x == "depth" else row.name


def interval(values: list[float], samples: int = 1000) -> tuple[float, float]:
    """The bootstrap's 95 % interval of the mean over queries."""
    draws = np.random.default_rng(0).choice(np.array(values), (samples, len(values)))
    low, high = np.percentile(draws.mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
