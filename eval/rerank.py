"""Re-ranking a first stage's documents with a cross-encoder."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from eval.metrics import Run, cut
from sgpt_jax.cross_encoder import NaNScoreError
from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.runtime import processes

_PAIRS = 4_096  # pairs given to the model at a time, so that a long run shows progress


class Scorer(Protocol):
    """What is asked of a cross-encoder: `sgpt_jax.CrossEncoder` has it."""

    def predict(self, pairs: list[tuple[str, str]], **options: Any) -> np.ndarray: ...


def candidates(
    run: Run, documents: Iterable[Document], depth: int
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """The first `depth` documents of every query, and the texts of all of them ({id: text}).

    Raises:
        InputError: the run names a document that the corpus does not hold.
    """
    shallow, _ = cut(run, depth)
    wanted = {document: query for query, hits in shallow.items() for document in hits}
    texts = {}
    for document in documents:
        if wanted.pop(document.id, None) is not None:
            texts[document.id] = document.text
    for document_id, query in wanted.items():
        raise InputError(
            f"the first stage ranks {document_id!r} for query {query!r}: no such document in the corpus"
        )
    return shallow, texts


def rerank(
    model: Scorer, queries: Mapping[str, str], run: Run, texts: Mapping[str, str], **options: Any
) -> dict[str, dict[str, float]]:
    """The same documents as in `run`, with the cross-encoder's scores.

    In a `processes.session` the processes share the pairs, and all of them return all scores; each adds its own counts
    to a report. Documents beyond the re-ranked depth are not part of the result, as in BEIR and the SGPT paper.

    Args:
        model: a cross-encoder.
        queries: {id: text}, for every query of the run.
        run: the documents to score.
        texts: {document id: text}, for every document of the run.
        options: passed on to ``predict``.

    Raises:
        InputError: a score that is NaN, with query and document id.
    """
    # By document, so that queries of the same document come together and can share its pass.
    pairs = sorted(((document, query) for query, hits in run.items() for document in hits))
    scored: dict[str, dict[str, float]] = {query: {} for query in run}
    with tqdm(total=len(pairs), desc="pairs", unit="", disable=None, delay=1) as bar:
        shares: list[list[float]] = []
        starts = range(0, len(pairs), _PAIRS)
        for number, start in enumerate(starts):
            if not processes.mine(number):
                continue
            processes.check()
            part = pairs[start : start + _PAIRS]
            with warnings.catch_warnings():
                # ScoreReport counts what these warnings tell; the caller says it once.
                warnings.filterwarnings("ignore", "of .* pairs")
                try:
                    scores = model.predict(
                        [(queries[query], texts[document]) for document, query in part], **options
                    )
                except NaNScoreError as error:
                    document, query = part[error.index]
                    raise InputError(f"the score of query {query!r}, document {document!r} is NaN") from error
            shares.append(scores.tolist())
            bar.update(len(part))
    given = [iter(lists) for lists in processes.gather(shares)]
    for number, start in enumerate(starts):
        values = next(given[number % len(given)])
        for (document, query), score in zip(pairs[start : start + _PAIRS], values, strict=True):
            scored[query][document] = score
    return scored
