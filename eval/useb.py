"""USEB, the Unsupervised Sentence Embedding Benchmark, as the SGPT paper measures it.

FOLDER is USEB's published ``data-eval``, with ``askubuntu``, ``cqadupstack``, ``twitterpara`` and ``scidocs``.
Texts are stripped, encoded without brackets, and compared by cosine:

  AskUbuntu    MAP over the 20 BM25 candidates of a question's title
  CQADupStack  MAP@100, mean of the forums; the questions asked are not in the pool
  TwitterPara  average precision of paraphrases, mean of Twitter-URL and PIT; pairs with label 3 are left out
  SciDocs      MAP over titles, mean of cite, cocite, coview and coread

The average is the plain mean of the four. Values are from 0 to 1 (the paper prints per cent).

  python -m eval useb data-eval --model MODEL --output OUT
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytrec_eval  # noqa: F401  that it is missing shows before any work, not at the last task
from etils import epath
from scipy import stats

from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.files.lines import line_error, parse_json, read_lines
from sgpt_jax.index.streaming import search_corpus
from sgpt_jax.metrics import rank, trec_eval

from .models import (
    add_bi_encoder_arguments,
    add_common_arguments,
    bi_encoder,
    check_sides,
    encode_options,
)
from .provenance import provenance
from .results import check_settings, write_result
from .sts import Encoder, similarities

_URL_LABEL = re.compile(r"\s*\(\s*(\d+)\s*,\s*\d+\s*\)\s*")  # how many of how many raters said paraphrase
SCIDOCS = ("cite", "cocite", "coview", "coread")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("folder", type=epath.Path, metavar="FOLDER", help="USEB's data-eval folder")
    parser.add_argument(
        "--split", choices=("test", "valid"), default="test", help="TwitterPara has test only"
    )
    parser.add_argument(
        "--output", type=epath.Path, metavar="OUT", help="folder for useb.json (default: print only)"
    )
    add_bi_encoder_arguments(parser, required=True)
    add_common_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Measures the four tasks."""
    missing = [name for name in TASKS if not (args.folder / name).is_dir()]
    if missing:
        raise InputError(f"{args.folder}: holds no folder {', '.join(missing)}")
    check_sides(args)
    lazy = bi_encoder(args)
    settings = {"model": lazy.identity, "split": args.split}
    if args.output:
        check_settings(args.output / "useb.json", "useb", settings)
    start = time.perf_counter()
    details = evaluate(lazy.model, args.folder, args.split, **encode_options(args))
    metrics = {name: details[name][measure] for name, (_, measure) in TASKS.items()}
    metrics["avg"] = sum(metrics.values()) / len(metrics)
    result = {
        "kind": "useb",
        "name": "useb",
        "split": args.split,
        "metrics": metrics,
        "details": details,
        "model": lazy.describe(),
        "settings": settings,
        "seconds": {"total": time.perf_counter() - start},
        **provenance("scipy", "pytrec_eval-terrier"),
    }
    if args.output:
        write_result(args.output / "useb.json", result)
    print("useb: " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


def evaluate(
    model: Encoder, folder: epath.Path, split: str = "test", **options: Any
) -> dict[str, dict[str, float]]:
    """All measures of all four tasks: {task: {measure: value}}.

    Raises:
        InputError: a file is missing or not in USEB's layout.
    """

    def encode(texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 [n, E]; every distinct text is encoded once."""
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise InputError(f"{folder}: not in USEB's layout: {wrong[0]!r} is no text")
        if not texts:
            raise InputError(f"{folder}: a task has no texts")
        distinct = {text.strip(): 0 for text in texts}
        rows = {text: row for row, text in enumerate(distinct)}
        vectors = np.asarray(model.encode(list(rows), **options), np.float32)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors[[rows[text.strip()] for text in texts]]

    found = {}
    for name, (task, _) in TASKS.items():
        found[name] = task(encode, folder / name, split)
        if wrong := [measure for measure, value in found[name].items() if not math.isfinite(value)]:
            raise InputError(
                f"{folder / name}: {wrong[0]} cannot be measured: nothing is judged, or all labels are equal"
            )
    return found


Encode = Callable[[Sequence[str]], np.ndarray]


def ask_ubuntu(encode: Encode, folder: epath.Path, split: str) -> dict[str, float]:
    """MAP, P@1, P@5 and MRR of the BM25 candidates ranked by the cosine of titles."""
    titles = {cells[0].strip(): cells[1].strip() for _, cells in _table(folder / "text_tokenized.txt", 2)}
    path = folder / ("test.txt" if split == "test" else "dev.txt")
    questions = []
    for number, cells in _table(path, 4):
        question, relevant, found = cells[0].strip(), set(cells[1].split()), cells[2].split()
        for id in (question, *found):
            if id not in titles:
                raise line_error(path, number, f"question {id!r} is not in text_tokenized.txt")
        try:
            # Ties keep BM25's order, as USEB's stable sorting does.
            scores = [float(cell) for cell in cells[3].split()]
            if not all(map(math.isfinite, scores)):
                raise ValueError
            by_bm25 = sorted(zip(found, scores, strict=True), key=lambda pair: -pair[1])
        except ValueError:
            raise line_error(path, number, "every candidate needs one BM25 score, a number") from None
        if relevant:
            questions.append((question, relevant, [id for id, _ in by_bm25]))
    if not questions:
        raise InputError(f"{path}: holds no question with similar ones")
    vectors = dict(zip(titles, encode(list(titles.values())), strict=True))
    rows = []
    for question, relevant, found in questions:
        scores = [float(vectors[question] @ vectors[id]) for id in found]
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        hits = np.array([found[row] in relevant for row in order], float)
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        if not hits.any():
            rows.append((0.0,) * 4)
            continue
        rows.append((precision[hits > 0].mean(), precision[0], hits[:5].sum() / 5, 1 / (1 + hits.argmax())))
    return dict(zip(("map", "p@1", "p@5", "mrr"), np.mean(rows, axis=0).tolist(), strict=True))


def cqadupstack(encode: Encode, folder: epath.Path, split: str) -> dict[str, float]:
    """MAP@100 and nDCG@10 of every forum, and their means."""
    path = folder / "retrieval_split.json"
    corpus, judged = _json(folder / "corpus.json"), _json(path, split)
    results: dict[str, float] = {}
    for forum, texts in corpus.items():
        relevant = {
            question: set(_list(path, found, question))
            for question, found in _mapping(path, judged.get(forum), forum).items()
        }
        unknown = relevant.keys() - _mapping(folder / "corpus.json", texts, forum).keys()
        if unknown or not relevant:
            raise InputError(
                f"{path}: {forum} asks {min(unknown, default='nothing')!r}, which corpus.json lacks"
            )
        pool = [Document(id, text) for id, text in texts.items() if id not in relevant]
        queries = {question: texts[question] for question in relevant}
        precisions, gains = [], []
        for question, hits in search_corpus(_Symmetric(encode), queries, pool, 100).items():
            labels = np.array([id in relevant[question] for id in hits])
            precisions.append(average_precision(labels, list(hits.values())))
            if relevant[question]:
                discounts = 1 / np.log2(np.arange(2, 12))
                ideal = discounts[: len(relevant[question])].sum()
                gains.append((labels[:10] * discounts[: len(labels)]).sum() / ideal)
        results[f"map@100 {forum}"] = float(np.mean(precisions))
        results[f"ndcg@10 {forum}"] = float(np.mean(gains))
    for measure in ("map@100", "ndcg@10"):
        values = [value for key, value in results.items() if key.startswith(measure)]
        results[f"{measure} avg"] = float(np.mean(values))
    return results


def twitter_para(encode: Encode, folder: epath.Path, split: str) -> dict[str, float]:
    """Average precision and Spearman of two sets of sentence pairs, and their means. There is only a test set."""
    results = {}
    for name, file in (("twitterurl", "Twitter_URL_Corpus_test.txt"), ("pit", "test.data")):
        pairs, labels = [], []
        for number, cells in _table(folder / file, 3 if name == "twitterurl" else 5):
            if name == "twitterurl":
                label = _URL_LABEL.fullmatch(cells[2])
                pairs.append((cells[0], cells[1]))
            else:
                label = re.fullmatch(r"\s*(\d+)\s*", cells[4])
                pairs.append((cells[2], cells[3]))
            if not label:
                raise line_error(folder / file, number, "the label is not in USEB's form")
            labels.append(int(label.group(1)))
        vectors = encode([text for pair in pairs for text in pair])
        scores = similarities(vectors[0::2], vectors[1::2])["cosine"]
        clear = [row for row, label in enumerate(labels) if label != 3]
        results[f"ap {name}"] = average_precision([labels[row] > 3 for row in clear], scores[clear].tolist())
        results[f"spearman {name}"] = float(stats.spearmanr(labels, scores).statistic)
    for measure in ("ap", "spearman"):
        results[f"{measure} avg"] = (results[f"{measure} twitterurl"] + results[f"{measure} pit"]) / 2
    return results


def scidocs(encode: Encode, folder: epath.Path, split: str) -> dict[str, float]:
    """MAP and nDCG by cosine and by Euclidean distance of unit vectors, for each relation and on average."""
    path = folder / "data.json"
    corpus, judged = _json(path, "corpus"), _json(path, split)
    titles = {id: _mapping(path, paper, id).get("title") or "" for id, paper in corpus.items()}
    if wrong := [id for id, title in titles.items() if not isinstance(title, str)]:
        raise InputError(f"{path}: not in USEB's layout: the title of {wrong[0]} is no text")
    titles = {id: title.strip() for id, title in titles.items()}
    results: dict[str, float] = {}
    for relation in SCIDOCS:
        qrels = _mapping(path, judged.get(relation), relation)
        wanted = {id for query, found in qrels.items() for id in (query, *found) if titles.get(id)}
        vectors = dict(zip(sorted(wanted), encode([titles[id] for id in sorted(wanted)]), strict=True))
        for distance in ("cosine", "euclidean"):
            run = {}
            for query, found in qrels.items():
                papers = [id for id in found if id in vectors]
                if query in vectors and papers:
                    others = np.stack([vectors[id] for id in papers])
                    queries = np.broadcast_to(vectors[query], others.shape)
                    scores = similarities(queries, others)[distance]
                    run[query] = rank(dict(zip(papers, scores.tolist(), strict=True)), query=query)
            measured = trec_eval(qrels, run, ("map", "ndcg"))
            for measure in ("map", "ndcg"):
                mean = float(np.mean([values[measure] for values in measured.values()]))
                results[f"{measure} {relation} {distance}"] = mean
    for measure in ("map", "ndcg"):
        for distance in ("cosine", "euclidean"):
            means = [results[f"{measure} {relation} {distance}"] for relation in SCIDOCS]
            results[f"{measure} {distance} avg"] = float(np.mean(means))
    return results


# task -> (function, the measure that stands for it)
TASKS = {
    "askubuntu": (ask_ubuntu, "map"),
    "cqadupstack": (cqadupstack, "map@100 avg"),
    "twitterpara": (twitter_para, "ap avg"),
    "scidocs": (scidocs, "map cosine avg"),
}


def average_precision(labels: Sequence[bool] | np.ndarray, scores: Sequence[float]) -> float:
    """The sum of precision times gain in recall over the distinct scores; 0 without hits.

    Items of the same score count as retrieved together. It is scikit-learn's `average_precision_score`, whose package
    nothing else here needs.
    """
    order = np.argsort(-np.asarray(scores, float), kind="stable")
    hits = np.asarray(labels, float)[order]
    if not hits.any():
        return 0.0
    ranked = np.asarray(scores, float)[order]
    last = np.append(
        np.flatnonzero(np.diff(ranked)), len(ranked) - 1
    )  # the last item of every distinct score
    found = np.cumsum(hits)[last]
    return float((np.diff(found, prepend=0) / hits.sum() * found / (last + 1)).sum())


class _Symmetric:
    """A model whose queries and documents are encoded alike, and compared by cosine as USEB does."""

    similarity_name = "cosine"

    def __init__(self, encode: Encode) -> None:
        self.encode = encode

    def encode_query(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        return self.encode(texts)

    encode_document = encode_query


def _table(path: epath.Path, columns: int) -> list[tuple[int, list[str]]]:
    """Line numbers and cells of a tab-separated file whose lines have at least so many columns."""
    rows = [(number, line.split("\t")) for number, line in read_lines(path)]
    for number, cells in rows:
        if len(cells) < columns:
            raise line_error(path, number, f"{columns} columns are needed, not {len(cells)}")
    return rows


def _json(path: epath.Path, *keys: str) -> dict[str, Any]:
    """The object under these keys in a JSON file."""
    try:
        value = parse_json("\n".join(line for _, line in read_lines(path)))
    except ValueError as error:
        raise (
            error if isinstance(error, InputError) else InputError(f"{path}: broken JSON: {error}")
        ) from None
    for key in keys:
        value = _mapping(path, value, "the file").get(key)
    return _mapping(path, value, ".".join(keys) or "the file")


def _list(path: epath.Path, value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{path}: not in USEB's layout: {name} must be a list")
    return value


def _mapping(path: epath.Path, value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{path}: not in USEB's layout: {name} must be an object")
    return value
