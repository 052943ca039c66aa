"""How good the model is at the moment: the number that chooses the checkpoint."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from etils import epath
from scipy import stats

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import read_corpus, read_queries
from sgpt_jax.files.lines import line_error, read_lines
from sgpt_jax.files.runs import read_qrels

_STS_COLUMNS = (4, 5, 6)  # of the STS benchmark: score, first and second sentence
_DEPTH = 10


class Judge(Protocol):
    """Gives a model a number, the higher the better."""

    name: str

    def __call__(self, model: BiEncoder) -> float: ...


def make_judge(source: str, split: str) -> Judge:
    """A judge from an STS file or a folder in BEIR's format.

    Raises:
        InputError: the data are not there or not as they should be.
    """
    return RetrievalJudge(source, split) if epath.Path(source).is_dir() else StsJudge(source)


class StsJudge:
    """Spearman correlation of cosine similarity with human scores of sentence pairs."""

    def __init__(self, path: str):
        self.name = "cosine Spearman"
        self.pairs: list[tuple[str, str]] = []
        self.scores: list[float] = []
        for line, text in read_lines(path):
            cells = text.split("\t")
            try:
                score, first, second = (cells[place] for place in _STS_COLUMNS)
                self.scores.append(float(score))
            except (IndexError, ValueError):
                raise line_error(
                    path,
                    line,
                    "the columns of the STS benchmark are needed: score in the 5th, texts in the 6th and 7th",
                ) from None
            self.pairs.append((first, second))
        if len(set(self.scores)) < 2:
            raise InputError(f"{path}: no two pairs with different scores")

    def __call__(self, model: BiEncoder) -> float:
        first, second = zip(*self.pairs, strict=True)
        vectors = model.encode([*first, *second], normalize=True, show_progress=False)
        cosines = np.sum(vectors[: len(first)] * vectors[len(first) :], axis=1)
        return float(stats.spearmanr(cosines, self.scores).statistic)


class RetrievalJudge:
    """nDCG@10 of exact search, with linear gain, over the judged queries."""

    def __init__(self, folder: str, split: str):
        self.name = "nDCG@10"
        root = epath.Path(folder)
        documents = list(read_corpus(find_file(root / "corpus.jsonl")))
        queries = read_queries(find_file(root / "queries.jsonl"))
        qrels = read_qrels(find_file(root / "qrels" / f"{split}.tsv"))
        self.qrels = {query: grades for query, grades in qrels.items() if query in queries}
        if not self.qrels:
            raise InputError(f"{folder}: none of the queries has a judgement in split {split!r}")
        self.ids = [document.id for document in documents]
        self.documents = [document.text for document in documents]
        self.queries = [queries[query] for query in self.qrels]

    def __call__(self, model: BiEncoder) -> float:
        documents = model.encode_document(self.documents, normalize=True, show_progress=False)
        queries = model.encode_query(self.queries, normalize=True, show_progress=False)
        discounts = 1 / np.log2(np.arange(2, _DEPTH + 2))
        values = []
        for vector, grades in zip(queries, self.qrels.values(), strict=True):
            found = np.argsort(-(documents @ vector), kind="stable")[:_DEPTH]
            gains = [max(grades.get(self.ids[place], 0), 0) for place in found]
            best = sorted((max(grade, 0) for grade in grades.values()), reverse=True)[:_DEPTH]
            ideal = np.dot(best, discounts[: len(best)])
            values.append(np.dot(gains, discounts[: len(gains)]) / ideal if ideal else 0.0)
        return float(np.mean(values))


def find_file(path: epath.Path) -> epath.Path:
    """The file, or the same name with .gz where only that is there."""
    packed = epath.Path(f"{path}.gz")
    return packed if not path.exists() and packed.exists() else path
