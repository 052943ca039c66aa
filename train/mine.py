"""Hard negatives: the documents that a query finds, by its words or by a model, and that nobody judged relevant."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.bm25 import Bm25
from sgpt_jax.decoder.sharding import device_mesh
from sgpt_jax.errors import InputError
from sgpt_jax.files.beir import DataSet
from sgpt_jax.files.corpora import Document
from sgpt_jax.files.hub_tables import is_hub
from sgpt_jax.files.lines import write_jsonl
from sgpt_jax.index.streaming import search_corpus
from sgpt_jax.metrics import Run
from sgpt_jax.runtime.progress import progress

from .data import text_key


@dataclasses.dataclass(frozen=True)
class Limits:
    """Which documents of a query's ranking may be its negatives.

    Attributes:
        depth: the rank of the last one, counted without what cannot be a negative.
        skip: the best that are left out, which may be relevant and unjudged.
        margin: how far below the score of the positive a negative must be; None: no matter.
        lowest, highest: scores that it may have; None: no matter.
    """

    depth: int = 50
    skip: int = 0
    margin: float | None = None
    lowest: float | None = None
    highest: float | None = None

    @property
    def by_score(self) -> bool:
        """Whether scores matter, and not ranks alone."""
        return (self.margin, self.lowest, self.highest) != (None, None, None)

    def pool(self, ranked: Mapping[str, float], positive: float) -> list[str]:
        """The documents that are left of a ranking of possible negatives; `positive` is the positive's score."""
        most = np.inf if self.margin is None else positive - self.margin
        most = most if self.highest is None else min(most, self.highest)
        least = -np.inf if self.lowest is None else self.lowest
        return [id for id in list(ranked)[self.skip : self.depth] if least <= ranked[id] <= most]


def mine_command(options: argparse.Namespace) -> None:
    """Runs the subcommand `mine`.

    Raises:
        InputError: see `mine`; or an option of the bi-encoder without one.
    """
    limits = Limits(options.depth, options.skip, options.margin, options.min_score, options.max_score)
    encoder = None
    if options.model:
        encoder = BiEncoder.from_settings(vars(options), device_mesh(options.mesh))
    else:
        names = ("pooling", "brackets", "max_seq_length", "query_prompt", "document_prompt", "truncate_dim")
        for name in (*names, "biases", "adapter", "bidirectional", "weights", "mesh"):
            if vars(options)[name] is not None:
                raise InputError(f"--{name.replace('_', '-')} is for --model")
    mine(options.data, options.output, options.split, options.negatives, limits, options.seed, encoder)


def mine(
    data: str,
    output: str,
    split: str,
    negatives: int,
    limits: Limits,
    seed: int,
    encoder: BiEncoder | None = None,
) -> None:
    """Writes one example for each relevant (query, document): query, positive, negatives.

    The negatives are drawn from what `limits` leaves of the query's ranking, which is BM25's (that of evaluation, see
    `sgpt_jax.bm25`) or the bi-encoder's exact search by its own similarity. No negative is judged relevant, or has the
    text of the query or of a positive; nor the query's id in the data sets whose corpus holds the queries, as in
    evaluation. Where ranks alone matter, and a query finds too few documents, any others are taken, but those that were
    skipped; where scores do, an example may have fewer negatives.

    Raises:
        InputError: the data are not as they should be, the output is one of their files, or the limits leave nothing.
    """
    if not 0 < negatives <= limits.depth - limits.skip or limits.skip < 0:
        raise InputError(
            f"--negatives {negatives} cannot be drawn from ranks {limits.skip} to {limits.depth}"
        )
    if seed < 0:
        raise InputError(f"--seed must be at least 0, not {seed}")
    epath.Path(output).parent.mkdir(parents=True, exist_ok=True)
    folder = DataSet(epath.Path(data).resolve().name, epath.Path(data), split).load()
    read = () if is_hub(data) else map(folder.file, ("corpus", "queries", "qrels"))
    if epath.Path(output).resolve() in [epath.Path(path).resolve() for path in read]:
        raise InputError(f"--output {output}: is a file of --data; name another")
    documents = list(folder.documents())
    texts = {document.id: document.text for document in documents}
    relevant = {
        query: [id for id, grade in folder.qrels[query].items() if grade > 0 and id in texts]
        for query in folder.queries
    }
    relevant = {query: found for query, found in relevant.items() if found}
    if not relevant:
        raise InputError(f"{data}: no query of split {split!r} has a relevant document")
    queries = {query: folder.queries[query] for query in relevant}
    unfit = _unfit(folder, relevant, texts)
    depth = limits.depth + max(map(len, unfit.values()))
    run, scores = _ranked(queries, relevant, documents, depth, limits.margin is not None, encoder)
    draw = np.random.default_rng(seed)
    examples, short = [], 0
    for query, positives in relevant.items():
        others = {id: score for id, score in run[query].items() if id not in unfit[query]}
        pools = [limits.pool(others, scores.get((query, positive), 0.0)) for positive in positives]
        if not limits.by_score and len(pools[0]) < negatives:
            # A query whose words hardly occur: any document will do.
            left_out = {*unfit[query], *list(others)[: limits.skip], *pools[0]}
            rest = [id for id in texts if id not in left_out]
            missing = min(negatives - len(pools[0]), len(rest))
            pools = [pools[0] + [rest[row] for row in draw.choice(len(rest), missing, replace=False)]] * len(
                positives
            )
        for positive, pool in zip(positives, pools, strict=True):
            count = min(negatives, len(pool))
            chosen: list[int] = draw.choice(len(pool), count, replace=False).tolist() if pool else []
            short += len(chosen) < negatives
            examples.append(
                {
                    "query": queries[query],
                    "positive": texts[positive],
                    "negatives": [texts[pool[row]] for row in chosen],
                }
            )
    if not any(example["negatives"] for example in examples):
        raise InputError(f"{data}: no document of the ranks and scores asked for is left as a negative")
    write_jsonl(output, examples)
    note = f", {short:,} of them with fewer than {negatives} negatives" if short else ""
    print(f"{len(examples):,} examples of {len(relevant):,} queries{note}: {output}")


def _unfit(
    folder: DataSet, relevant: Mapping[str, Sequence[str]], texts: Mapping[str, str]
) -> dict[str, set[str]]:
    """The documents that are no negatives of each query: see `mine`."""
    same = {
        query: {text_key(text) for text in (folder.queries[query], *(texts[id] for id in positives))}
        for query, positives in relevant.items()
    }
    copies: dict[int, list[str]] = {key: [] for keys in same.values() for key in keys}
    for id, text in texts.items():
        if (found := copies.get(text_key(text))) is not None:
            found.append(id)
    return {
        query: {id for key in keys for id in copies[key]}
        | ({query} if folder.ignores_identical_ids else set())
        for query, keys in same.items()
    }


def _ranked(
    queries: dict[str, str],
    relevant: Mapping[str, Sequence[str]],
    documents: list[Document],
    depth: int,
    score: bool,
    encoder: BiEncoder | None,
) -> tuple[Run, dict[tuple[str, str], float]]:
    """The best documents of every query, and with `score` the scores of (query, relevant document)."""
    pairs = [(query, id) for query, ids in relevant.items() for id in ids]
    if encoder is None:
        index = Bm25(documents)
        if not score:
            return index.search(queries, depth), {}
        run: dict[str, dict[str, float]] = {}
        scores: dict[tuple[str, str], float] = {}
        with progress("BM25: queries", "query", len(queries)) as bar:
            for query, text in queries.items():
                found = index.candidates(text, len(documents))
                scores |= {(query, id): found.get(id, 0.0) for id in relevant[query]}
                run[query] = dict(list(found.items())[:depth])
                bar.update()
        return run, scores
    run = search_corpus(encoder, queries, documents, depth)
    if not score:
        return run, {}
    texts = {document.id: document.text for document in documents}
    shown = {id: row for row, id in enumerate(dict.fromkeys(id for _, id in pairs))}
    asked = {query: row for row, query in enumerate(queries)}
    cosine = encoder.similarity_name == "cosine"  # else the dot product, by which the search has ranked
    left = encoder.encode_query(list(queries.values()), normalize=cosine, show_progress=False)
    right = encoder.encode_document([texts[id] for id in shown], normalize=cosine, show_progress=False)
    rows, columns = ([table[pair[side]] for pair in pairs] for side, table in ((0, asked), (1, shown)))
    values = np.sum(left[rows] * right[columns], axis=1)
    return run, dict(zip(pairs, values.tolist(), strict=True))
