"""BM25 through bm25s: the first stage that the SGPT paper re-ranks, a baseline, and a source of hard negatives.

The analysis follows Lucene's English analyser: lower case, Lucene's 33 English stop words, Porter's stemmer; words are
runs of two or more word characters. Scoring is Lucene's BM25 with k1 = 0.9 and b = 0.4 (Anserini's values for BEIR). A
document is its title and text joined by a space, in one field.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping

import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.metrics import rank
from sgpt_jax.runtime.progress import progress


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that a BM25 ranking depends on besides the texts."""

    method: str = "lucene"
    k1: float = 0.9
    b: float = 0.4
    stemmer: str = "porter"
    stopwords: str = "english"  # bm25s's list of that name: Lucene's 33 words
    token_pattern: str = r"(?u)\b\w\w+\b"
    lower_case: bool = True


DEFAULT = Settings()


class Bm25:
    """A corpus in memory, as the counts of its words (the texts are not kept).

    Args:
        documents: the corpus, read once.
        settings: analysis and parameters.

    Raises:
        InputError: bm25s or PyStemmer is not installed.
    """

    def __init__(self, documents: Iterable[Document], settings: Settings = DEFAULT) -> None:
        # Imported here, not at the top: bm25s runs a program of JAX when it is imported, and several processes have to
        # find each other before any does.
        try:
            import bm25s
            import Stemmer
        except ModuleNotFoundError as error:
            raise InputError(f"BM25 needs {error.name}: pip install 'sgpt-jax[eval]'") from error
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG
        self._tokenizer = bm25s.tokenization.Tokenizer(
            lower=settings.lower_case,
            splitter=settings.token_pattern,
            stopwords=settings.stopwords,
            stemmer=Stemmer.Stemmer(settings.stemmer),
        )
        self._ids: list[str] = []
        tokens: list[list[int]] = []
        with progress("BM25: documents", "doc") as bar:
            for document in documents:
                self._ids.append(document.id)
                tokens += self._tokenizer.streaming_tokenize(
                    [document.text], update_vocab=True, allow_empty=False
                )
                bar.update()
        self._index = bm25s.BM25(method=settings.method, k1=settings.k1, b=settings.b)
        if self._tokenizer.stem_to_sid:  # else no document holds a word
            self._index.index((tokens, self._tokenizer.stem_to_sid), show_progress=False)

    def candidates(self, query: str, k: int) -> dict[str, float]:
        """The k best documents of one query text, {id: score}, best first; ties by id, also at the cut.

        Documents that share no word with the query are left out.
        """
        if not self._tokenizer.stem_to_sid:
            return {}
        (words,) = self._tokenizer.streaming_tokenize([query], update_vocab=False, allow_empty=False)
        if not words:
            return {}
        scores = self._index.get_scores_from_ids(words)
        floor = np.partition(scores, len(scores) - k)[len(scores) - k] if len(scores) > k else 0.0
        found = np.flatnonzero((scores >= floor) & (scores > 0))  # all that tie with the k-th
        return rank({self._ids[row]: scores[row].item() for row in found.tolist()}, k)

    def search(self, queries: Mapping[str, str], k: int) -> dict[str, dict[str, float]]:
        """The run of the k best documents of every query, {query id: {document id: score}}, best first.

        Args:
            queries: {id: text}.
            k: documents to keep for a query, as `candidates` does.
        """
        run = {}
        with progress("BM25: queries", "query", len(queries)) as bar:
            for query, text in queries.items():
                run[query] = self.candidates(text, k)
                bar.update()
        return run
