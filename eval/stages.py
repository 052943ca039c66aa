"""The ranking of one data set: a first stage, and perhaps a cross-encoder over it; measured and described."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytrec_eval  # noqa: F401  that it is missing shows before any work, not after the ranking
from etils import epath

from sgpt_jax import bm25
from sgpt_jax.errors import InputError
from sgpt_jax.files.beir import DataSet
from sgpt_jax.files.corpora import Document
from sgpt_jax.files.runs import read_run
from sgpt_jax.hybrid import DEPTH, fuse
from sgpt_jax.index.streaming import search_corpus
from sgpt_jax.metrics import CUTS, Evaluation, cut, evaluate
from sgpt_jax.reports import ScoreReport
from sgpt_jax.rerank import rerank, texts_of
from sgpt_jax.runtime import processes

from .models import LazyModel
from .provenance import provenance, revision
from .results import Result, read_result

# What --hybrid adds to a first stage.
_HYBRID = {"bm25": dataclasses.asdict(bm25.DEFAULT), "fusion": {"scores": "min-max", "depth": DEPTH}}

# Values per query are kept for the metrics that papers test: `python -m eval significance` reads them.
PER_QUERY = ("ndcg@10", "map@100", "recall@100", "precision@10", "mrr@10")


@dataclasses.dataclass(frozen=True)
class Stages:
    """What ranks the documents; the same for every data set of a command."""

    model: LazyModel | None
    cross_encoder: LazyModel | None
    rerank_depth: int
    runs: epath.Path | None
    batch_tokens: int | None = None
    hybrid: bool = False

    @property
    def depth(self) -> int:
        """How many documents of a query are ranked: for all metrics, and for all that is re-ranked."""
        return max(*CUTS, self.rerank_depth)

    def settings(self, data: DataSet, ignore_identical_ids: bool) -> dict[str, Any]:
        """All that a result depends on besides the data: two results with equal settings are the same."""
        found: dict[str, Any] = {}
        if self.depth > max(CUTS):  # as a run was never deeper once, which results without it say
            found["depth"] = self.depth
        if self.model:
            found["model"] = self.model.identity
        elif self.runs:
            found["first_stage"] = {"run": revision(self.run_file(data.name))}
        else:
            found["first_stage"] = {"bm25": dataclasses.asdict(bm25.DEFAULT)}
        if self.hybrid:
            found["hybrid"] = _HYBRID
        if self.cross_encoder:
            found["cross_encoder"] = {**self.cross_encoder.identity, "rerank_depth": self.rerank_depth}
        return found | {
            "split": data.split,
            "ignore_identical_ids": ignore_identical_ids,
            "encoding_errors": data.encoding_errors,
            "skip_bad_lines": data.skip_bad_lines,
        }

    def run_file(self, name: str) -> epath.Path:
        """The first stage's run for a data set."""
        assert self.runs is not None
        if self.runs.is_file():
            return self.runs
        names = (f"{name}.trec", f"{name}.trec.gz", f"{name}.run.json")
        files = [self.runs / file for file in names if (self.runs / file).is_file()]
        if not files:
            raise InputError(f"{self.runs}: is no run, and no folder with {names[0]}")
        return files[0]


def measure(
    data: DataSet, stages: Stages, ignore_identical_ids: bool
) -> tuple[Result, dict[str, dict[str, float]]]:
    """Ranks and evaluates one loaded data set: its result, and the run that it describes."""
    start = time.perf_counter()
    unknown = {document for query in data.queries for document in data.qrels[query]}
    depth = stages.depth + ignore_identical_ids  # the query's own document is dropped before the cut

    def documents() -> Iterator[Document]:
        for document in data.documents():
            unknown.discard(document.id)
            yield document

    ranked, first = first_stage(data, stages, depth, documents())
    ranked, dropped = cut(ranked, stages.depth, ignore_identical_ids=ignore_identical_ids)
    if stages.hybrid:
        by_words, _ = cut(
            bm25.Bm25(documents()).search(data.queries, depth),
            stages.depth,
            ignore_identical_ids=ignore_identical_ids,
        )
        ranked = fuse(ranked, by_words, stages.depth)
        first["hybrid"] = _HYBRID
    seconds = {"first_stage": time.perf_counter() - start}
    evaluation = evaluate(data.qrels, ranked, queries=data.queries)
    evaluation.counts["identical_ids_dropped"] = dropped
    report = None
    if stages.cross_encoder:
        first["metrics"] = evaluation.metrics
        shallow, _ = cut(ranked, stages.rerank_depth)
        texts = texts_of(shallow, documents())
        report = ScoreReport()
        model = stages.cross_encoder.model
        ranked = rerank(
            model,
            data.queries,
            shallow,
            texts,
            report=report,
            batch_tokens=stages.batch_tokens,
        )
        report = ScoreReport(*processes.add_up(dataclasses.astuple(report)))
        seconds["rerank"] = time.perf_counter() - start - seconds["first_stage"]
        evaluation = evaluate(data.qrels, ranked, queries=data.queries)
        evaluation.counts["identical_ids_dropped"] = dropped
    result: Result = {
        "kind": "beir",
        "name": data.name,
        "metrics": evaluation.metrics,
        "first_stage": first,
        "model": stages.model.describe() if stages.model else None,
        "cross_encoder": stages.cross_encoder.describe() if stages.cross_encoder else None,
        "counts": _counts(data, evaluation, unknown if "corpus" in data.reports else None, report),
        "work": dataclasses.asdict(report) if report else None,
        "seconds": seconds | {"total": time.perf_counter() - start},
        **provenance("bm25s", "PyStemmer", "pytrec_eval-terrier"),
        "queries": evaluation.queries,
        "per_query": {name: evaluation.per_query[name] for name in PER_QUERY},
    }
    return result, ranked


def first_stage(
    data: DataSet, stages: Stages, depth: int, documents: Iterable[Document]
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """The first stage's run and its description. A run that was given needs no documents."""
    if stages.runs:
        path = stages.run_file(data.name)
        run = read_run(path, errors=data.encoding_errors)
        if not any(query in run for query in data.queries):
            raise InputError(f"{path}: ranks none of the judged queries of {data.name}")
        return {query: run[query] for query in data.queries if query in run}, _origin(path)
    if stages.model:
        run = search_corpus(
            stages.model.model, data.queries, documents, depth, batch_tokens=stages.batch_tokens
        )
        return run, {"name": "bi-encoder"}
    run = bm25.Bm25(documents).search(data.queries, depth)
    return run, {"name": "BM25", **dataclasses.asdict(bm25.DEFAULT)}


def _origin(run: epath.Path) -> dict[str, Any]:
    """What a run file is: the first stage of the result that lies beside it, else just its name."""
    name = run.name.removesuffix(".gz").removesuffix(".trec").removesuffix(".run.json")
    beside = run.parent / f"{name}.json"
    made = read_result(beside) if beside.exists() else {}
    if made.get("kind") == "beir" and not made.get("cross_encoder"):
        first = made["first_stage"]
        # A ranking that was itself made of a run keeps the model that its first stage names.
        return {**first, "run": run.name, "model": made["model"] or first.get("model")}
    return {"name": "run", "run": run.name}


def _counts(
    data: DataSet, evaluation: Evaluation, unknown: set[str] | None, report: ScoreReport | None
) -> dict[str, int]:
    counts = dict(evaluation.counts)
    if report:
        counts |= {what: getattr(report, what) for what in ("documents_cut", "queries_cut", "queries_empty")}
    counts["judged_queries_unknown"] = len(data.qrels) - len(data.queries)
    if unknown is not None:
        counts["documents"] = data.reports["corpus"].records
        counts["judged_documents_unknown"] = len(unknown)
    for part, lines in data.reports.items():
        for what in ("skipped", "duplicates", "replaced"):
            if count := getattr(lines, what):
                counts[f"{part}_{what}"] = count
    return counts
