"""What the decoder's programs compute at a time: rows of tokens, and the tokens that are to be predicted."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens. Each row holds one text or several, or a prefix and the texts that continue it.

    Attributes:
        input_ids: int32 [R, T].
        positions: int32 [R, T], from 0 in each text, or going on from the prefix.
        segments: int32 [R, T]: 1, 2, ... for the texts of a row; 0 for the prefix that all of them see; -1 for padding.
            A token sees its own segment and the prefix.
        dropout_keys: typed random keys [R] to train with the config's dropout, or None.
    """

    input_ids: Any
    positions: Any
    segments: Any
    dropout_keys: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """Tokens to be predicted, and from which hidden states; for each of the W shards of a batch's rows.

    Attributes:
        states: int32 [W, M]: index of the hidden state that predicts, in the shard's R / W rows flattened to
            [R / W * T].
        token_ids: int32 [W, M]: the token to be predicted; -1 where there is none, which is after all others.
    """

    states: Any
    token_ids: Any
