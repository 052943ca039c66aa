"""Scores that are read at one token of a text: logits of a few vocabulary entries, or a classifier's head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sgpt_jax.decoder.batch import Batch
from sgpt_jax.decoder.matmul import matmul
from sgpt_jax.decoder.model import merge
from sgpt_jax.decoder.program import DecoderProgram
from sgpt_jax.decoder.sharding import on_mesh


@DecoderProgram
def read_scores(
    structure: Any,
    params: Any,
    batch: Batch,
    tokens: jax.Array,
    readout: jax.Array,
    *,
    mesh: Mesh | None,
) -> jax.Array:
    """The scores of packed rows, before any activation.

    Of the language-model head, one or two columns are computed, at the tokens that are read alone.

    Args:
        structure, params: from `model.split`.
        batch: R rows, without prefixes.
        tokens: int32 [R, S]: for each of a row's S texts the token in the row at which its score is read.
        readout: int32 [1] or [2], a vocabulary entry whose logit is the score, and one whose logit is taken from it;
            or float32 [E], a classifier's head without bias.
        mesh: what the arrays lie on, or None.

    Returns:
        float32 [R, S], replicated; without meaning where there is no text.

    Raises:
        ValueError: for vocabulary entries of a checkpoint without a language-model head.
    """
    decoder = merge(structure, params)
    with on_mesh(mesh):
        hidden = decoder(batch.input_ids, positions=batch.positions, segments=batch.segments)
        states = jnp.take_along_axis(hidden, tokens[:, :, None], axis=1)  # [R, S, E]
        if jnp.issubdtype(readout.dtype, jnp.floating):
            scores = matmul(states.astype(jnp.float32), readout[:, None])[..., 0]
        else:
            logits = decoder.head_entries(states, readout)
            scores = logits[..., 0] - logits[..., 1] if len(readout) == 2 else logits[..., 0]
    if mesh is not None:
        scores = jax.lax.with_sharding_constraint(scores, NamedSharding(mesh, PartitionSpec()))
    return scores
