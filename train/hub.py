"""Training examples from a data set of the Hugging Face hub, memory-mapped: a process reads the rows of its batches.

The position in the data is the step's number, as of any other source, so that a run resumes from it.
"""

from __future__ import annotations

import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.files.columns import EXAMPLE
from sgpt_jax.files.hub_tables import Rows

from .data import Example, examples_of, text_key


class HubExamples:
    """The examples of a table: each positive of a row makes one, as in `train.data.read_pairs`.

    Args:
        source: of the hub, see `sgpt_jax.files.hub_tables`.
        split: which split.
        negatives: use at most that many of an example's negatives; None uses all.

    Raises:
        InputError: it cannot be had, or its columns are not those of examples.
    """

    def __init__(self, source: str, split: str | None = None, negatives: int | None = None) -> None:
        self._rows, self._source, self._most = Rows(source, split), source, negatives
        if not len(self._rows):
            raise InputError(f"{source}: holds no examples")
        counts = {}
        for column in self._rows.columns:
            field = EXAMPLE.field(column)
            if field in ("positive", "negatives"):
                lengths = self._rows.lengths(column)
                counts[field, column] = (
                    np.ones(len(self._rows), np.int64) if lengths is None else np.array(lengths)
                )
        positives = [count for (field, _), count in counts.items() if field == "positive"]
        # An example is known by its row and the number of its positive there.
        self._ends = np.cumsum(positives[0] if positives else np.ones(len(self._rows), np.int64))
        found = sum(
            (count for (field, _), count in counts.items() if field == "negatives"), np.zeros(1, np.int64)
        )
        most = int(found.max())
        self.negatives = most if negatives is None else min(most, negatives)
        self.get(0, 0)  # columns that are no example's show now

    def __len__(self) -> int:
        return int(self._ends[-1])

    def get(self, index: int, epoch: int) -> Example:
        row = int(np.searchsorted(self._ends, index, side="right"))
        try:
            examples = examples_of(EXAMPLE.of_object(self._rows[row]))
        except ValueError as error:
            columns = ", ".join(self._rows.columns)
            raise InputError(f"{self._source}, row {row}: {error} (columns: {columns})") from None
        first = int(self._ends[row - 1]) if row else 0
        if len(examples) != int(self._ends[row]) - first:
            raise InputError(f"{self._source}, row {row}: a positive is missing")
        return examples[index - first].with_negatives(self._most)

    def keys(self, index: int, epoch: int) -> tuple[int, ...]:
        query, positive, negatives, _ = self.get(index, epoch)
        return tuple(text_key(text) for text in (query, positive, *negatives))

    def digest(self) -> str:
        return self._rows.fingerprint
