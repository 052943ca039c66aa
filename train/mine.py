"""Hard negatives from BM25: the documents that a query's words find and that nobody judged relevant."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from etils import epath

from sgpt_jax.bm25 import Bm25
from sgpt_jax.errors import InputError
from sgpt_jax.files.beir import DataSet
from sgpt_jax.files.lines import write_jsonl
from sgpt_jax.runtime.progress import progress


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

    The negatives are drawn from the ranks `skip` to `depth` of the query's BM25 ranking (that of evaluation, see
    `sgpt_jax.bm25`), without the documents judged relevant.

    Raises:
        InputError: the data are not as they should be.
    """
    if not 0 < negatives <= depth - skip or skip < 0:
        raise InputError(f"--negatives {negatives} cannot be drawn from ranks {skip} to {depth}")
    epath.Path(output).parent.mkdir(parents=True, exist_ok=True)
    folder = DataSet("", epath.Path(data), split).load()
    documents = list(folder.documents())
    texts = {document.id: document.text for document in documents}
    relevant = {
        query: [id for id, grade in folder.qrels[query].items() if grade > 0 and id in texts]
        for query in folder.queries
    }
    relevant = {query: found for query, found in relevant.items() if found}
    if not relevant:
        raise InputError(f"{data}: no query of split {split!r} has a relevant document")
    index = Bm25(documents)
    draw = np.random.default_rng(seed)
    examples = []
    with progress("mining", "query", len(relevant)) as bar:
        for query, positives in relevant.items():
            text = folder.queries[query]
            found = index.candidates(text, depth + len(positives))
            pool = [id for id in found if id not in positives][skip:depth]
            if len(pool) < negatives:
                # A query whose words hardly occur: any document will do.
                others = [id for id in texts if id not in positives and id not in pool]
                missing = min(negatives - len(pool), len(others))
                pool += [others[row] for row in draw.choice(len(others), missing, replace=False)]
            for positive in positives:
                chosen = draw.choice(len(pool), min(negatives, len(pool)), replace=False)
                examples.append(
                    {
                        "query": text,
                        "positive": texts[positive],
                        "negatives": [texts[pool[row]] for row in chosen],
                    }
                )
            bar.update()
    write_jsonl(output, examples)
    print(f"{len(examples):,} examples of {len(relevant):,} queries: {output}")
