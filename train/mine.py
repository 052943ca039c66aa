"""Hard negatives from BM25: the documents that a query's words find and that nobody judged relevant."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import read_corpus, read_queries
from sgpt_jax.files.lines import write_jsonl
from sgpt_jax.files.runs import read_qrels


def add_mine_parser(commands: Any, formatter: type[argparse.HelpFormatter]) -> None:
    """Adds the subcommand `mine`."""
    text = "Hard negatives from BM25 for a retrieval data set, as data for the recipe pairs."
    command = commands.add_parser("mine", description=text, help=text.rstrip("."), formatter_class=formatter)
    command.add_argument(
        "--data", required=True, metavar="FOLDER", help="data set in BEIR's format (required)"
    )
    command.add_argument("--output", required=True, metavar="FILE", help="JSONL file to write (required)")
    command.add_argument(
        "--split", default="train", metavar="NAME", help="judgements: qrels/NAME.tsv (default: train)"
    )
    command.add_argument(
        "--negatives", type=int, default=1, metavar="N", help="negatives of an example (default: 1)"
    )
    command.add_argument(
        "--depth",
        type=int,
        default=50,
        metavar="N",
        help="they are drawn from the N best documents (default: 50)",
    )
    command.add_argument(
        "--skip",
        type=int,
        default=0,
        metavar="N",
        help="leave out the N best, which may be relevant and unjudged (default: 0)",
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")


def mine(data: str, output: str, split: str, negatives: int, depth: int, skip: int, seed: int) -> None:
    """Writes one example for each relevant (query, document): query, positive, negatives.

    The negatives are drawn from the places `skip` to `depth` of the query's BM25 ranking (k1 0.9, b 0.4, as BEIR's
    BM25), without the documents judged relevant.

    Raises:
        InputError: the data are not as they should be, or a query finds too few documents.
    """
    from train.dev import find_file  # which imports JAX

    try:
        import bm25s
    except ImportError:
        raise InputError("mining needs bm25s: pip install bm25s") from None
    if not 0 < negatives <= depth - skip or skip < 0:
        raise InputError(f"--negatives {negatives} cannot be drawn from places {skip} to {depth}")
    epath.Path(output).parent.mkdir(parents=True, exist_ok=True)
    root = epath.Path(data)
    documents = list(read_corpus(find_file(root / "corpus.jsonl")))
    queries = read_queries(find_file(root / "queries.jsonl"))
    qrels = read_qrels(find_file(root / "qrels" / f"{split}.tsv"))
    texts = {document.id: document.text for document in documents}
    relevant = {
        query: [document for document, grade in grades.items() if grade > 0 and document in texts]
        for query, grades in qrels.items()
        if query in queries
    }
    relevant = {query: found for query, found in relevant.items() if found}
    if not relevant:
        raise InputError(f"{data}: no query of split {split!r} has a relevant document")
    index = bm25s.BM25(k1=0.9, b=0.4)
    index.index(bm25s.tokenize(list(texts.values()), show_progress=False), show_progress=False)
    draw = np.random.default_rng(seed)
    ids = list(texts)
    examples = []
    for query, positives in tqdm(relevant.items(), desc="mining", unit="query", delay=1, disable=None):
        words = bm25s.tokenize(queries[query], show_progress=False)
        count = min(len(ids), depth + len(positives))
        places, scores = index.retrieve(words, k=count, show_progress=False)
        found = [ids[place] for place, score in zip(places[0], scores[0], strict=True) if score > 0]
        pool = [document for document in found if document not in positives][skip:depth]
        if len(pool) < negatives:
            # A query whose words hardly occur: any document will do.
            others = [document for document in ids if document not in positives and document not in pool]
            missing = min(negatives - len(pool), len(others))
            pool += [others[place] for place in draw.choice(len(others), missing, replace=False)]
        for positive in positives:
            chosen = draw.choice(len(pool), min(negatives, len(pool)), replace=False)
            examples.append(
                {
                    "query": queries[query],
                    "positive": texts[positive],
                    "negatives": [texts[pool[place]] for place in chosen],
                }
            )
    write_jsonl(output, examples)
    print(f"{len(examples):,} examples of {len(relevant):,} queries: {output}")
