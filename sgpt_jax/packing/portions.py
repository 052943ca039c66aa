"""Texts that are tokenised portion by portion: the device begins with the first while the host goes on with the next.

Were all tokenised first, a GPU would wait for that longer than it computes, where the decoder is small.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sgpt_jax.packing.layout import PlannedBatch
from sgpt_jax.packing.rows import Packing, plan_texts, shortest_row

# Batches of a portion on an accelerator. CPU: tokens of one; there the host's work is a small part, and rows are fuller
# the more texts there are to choose from.
PORTION_BATCHES, CPU_PORTION = 2, 2**18

# A guess, for portions of about one size.
_CHARACTERS_PER_TOKEN = 4


@dataclasses.dataclass(frozen=True)
class Portion:
    """Texts that run together.

    Attributes:
        ids: their token ids.
        places: int [n], their indices among all texts.
        plans: the batches that they run in.
    """

    ids: list[list[int]]
    places: np.ndarray
    plans: list[PlannedBatch]


def cut_into_portions(texts: Sequence[str], tokens: int, max_length: int) -> Iterator[slice]:
    """Where the portions of `texts` are, of about `tokens` tokens each, of at most `max_length` a text."""
    start = size = 0
    for index, text in enumerate(texts):
        size += min(len(text) // _CHARACTERS_PER_TOKEN + 1, max_length)
        if size >= tokens:
            yield slice(start, index + 1)
            start, size = index + 1, 0
    if start < len(texts):
        yield slice(start, len(texts))


def plan_portions(tokenised: Iterable[list[list[int]]], total: int, packing: Packing) -> Iterator[Portion]:
    """Joins texts into batches while they come: those of a batch not full wait for the texts after them.

    The minimum length of rows is that which suits the first portion, so that the others need no more programs.

    Args:
        tokenised: token ids of the texts of each portion.
        total: how many texts there are.
        packing: see `plan_texts`.
    """
    ids: list[list[int]] = []
    places: list[int] = []
    arrived = 0
    least = None
    for portion in tokenised:
        ids += portion
        places += range(arrived, arrived + len(portion))
        arrived += len(portion)
        lengths = list(map(len, ids))
        if least is None and arrived < total:
            least = shortest_row(lengths, packing)
        plans = plan_texts(lengths, packing, least)
        if arrived < total:  # of the batches of one length, all but the last are full
            plans = [plan for plan, after in itertools.pairwise(plans) if plan.length == after.length]
        if not plans:
            continue
        yield Portion(ids, np.array(places), plans)
        gone = {text for plan in plans for text in plan.texts}
        places = [place for text, place in enumerate(places) if text not in gone]
        ids = [row for text, row in enumerate(ids) if text not in gone]
