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


def portions(texts: Sequence[str], tokens: int, max_length: int, prompt_length: int = 0) -> list[range]:
    """Which texts are in which portion: every k-th, so that each portion is like all of them, whatever their order.

    Args:
        texts: all texts.
        tokens: of a portion, about.
        max_length: tokens of a text at the most.
        prompt_length: characters that go before each text.

    Returns:
        the indices of each portion's texts; one portion at the least.
    """
    sizes = ((len(text) + prompt_length) // _CHARACTERS_PER_TOKEN + 1 for text in texts)
    count = max(1, min(len(texts), -(-sum(min(size, max_length) for size in sizes) // tokens)))
    return [range(first, len(texts), count) for first in range(count)]


def plan_portions(
    tokenised: Iterable[tuple[range, list[list[int]]]], total: int, packing: Packing
) -> Iterator[Portion]:
    """Joins texts into batches while they come: those of a batch not full wait for the texts after them.

    The minimum length of rows is that which suits the first portion, so that the others need no more programs.

    Args:
        tokenised: for each portion the indices of its texts, and their token ids.
        total: how many texts there are.
        packing: see `plan_texts`.
    """
    ids: list[list[int]] = []
    places: list[int] = []
    arrived = 0
    least = None
    for part, rows in tokenised:
        ids += rows
        places += part
        arrived += len(rows)
        lengths = list(map(len, ids))
        if least is None and arrived < total:
            least = shortest_row(lengths, packing, times=round(total / arrived))
        plans = plan_texts(lengths, packing, least)
        if arrived < total:  # of the batches of one length, all but the last are full
            plans = [plan for plan, after in itertools.pairwise(plans) if plan.length == after.length]
        if not plans:
            continue
        yield Portion(ids, np.array(places), plans)
        gone = {text for plan in plans for text in plan.texts}
        places = [place for text, place in enumerate(places) if text not in gone]
        ids = [row for text, row in enumerate(ids) if text not in gone]
