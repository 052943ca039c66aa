"""The `score` head of a classifier, which is no part of the decoder."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sgpt_jax.checkpoint.tensors import TensorFiles
from sgpt_jax.errors import InputError

NAME = "score.weight"


class WithoutScoreHead:
    """A checkpoint without its `score` head, which is kept.

    Args:
        files: the checkpoint, adapters merged.
    """

    def __init__(self, files: TensorFiles):
        self.files, self.config = files, files.config
        self.encoded, self.most_values = files.encoded, files.most_values
        self._head: np.ndarray | None = None

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """All tensors but the head."""
        for name, tensor in self.files.tensors():
            if name == NAME:
                self._head = np.array(tensor, np.float32)
            else:
                yield name, tensor

    def head(self) -> np.ndarray:
        """The head of one label, float32 [E].

        Raises:
            InputError: there is none, or it has several labels.
        """
        if self._head is None:  # the decoder may have come from the cache of decoded weights
            for _ in self.tensors():
                pass
        if self._head is None:
            raise InputError(f"the checkpoint has no {NAME}, with which it would score")
        if self._head.ndim != 2 or self._head.shape[0] != 1:
            raise InputError(f"{NAME} is {list(self._head.shape)}: a re-ranker's is [1, dimension]")
        return self._head[0]
