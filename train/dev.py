"""How good the model is at the moment: the metric that chooses the checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from etils import epath
from scipy import stats

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.files.beir import DataSet
from sgpt_jax.files.corpora import Document
from sgpt_jax.files.sts import read_sts
from sgpt_jax.index.streaming import search_corpus
from sgpt_jax.metrics import evaluate

from .data import texts_digest

_DEPTH = 10


class DevEvaluator(Protocol):
    """Measures a model, the higher the better.

    Attributes:
        name: of the metric.
        data: what it looks at: "source", as the user names it, and "digest", of the content.
        details: what else the last look found, by name.
    """

    name: str
    data: dict[str, str]
    details: dict[str, float]

    def __call__(self, model: BiEncoder) -> float: ...


def make_evaluator(source: str, split: str) -> DevEvaluator:
    """An evaluator from an STS file (see `read_sts`) or a folder in BEIR's layout.

    Raises:
        InputError: the data are not there or not as they should be, or pytrec_eval is not installed for a folder.
    """
    return RetrievalEvaluator(source, split) if epath.Path(source).is_dir() else StsEvaluator(source)


class StsEvaluator:
    """Spearman correlation of cosine similarity with human scores of sentence pairs."""

    name = "cosine Spearman"

    def __init__(self, path: str):
        self.details: dict[str, float] = {}
        pairs = list(read_sts(path))
        self._scores, self._first, self._second = zip(*pairs, strict=True)
        self.data = {"source": path, "digest": texts_digest(map(str, itertools.chain(*pairs)))}

    def __call__(self, model: BiEncoder) -> float:
        vectors = model.encode([*self._first, *self._second], normalize=True, show_progress=False)
        cosines = np.sum(vectors[: len(self._first)] * vectors[len(self._first) :], axis=1)
        return float(stats.spearmanr(cosines, self._scores).statistic)


class RetrievalEvaluator:
    """nDCG@10 of exact search over a whole corpus, which streams by at every look."""

    name = f"nDCG@{_DEPTH}"

    def __init__(self, folder: str, split: str):
        self.details: dict[str, float] = {}
        self._data = DataSet(epath.Path(folder).name, epath.Path(folder), split).load()
        evaluate(self._data.qrels, {}, queries=self._data.queries, cuts=(_DEPTH,))  # fails now if it must
        judged = json.dumps([self._data.queries, self._data.qrels])
        # All documents pass by: a line that cannot be read is found before training.
        texts = (part for document in self._data.documents() for part in (document.id, document.text))
        digest = texts_digest(itertools.chain([judged], texts))
        self.data = {"source": f"{folder}, split {split}", "digest": digest}

    def __call__(self, model: BiEncoder) -> float:
        data = self._data
        run = search_corpus(model, data.queries, data.documents(), _DEPTH, show_progress=False, share=False)
        found = evaluate(data.qrels, run, queries=data.queries, cuts=(_DEPTH,))
        return found.metrics[f"ndcg@{_DEPTH}"]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Pseudo queries that are not trained on.

    Attributes:
        queries: {id of the source: text}.
        documents: what is searched, the sources among them.
        found: the ids of the queries whose source BM25 finds.
    """

    queries: dict[str, str]
    documents: list[Document]
    found: frozenset[str]


class PseudoEvaluator:
    """MRR@10 of the source of each held-out query, in the mean of all; by kind, and with BM25's help, in the details.

    Pseudo queries share more words with their source than real ones do. So those that BM25 misses are told apart.

    Args:
        kinds: {kind: its queries}.
    """

    name = f"MRR@{_DEPTH}"

    def __init__(self, kinds: Mapping[str, HeldOut]):
        self._kinds = kinds
        self.details: dict[str, float] = {}
        parts = (
            part
            for held_out in kinds.values()
            for document in held_out.documents
            for part in (document.id, document.text, held_out.queries.get(document.id, ""))
        )
        self.data = {"source": "the held-out pseudo queries", "digest": texts_digest(parts)}

    def __call__(self, model: BiEncoder) -> float:
        values: dict[str, list[float]] = {}
        for kind, held_out in self._kinds.items():
            run = search_corpus(model, held_out.queries, held_out.documents, _DEPTH, show_progress=False)
            for query, hits in run.items():
                rank = next((rank for rank, id in enumerate(hits, 1) if id == query), None)
                value = 1 / rank if rank else 0.0
                whose = "found by BM25" if query in held_out.found else "missed by BM25"
                for name in ("all", kind, whose):
                    values.setdefault(name, []).append(value)
        means = {name: sum(some) / len(some) for name, some in values.items()}
        self.details = {name: mean for name, mean in means.items() if name != "all"}
        return means["all"]
