"""Re-ranking: a cross-encoder scores the documents of a run anew. `rerank_job` is the same, interruptible."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from sgpt_jax.cross_encoder import NaNScoreError
from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.metrics import Run
from sgpt_jax.reports import ScoreReport
from sgpt_jax.runtime import processes
from sgpt_jax.runtime.platform import by_platform
from sgpt_jax.runtime.progress import Progress, Show, shared_progress

Pair = tuple[str, str]  # ids of query and document


class Scorer(Protocol):
    """What is asked of a cross-encoder: `sgpt_jax.CrossEncoder` has it."""

    def predict(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        batch_tokens: int | None = ...,
        show_progress: Show = ...,
        report: ScoreReport | None = ...,
    ) -> np.ndarray: ...


def part_pairs() -> int:
    """Pairs that the model gets at a time: about a minute's work on a CPU, several full batches on an accelerator."""
    return by_platform(cpu=512, accelerator=8192)


def rerank(
    model: Scorer,
    queries: Mapping[str, str],
    run: Run,
    texts: Mapping[str, str],
    *,
    report: ScoreReport | None = None,
    batch_tokens: int | None = None,
    show_progress: Show = None,
) -> dict[str, dict[str, float]]:
    """The documents of the run with the cross-encoder's scores. All are scored: cut the run to its top k before.

    In a `processes.session` the processes share the pairs, and all of them return all scores.

    Args:
        model: a cross-encoder.
        queries: {id: text}, for every query of the run.
        run: {query id: {document id: score}}; which documents to score.
        texts: {document id: text}, for every document of the run.
        report: this process's counts are added here; without it, one warning tells what was cut.
        batch_tokens: see `CrossEncoder.predict`.
        show_progress: see `CrossEncoder.predict`.

    Returns:
        {query id: {document id: score}}, queries in the run's order, documents in no particular one.

    Raises:
        InputError: a score that is NaN, with query and document id.
    """
    pairs = ordered_pairs(run, texts)
    parts = list(split_pairs(pairs, part_pairs()))
    counts, shares = ScoreReport(), []
    with shared_progress("re-ranking", "pair", len(pairs), show_progress) as bar:
        for number, part in enumerate(parts):
            if processes.mine(number):
                processes.check()
                shares.append(_score(model, part, queries, texts, batch_tokens, counts, bar).tolist())
    # Part i was scored by process i modulo their number (`processes.mine`).
    by_process = [iter(share) for share in processes.gather(shares)]
    scored: dict[str, dict[str, float]] = {query: {} for query in run}
    for number, part in enumerate(parts):
        for (query, document), score in zip(part, next(by_process[number % len(by_process)]), strict=True):
            scored[query][document] = score
    if report is not None:
        report.add(counts)
    elif (warning := counts.warning()) is not None:
        warnings.warn(warning, stacklevel=2)
    return scored


def ordered_pairs(run: Run, texts: Mapping[str, str]) -> list[Pair]:
    """All pairs of a run, by document.

    The queries of a document are together, so that they can share its pass; long documents are first, so that what
    does not fit in memory shows at once.
    """
    queries_of: dict[str, list[str]] = {}
    for query, hits in run.items():
        for document in hits:
            queries_of.setdefault(document, []).append(query)
    order = sorted(queries_of, key=lambda document: (-len(texts[document]), document))
    return [(query, document) for document in order for query in queries_of[document]]


def split_pairs(pairs: list[Pair], size: int) -> Iterator[list[Pair]]:
    """Cuts the pairs into parts of `size` pairs, or somewhat more, as a document's pairs stay together."""
    part: list[Pair] = []
    for pair in pairs:
        if len(part) >= size and pair[1] != part[-1][1]:
            yield part
            part = []
        part.append(pair)
    if part:
        yield part


def texts_of(run: Run, documents: Iterable[Document]) -> dict[str, str]:
    """The texts of a run's documents, {document id: text}; nothing else of the corpus is kept.

    Raises:
        InputError: the corpus does not hold them all.
    """
    wanted = {document: query for query, hits in run.items() for document in hits}
    texts = {document.id: document.text for document in documents if document.id in wanted}
    if missing := [document for document in wanted if document not in texts]:
        raise InputError(
            f"the run has {some(missing, 'document', 'documents')} that the corpus does not hold "
            f"({missing[0]!r} for query {wanted[missing[0]]!r})"
        )
    return texts


def some(ids: list[str], one: str, many: str) -> str:
    """How a message names ids: the number of them and the first five; a single one without the number."""
    shown = ", ".join(map(repr, ids[:5]))
    return f"{one} {shown}" if len(ids) == 1 else f"{len(ids)} {many}, such as {shown},"


def _score(
    model: Scorer,
    part: list[Pair],
    queries: Mapping[str, str],
    texts: Mapping[str, str],
    batch_tokens: int | None,
    counts: ScoreReport,
    bar: Progress,
) -> np.ndarray:
    done = bar.n + len(part)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "of .* pairs")  # `ScoreReport.warning`: given once, at the end
            scores = model.predict(
                [(queries[query], texts[document]) for query, document in part],
                batch_tokens=batch_tokens,
                show_progress=bar,
                report=counts,
            )
    except NaNScoreError as error:
        query, document = part[error.index]
        raise InputError(f"the score of query {query!r}, document {document!r} is NaN") from error
    bar.update(done - bar.n)  # the model counts different pairs, and those with an empty document
    return scores
