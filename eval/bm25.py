"""BM25 through bm25s: the first stage that the SGPT paper re-ranks, and a baseline of its own.

The analysis follows Lucene's English analyser: lower case, Lucene's 33 English stop words, Porter's stemmer;
words are runs of two or more word characters. Scoring is Lucene's BM25 with k1 = 0.9 and b = 0.4 (Anserini's
values for BEIR). A document is its title and text joined by a space, in one field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from eval.metrics import top
from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document

if TYPE_CHECKING:
    import bm25s


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


def search(
    queries: Mapping[str, str],
    documents: Iterable[Document],
    k: int,
    *,
    settings: Settings = DEFAULT,
) -> dict[str, dict[str, float]]:
    """The k best documents of every query by BM25, as a run; documents that share no word with it are left out.

    Ties rank by document id, descending, also at the cut.

    Args:
        queries: {id: text}.
        documents: the corpus, read once; its tokens (not its texts) are held in memory.
        k: documents to keep for a query.
        settings: tokenisation and parameters.

    Raises:
        InputError: bm25s or PyStemmer is not installed.
    """
    # Not before it is needed: bm25s runs a program of JAX when it is imported, and several processes have to find each
    # other before any does.
    try:
        import bm25s
        import Stemmer
    except ModuleNotFoundError as error:
        raise InputError(f"BM25 needs {error.name}: pip install -e '.[eval]'") from error
    tokenizer = bm25s.tokenization.Tokenizer(
        lower=settings.lower_case,
        splitter=settings.token_pattern,
        stopwords=settings.stopwords,
        stemmer=Stemmer.Stemmer(settings.stemmer),
    )
    ids: list[str] = []
    tokens: list[list[int]] = []
    for document in tqdm(documents, desc="BM25: documents", unit="", disable=None, delay=1):
        ids.append(document.id)
        tokens.extend(tokenizer.streaming_tokenize([document.text], update_vocab=True, allow_empty=False))
    if not tokenizer.stem_to_sid:  # no document holds a word
        return {query: {} for query in queries}
    index = bm25s.BM25(method=settings.method, k1=settings.k1, b=settings.b)
    index.index((tokens, tokenizer.stem_to_sid), show_progress=False)
    del tokens
    run = {}
    for query, text in tqdm(queries.items(), desc="BM25: queries", unit="", disable=None, delay=1):
        (words,) = tokenizer.streaming_tokenize([text], update_vocab=False, allow_empty=False)
        candidates = _candidates(index, words, ids, k) if words else {}
        run[query] = dict(top(query, candidates, k))
    return run


def _candidates(index: bm25s.BM25, words: list[int], ids: list[str], k: int) -> dict[str, float]:
    """All documents that score at least as much as the k-th best, and more than 0."""
    scores = index.get_scores_from_ids(words)
    floor = np.partition(scores, len(scores) - k)[len(scores) - k] if len(scores) > k else 0.0
    places = np.flatnonzero((scores >= floor) & (scores > 0))
    return {ids[place]: score for place, score in zip(places.tolist(), scores[places].tolist(), strict=True)}
