"""Is the difference between two systems chance? Paired t-test and bootstrap over queries, for every shared data set.

A and B are results of ``python -m eval beir`` (files, or folders of them). The difference is B - A. The interval is
the bootstrap's percentiles (scipy.stats.bootstrap); the bootstrap's p-value is the share of resampled mean differences,
moved to a mean of 0, that are at least as far from 0 as the one observed. Both tests are two-sided.

  python -m eval significance OUT_A OUT_B --metric ndcg@10
  python -m eval significance OUT_A OUT_B --queries 10 --data DATA/scifact        and where the difference is
"""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass

import numpy as np
from etils import epath
from scipy import stats

from sgpt_jax.cli.options import positive, seed
from sgpt_jax.errors import InputError
from sgpt_jax.files.beir import RECORDS, find
from sgpt_jax.files.corpora import read_queries
from sgpt_jax.files.lines import atomic_write

from .beir import CACHE
from .datasets import obtain
from .results import Result, find_results

_BLOCK = 2**22  # resampled values that are held at a time


@dataclass(frozen=True)
class Comparison:
    """Means of two systems over the same queries, and how sure the difference is."""

    queries: int
    a: float
    b: float
    low: float | None  # 95 % interval of the difference; of one query there is none, and no p
    high: float | None
    p_t: float | None
    p_bootstrap: float | None
    wins: int  # queries on which B is better
    losses: int

    @property
    def difference(self) -> float:
        """B - A."""
        return self.b - self.a


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("a", type=epath.Path, metavar="A", help="result file, or folder of results")
    parser.add_argument("b", type=epath.Path, metavar="B", help="result file, or folder of results")
    parser.add_argument("--metric", default="ndcg@10", help="default: %(default)s")
    parser.add_argument("--samples", type=positive, default=10_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=seed, default=0, help="of the bootstrap (default: %(default)s)")
    parser.add_argument(
        "--queries",
        type=positive,
        metavar="N",
        help="also list the N queries that differ most, with both values",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="FOLDER",
        help="BEIR folder, or name of one, that has the texts of these queries; may be repeated",
    )
    parser.add_argument("--output", type=epath.Path, metavar="FILE", help="Markdown file (default: print)")


def main(args: argparse.Namespace) -> None:
    """Prints or writes the table."""
    if args.data and not args.queries:
        raise InputError("--data: only for --queries, which shows its texts")
    a, b = _by_name(args.a), _by_name(args.b)
    shared = [name for name in a if name in b]
    if not shared:
        raise InputError(f"{args.a} and {args.b} have no data set in common")
    folders = {folder.resolve().name: folder for folder in (obtain(source, CACHE) for source in args.data)}
    if other := [name for name in folders if name not in shared]:
        raise InputError(
            f"--data {folders[other[0]]}: {other[0]} is none of the data sets ({', '.join(shared)})"
        )
    lines = [
        f"{args.metric} of A ({args.a.name}) and B ({args.b.name}); {args.samples} bootstrap samples, seed {args.seed}",
        "",
        "| data set | queries | A | B | B - A | 95 % interval | p (t-test) | p (bootstrap) | B better / worse |",
        "|--|--:|--:|--:|--:|--|--:|--:|--:|",
    ]
    for name in shared:
        found = compare(*_paired(name, a[name], b[name], args.metric), samples=args.samples, seed=args.seed)
        lines.append(
            f"| {name} | {found.queries} | {found.a:.4f} | {found.b:.4f} | {found.difference:+.4f} "
            f"| {shown(found.low, '+')} to {shown(found.high, '+')} | {shown(found.p_t)} | {shown(found.p_bootstrap)} "
            f"| {found.wins} / {found.losses} |"
        )
    if args.queries:
        texts = {name: read_queries(find(folder, "queries", RECORDS)) for name, folder in folders.items()}
        for name in shared:
            lines += _apart(name, a[name], b[name], args.metric, args.queries, texts.get(name, {}))
    text = "\n".join(lines) + "\n"
    if args.output:
        with atomic_write(args.output) as stream:
            stream.write(text.encode())
    else:
        print(text, end="")


def _apart(name: str, a: Result, b: Result, metric: str, count: int, texts: dict[str, str]) -> list[str]:
    """A table of the queries on which two systems differ most, either way."""
    first, second = _paired(name, a, b, metric)
    order = np.argsort(-np.abs(second - first), kind="stable")[:count]
    lines = [
        "",
        f"{name}: the queries that differ most",
        "",
        f"| query |{' text |' if texts else ''} A | B | B - A |",
        f"|--|{'--|' if texts else ''}--:|--:|--:|",
    ]
    for index in order:
        query = a["queries"][index]
        text = textwrap.shorten(texts.get(query, ""), 90, placeholder=" ...").replace("|", "\\|")
        named = f"{query} | {text}" if texts else query
        values = f"{first[index]:.4f} | {second[index]:.4f} | {second[index] - first[index]:+.4f}"
        lines.append(f"| {named} | {values} |")
    return lines


def shown(value: float | None, sign: str = "") -> str:
    """A figure of a comparison with four digits; "-" for one that there is not."""
    return "-" if value is None else f"{value:{sign}.4f}"


def compare(a: np.ndarray, b: np.ndarray, *, samples: int = 10_000, seed: int = 0) -> Comparison:
    """Compares two systems on the same queries.

    Args:
        a, b: float [n], a metric's value for every query, in the same order.
        samples: resampled sets of queries.
        seed: of the resampling; the same seed gives the same numbers.
    """
    differences = b - a
    mean = differences.mean()
    if np.ptp(differences):
        found = stats.bootstrap(
            (differences,),
            np.mean,
            n_resamples=samples,
            batch=max(1, _BLOCK // len(differences)),
            method="percentile",
            rng=np.random.default_rng(seed),
        )
        means, (low, high) = found.bootstrap_distribution, found.confidence_interval
        p_t = stats.ttest_rel(b, a).pvalue
    else:  # no variance to test with, and every resampled mean is the mean
        means, low, high = np.full(samples, mean), mean, mean
        p_t = 1.0 if mean == 0 else 0.0
    sure: dict[str, float | None] = {
        "low": float(low),
        "high": float(high),
        "p_t": float(p_t),
        "p_bootstrap": float((1 + (np.abs(means - mean) >= abs(mean)).sum()) / (1 + samples)),
    }
    return Comparison(
        queries=len(differences),
        a=float(a.mean()),
        b=float(b.mean()),
        **(sure if len(differences) > 1 else dict.fromkeys(sure)),
        wins=int((differences > 0).sum()),
        losses=int((differences < 0).sum()),
    )


def _by_name(source: epath.Path) -> dict[str, Result]:
    """The BEIR results that hold values per query, by data set."""
    found: dict[str, tuple[epath.Path, Result]] = {}
    for path, result in find_results([source]):
        if result["kind"] != "beir" or "per_query" not in result:
            continue
        if result["name"] in found:
            other = found[result["name"]][0]
            raise InputError(
                f"{source}: holds {result['name']} twice, in {other} and {path}; give one of them"
            )
        found[result["name"]] = path, result
    return {name: result for name, (_, result) in found.items()}


def _paired(name: str, a: Result, b: Result, metric: str) -> tuple[np.ndarray, np.ndarray]:
    for result in (a, b):
        if metric not in result["per_query"]:
            known = ", ".join(result["per_query"])
            raise InputError(f"{name}: {metric} is not kept for every query; these are: {known}")
    values = dict(zip(b["queries"], b["per_query"][metric], strict=True))
    if set(a["queries"]) != values.keys():
        raise InputError(f"{name}: A and B were measured on different queries")
    return np.array(a["per_query"][metric]), np.array([values[query] for query in a["queries"]])
