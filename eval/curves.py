"""The curves of training runs in one figure: the loss by step, and the dev metric where a run has one.

RUN is an output folder of ``python -m train``. The loss is shown as a running mean over a fiftieth of the steps.

  python -m eval curves OUT1 OUT2 --plot curves.pdf
"""

from __future__ import annotations

import argparse

import numpy as np
from etils import epath

from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import parse_json

from .pictures import check_path, legend, panels, save, style


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "runs", nargs="+", type=epath.Path, metavar="RUN", help="output folder of python -m train"
    )
    parser.add_argument(
        "--plot", required=True, type=epath.Path, metavar="FILE", help="figure: .png, .pdf or .svg"
    )


def main(args: argparse.Namespace) -> None:
    """Draws the figure."""
    check_path(args.plot)
    ends = [run.name for run in args.runs]
    names = {run: run.name if ends.count(run.name) == 1 else str(run) for run in args.runs}  # a/out and b/out
    losses = {name: _records(run / "metrics.jsonl", "loss") for run, name in names.items()}
    devs = {name: _records(run / "dev.jsonl", "dev") for run, name in names.items()}
    for run, name in names.items():
        if not losses[name]:
            raise InputError(f"{run}: holds no run of python -m train (metrics.jsonl)")
    devs = {name: records for name, records in devs.items() if records}
    with style():
        figure, axes = panels(2 if devs else 1)
        for number, (name, records) in enumerate(losses.items()):
            steps, values = zip(*records, strict=True)
            axes[0].plot(steps, _smooth(np.array(values)), color=f"C{number}", label=name)
            if name in devs:
                axes[1].plot(*zip(*devs[name], strict=True), "o-", color=f"C{number}", label=name)
        for each, title in zip(axes, ("loss", "dev metric"), strict=False):
            each.set_xlabel("step")
            each.set_ylabel(title)
            each.grid(alpha=0.3)
        legend(figure, axes)
        save(figure, args.plot)


def _records(path: epath.Path, key: str) -> list[tuple[int, float]]:
    """Steps and values. The last line may be cut off: the run may go on, or have been killed."""
    records: list[tuple[int, float]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = parse_json(line)
        except ValueError:
            break
        if key in record:
            records.append((record["step"], record[key]))
    return records


def _smooth(values: np.ndarray) -> np.ndarray:
    reach = max(1, len(values) // 50)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.minimum(np.arange(len(values)) + reach // 2 + 1, len(values))
    starts = np.maximum(ends - reach, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
