"""Semantic textual similarity: correlation of gold scores with vector similarities (STS-Benchmark files).

Files are STS-Benchmark's, or others with two sentences and a score (see `sgpt_jax.files.sts`), Parquet and data sets of
the Hugging Face hub (hf:sentence-transformers/stsb:validation) among them. Both sentences are
encoded without brackets. The measures are those of sentence-transformers' EmbeddingSimilarityEvaluator, by which the
SGPT paper chose its NLI checkpoints: Spearman and Pearson for cosine, Manhattan, Euclidean and dot product.

  python -m eval sts sts-dev.csv sts-test.csv --model MODEL --output OUT
"""

from __future__ import annotations

import argparse
import time
from typing import Any, Protocol

import numpy as np
from etils import epath
from scipy import stats

from sgpt_jax.errors import InputError
from sgpt_jax.files.sts import Pair, read_sts

from .models import (
    add_bi_encoder_arguments,
    add_common_arguments,
    bi_encoder,
    check_sides,
    encode_options,
)
from .provenance import provenance
from .results import check_settings, write_result


class Encoder(Protocol):
    """What is asked of a model: `sgpt_jax.BiEncoder` has it."""

    def encode(self, texts: list[str], **options: Any) -> np.ndarray: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "files",
        nargs="+",
        type=epath.Path,
        metavar="FILE",
        help="STS-Benchmark file, gzip or not; Parquet; hf:PATH:SPLIT",
    )
    parser.add_argument(
        "--output", type=epath.Path, metavar="OUT", help="folder for NAME.json (default: print only)"
    )
    add_bi_encoder_arguments(parser, required=True)
    add_common_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Measures every file."""
    data = {name_of(path): read_sts(path) for path in args.files}
    if len(data) < len(args.files):
        raise InputError("two files have the same name: give each an --output of its own")
    check_sides(args)
    lazy = bi_encoder(args)
    settings = {"model": lazy.identity}
    if args.output:
        for name in data:
            check_settings(args.output / f"{name}.json", "sts", settings)
    for name, pairs in data.items():
        start = time.perf_counter()
        metrics = evaluate(lazy.model, pairs, **encode_options(args))
        result = {
            "kind": "sts",
            "name": name,
            "metrics": metrics,
            "model": lazy.describe(),
            "settings": settings,
            "counts": {"pairs": len(pairs)},
            "seconds": {"total": time.perf_counter() - start},
            **provenance("scipy"),
        }
        if args.output:
            write_result(args.output / f"{name}.json", result)
        shown = "  ".join(
            f"{key} {value:.4f}" for key, value in metrics.items() if key.startswith("spearman")
        )
        print(f"{name}: {shown}  ({len(pairs)} pairs)")


def name_of(path: epath.Path) -> str:
    """A result's name: the file's, without its endings."""
    return epath.Path(path.name.removesuffix(".gz")).stem.replace(":", "-")


def evaluate(model: Encoder, pairs: list[Pair], **options: Any) -> dict[str, float]:
    """Correlations with the gold scores: ``spearman_cosine``, ``pearson_cosine``, and so on.

    ``spearman_max`` is the highest of the four Spearman correlations, which the SGPT repository goes by.

    Raises:
        InputError: all gold scores, or all similarities of a kind, are the same: no correlation exists.
    """
    texts = [text for _, first, second in pairs for text in (first, second)]
    vectors = np.asarray(model.encode(texts, **options), np.float64)
    gold = [score for score, _, _ in pairs]
    metrics = {}
    for name, values in similarities(vectors[0::2], vectors[1::2]).items():
        if np.ptp(gold) == 0 or not np.ptp(values) > 0:
            raise InputError(f"all gold scores or all {name} similarities are equal: no correlation exists")
        metrics[f"spearman_{name}"] = float(stats.spearmanr(gold, values).statistic)
        metrics[f"pearson_{name}"] = float(stats.pearsonr(gold, values).statistic)
    metrics["spearman_max"] = max(value for key, value in metrics.items() if key.startswith("spearman"))
    return metrics


def similarities(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """Pairwise similarities of vectors [n, E] and [n, E]: [n] each, higher is closer (distances are negated)."""
    length = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    dot = np.einsum("ij,ij->i", a, b)
    return {
        "cosine": dot / np.maximum(length, 1e-12),
        "manhattan": -np.abs(a - b).sum(axis=1),
        "euclidean": -np.linalg.norm(a - b, axis=1),
        "dot": dot,
    }
