"""Log-probabilities of given tokens, without ever holding the logits of all of them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sgpt_jax.decoder.model import Decoder, merge
from sgpt_jax.decoder.sharding import on_mesh

# The head's working set is [positions, entries] of float32, whatever text length and vocabulary are: 8 MiB on a CPU,
# where it should stay in the caches, and 64 MiB where every step of a loop costs the launch of its programs.
HEAD_POSITIONS = {"cpu": 256, "gpu": 2048, "tpu": 2048}
HEAD_ENTRIES = 8192

Carry = tuple[jax.Array, jax.Array, jax.Array]


@functools.partial(jax.jit, static_argnames=("graphdef", "positions_block", "entries_block", "mesh"))
def score_tokens(
    graphdef: Any,
    params: Any,
    input_ids: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    slots: jax.Array,
    targets: jax.Array,
    blocks: jax.Array,
    *,
    positions_block: int,
    entries_block: int,
    mesh: Mesh | None,
) -> jax.Array:
    """Log-probabilities of the targets of a `packing.Pass`.

    The head runs at those places only, block by block of places and of the vocabulary, so that neither [B, T, V] nor
    [M, V] ever exists. How many blocks of places there are is traced: programs differ by [B, T] alone.

    Args:
        graphdef, params: from `decoder.split`.
        input_ids, positions, segments: int32 [B, T].
        slots, targets: int32 [W, M].
        blocks: int32 [], how many blocks of the M are in use.
        positions_block: places a block; divides M.
        entries_block: vocabulary entries a block; at most V.
        mesh: what the arrays lie on.

    Returns:
        float32 [W, M]; 0 beyond the blocks in use.
    """
    decoder = merge(graphdef, params)
    with on_mesh(mesh):
        hidden = decoder(input_ids, segments >= 0, positions=positions, segments=segments)
    hidden = hidden.reshape(slots.shape[0], -1, hidden.shape[-1])  # [W, B / W * T, E]

    def score_block(block: jax.Array, scores: jax.Array) -> jax.Array:
        start = block * positions_block
        here = jax.lax.dynamic_slice_in_dim(slots, start, positions_block, axis=1)
        wanted = jax.lax.dynamic_slice_in_dim(targets, start, positions_block, axis=1)
        states = jnp.take_along_axis(hidden, here[:, :, None], axis=1)  # [W, positions_block, E]
        found = _target_log_probs(decoder, states, wanted, entries_block)
        return jax.lax.dynamic_update_slice_in_dim(scores, found, start, axis=1)

    scores = jax.lax.fori_loop(0, blocks, score_block, jnp.zeros(slots.shape, jnp.float32))
    if mesh is not None:
        scores = jax.lax.with_sharding_constraint(scores, NamedSharding(mesh, PartitionSpec()))
    return scores


def _target_log_probs(decoder: Decoder, states: jax.Array, targets: jax.Array, entries: int) -> jax.Array:
    """Log-softmax of the head at one entry each: states [..., E], targets int32 [...] to float32 [...]."""
    size = decoder.config.vocab_size

    def add_block(carry: Carry, block: jax.Array) -> tuple[Carry, None]:
        highest, total, target_logit = carry
        # The last block reaches back, so that it is as wide as the others; what it repeats counts once.
        start = jnp.minimum(block * entries, size - entries)
        logits = decoder.head_block(states, start, entries)  # [..., entries]
        logits = jnp.where(start + jnp.arange(entries) < block * entries, -jnp.inf, logits)
        new_highest = jnp.maximum(highest, logits.max(axis=-1))
        total = total * jnp.exp(highest - new_highest) + jnp.exp(logits - new_highest[..., None]).sum(axis=-1)
        inside = (targets >= block * entries) & (targets < start + entries)
        place = jnp.clip(targets - start, 0, entries - 1)
        logit = jnp.take_along_axis(logits, place[..., None], axis=-1)[..., 0]
        return (new_highest, total, jnp.where(inside, logit, target_logit)), None

    first = jnp.full(targets.shape, -jnp.inf, jnp.float32)
    zero = jnp.zeros(targets.shape, jnp.float32)
    (highest, total, logit), _ = jax.lax.scan(add_block, (first, zero, zero), jnp.arange(-(-size // entries)))
    return logit - highest - jnp.log(total)
