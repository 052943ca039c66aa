"""One Markdown table, and a plot, of many results: systems by data sets.

RESULTS are result files of ``python -m eval``, or folders of them. A system is a model with its options; its results
on BEIR, STS and USEB share one row. Rows that are marked "published" are other people's numbers, from
eval/published.json, for the data sets at hand. Under the table stands every row's command.

  python -m eval report OUT1 OUT2 --output report.md --plot report.png --x depth
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from eval.datasets import AVERAGES
from eval.provenance import command
from eval.results import Result, find_results, mean_metrics
from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import atomic_write

_PUBLISHED = epath.Path(__file__).parent / "published.json"
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
    published: str | None = None  # where the numbers are from, if they are not ours


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
    parser.add_argument("--output", type=epath.Path, metavar="FILE", help="Markdown file (default: print)")
    parser.add_argument(
        "--plot", type=epath.Path, metavar="FILE", help="PNG of the metric, one line for each data set"
    )
    parser.add_argument(
        "--x",
        choices=("parameters", "depth"),
        default="parameters",
        help="the plot's x axis (default: %(default)s)",
    )


def main(args: argparse.Namespace) -> None:
    """Writes the table and the plot."""
    rows = collect([result for _, result in find_results(args.results)], args.metric)
    if args.published and args.metric == "ndcg@10":
        rows += published({column for row in rows for column in row.values})
    text = as_table(rows, args.metric, command(sys.argv[1:]))
    if args.output:
        with atomic_write(args.output) as stream:
            stream.write(text.encode())
    else:
        print(text, end="")
    if args.plot:
        plot(rows, args.metric, args.x, args.plot)


def collect(results: list[Result], metric: str = "ndcg@10") -> list[Row]:
    """Rows of results, in the order in which their systems appear.

    A second result of the same system on the same data set begins a row of its own.

    Raises:
        InputError: no result has the metric.
    """
    rows: list[Row] = []
    for result in results:
        column, value = _cell(result, metric)
        if column is None or value is None or result["name"].startswith("cqadupstack-"):
            continue
        name = label(result)
        row = next((row for row in rows if row.name == name and column not in row.values), None)
        if row is None:
            row = Row(name)
            rows.append(row)
        row.values[column] = value
        if result.get("command") not in (None, *row.commands):
            row.commands.append(result["command"])
        system = result.get("cross_encoder") or result.get("model") or {}
        row.kind = "cross-encoder" if result.get("cross_encoder") else "bi-encoder"
        row.parameters = system.get("parameters")
        row.depth = (result.get("settings", {}).get("cross_encoder") or {}).get("rerank_depth")
    if not rows:
        raise InputError(f"none of the results has {metric}")
    for row in rows:
        for key, names in AVERAGES.items():
            if all(name in row.values for name in names):
                row.values[key] = mean_metrics([{key: row.values[name]} for name in names])[key]
    return rows


def label(result: Result) -> str:
    """What a result's system is called: the model and the options that change its numbers."""
    first = result.get("first_stage") or {}
    start = _model_label(result["model"]) if result.get("model") else first.get("name", "")
    if start == "run":
        start = f"run {first['run']}"
    if start == "bi-encoder" and first.get("model"):  # ranked by another command
        start = _model_label(first["model"])
    encoder = result.get("cross_encoder")
    if not encoder:
        return start
    depth = (result.get("settings", {}).get("cross_encoder") or {}).get("rerank_depth")
    return f"{_model_label(encoder)} on {start}, top {depth}, {_meaning(encoder)}"


def _meaning(encoder: dict[str, Any]) -> str:
    """What a cross-encoder's scores are: after which prompt, or by which instruction of its own scoring."""
    if "scoring" in encoder:
        instruction = encoder["scoring"]["prompt"]
        said = f", instruction {json.dumps(instruction, ensure_ascii=False)}" if instruction else ""
        return f"its own scoring{said}"
    prompt = encoder["prompt"]["prefix"] + "{}" + encoder["prompt"]["suffix"]
    named = encoder.get("study") or next((name for name, text in _prompts().items() if text == prompt), None)
    return f"prompt {named}" if named else f"prompt {json.dumps(prompt, ensure_ascii=False)}"


def _prompts() -> dict[str, str]:
    from eval.models import PROMPTS  # imports JAX, which a report does not need otherwise

    return PROMPTS


def _model_label(model: dict[str, Any]) -> str:
    source = str(model["source"])
    name = epath.Path(source).name if epath.Path(source).exists() or source.count("/") != 1 else source
    options = [str(model["pooling"])] if model.get("pooling") else []
    options += ["brackets"] * bool(model.get("brackets"))
    options += [f"biases {model['biases'][-8:]}"] if model.get("biases") else []
    options += [model["dtype"]] if model.get("dtype", "float32") != "float32" else []
    return f"{name} ({', '.join(options)})" if options else name


def _cell(result: Result, metric: str) -> tuple[str | None, float | None]:
    """The column that a result belongs to, and its value there."""
    kind, name, metrics = result["kind"], result.get("name"), result["metrics"]
    if kind == "beir":
        return name, metrics.get(metric)
    if kind == "sts":
        return f"{name} (Spearman)", metrics.get("spearman_cosine")
    if kind == "useb":
        return "useb (average precision)", metrics.get("avg")
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


def as_table(rows: list[Row], metric: str, made_by: str) -> str:
    """The Markdown table, the rows' commands and sources below it, and the command that made it."""
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
    lines.append("")
    for number, row in enumerate(rows, 1):
        if row.published:
            lines.append(f"{number}. published: {row.published}")
        else:
            lines.append(f"{number}. " + "; ".join(f"`{command}`" for command in row.commands))
    lines += ["", f"Made by `{made_by}`"]
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], metric: str, x: str, path: epath.Path) -> None:
    """A PNG: the metric over model size or re-rank depth, a colour for each data set; published points are hollow.

    Raises:
        InputError: no row has a value for the x axis.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, NullFormatter

    placed = [row for row in rows if getattr(row, x) is not None]
    if not placed:
        raise InputError(f"no result has {x} for the x axis of a plot")
    lines: dict[tuple[str, str], list[tuple[int, float, bool]]] = {}
    for row in placed:
        # What differs in x alone is one line: one model at several depths, or models of one kind of several sizes.
        system = row.name.replace(f", top {row.depth}", "") if x == "depth" else row.kind
        for name in (name for name in row.values if name not in AVERAGES and not name.endswith(")")):
            point = (getattr(row, x), row.values[name], row.published is not None)
            series = f"{row.kind}, published" if row.published else system
            lines.setdefault((name, series), []).append(point)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    names = sorted({name for name, _ in lines})
    for (name, series), points in sorted(
        lines.items(), key=lambda line: (names.index(line[0][0]), line[0][1])
    ):
        hollow = points[0][2]
        axes.plot(
            [point[0] for point in sorted(points)],
            [point[1] for point in sorted(points)],
            linestyle="" if hollow else "-",
            marker="s" if "cross-encoder" in series or x == "depth" else "o",
            markerfacecolor="none" if hollow else None,
            color=f"C{names.index(name)}",
            label=f"{name}, {series}",
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel({"parameters": "parameters", "depth": "documents re-ranked"}[x])
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=1, fontsize="x-small", frameon=False)
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", dpi=150)
