"""Log-probabilities of given tokens, without ever holding the logits of all of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sgpt_jax.decoder.batch import Batch, Targets
from sgpt_jax.decoder.model import Decoder, merge
from sgpt_jax.decoder.program import DecoderProgram
from sgpt_jax.decoder.sharding import on_mesh, platform

# The head computes this many targets and vocabulary entries at a time, float32 [targets, entries]: 64 MiB on an
# accelerator, where every step of a loop costs the launch of its kernels. CPU: 8 MiB, which should stay in the caches.
HEAD_TARGETS, CPU_HEAD_TARGETS = 2048, 256
HEAD_ENTRIES = 8192

Carry = tuple[jax.Array, jax.Array, jax.Array]


@DecoderProgram
def score_tokens(
    structure: Any, params: Any, batch: Batch, targets: Targets, *, mesh: Mesh | None
) -> jax.Array:
    """Log-probabilities of the targets.

    The head runs at the states that predict one, block by block of targets and of the vocabulary, so that neither
    [R, T, V] nor [M, V] ever exists (a vocabulary that is sharded is one block). The number of blocks of targets is
    decided at run time: one program serves all batches of a shape.

    Args:
        structure, params: from `model.split`.
        batch: R rows.
        targets: W divides R; [W, M].
        mesh: the mesh of the arrays; None for one device.

    Returns:
        float32 [W, M], replicated; without meaning where there is no target.
    """
    decoder = merge(structure, params)
    with on_mesh(mesh):
        hidden = decoder(batch.input_ids, positions=batch.positions, segments=batch.segments)
        size = head_targets()
    shards, most = targets.token_ids.shape
    hidden = hidden.reshape(shards, -1, hidden.shape[-1])  # [W, R / W * T, E]
    # Every block of a sharded vocabulary would be an all-gather of its own, so all of it is one block.
    sharded = mesh is not None and mesh.shape["tensor"] > 1
    vocab_size = decoder.config.vocab_size
    entries = vocab_size if sharded else min(HEAD_ENTRIES, vocab_size)
    padding = ((0, 0), (0, -most % size))
    states = jnp.pad(targets.states, padding)
    token_ids = jnp.pad(targets.token_ids, padding, constant_values=-1)

    def score_block(block: jax.Array, scores: jax.Array) -> jax.Array:
        start = block * size
        here = jax.lax.dynamic_slice_in_dim(states, start, size, axis=1)
        wanted = jax.lax.dynamic_slice_in_dim(token_ids, start, size, axis=1)
        chosen = jnp.take_along_axis(hidden, here[:, :, None], axis=1)  # [W, size, E]
        found = target_log_probs(decoder, chosen, wanted, entries)
        return jax.lax.dynamic_update_slice_in_dim(scores, found, start, axis=1)

    count = (token_ids >= 0).sum(axis=1).max()
    scores = jax.lax.fori_loop(0, -(-count // size), score_block, jnp.zeros(states.shape, jnp.float32))[
        :, :most
    ]
    if mesh is not None:
        scores = jax.lax.with_sharding_constraint(scores, NamedSharding(mesh, PartitionSpec()))
    return scores


def head_targets() -> int:
    """Targets that the head is computed for at a time, on the platform that is traced for."""
    return CPU_HEAD_TARGETS if platform() == "cpu" else HEAD_TARGETS


def target_log_probs(decoder: Decoder, states: jax.Array, targets: jax.Array, entries: int) -> jax.Array:
    """Log-softmax of the head at one vocabulary entry for each state.

    Args:
        decoder: with a language-model head.
        states: hidden states [..., E].
        targets: int32 [...].
        entries: vocabulary entries computed at a time, at most V.

    Returns:
        float32 [...].
    """
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
        entry = jnp.clip(targets - start, 0, entries - 1)
        logit = jnp.take_along_axis(logits, entry[..., None], axis=-1)[..., 0]
        return (new_highest, total, jnp.where(inside, logit, target_logit)), None

    first = jnp.full(targets.shape, -jnp.inf, jnp.float32)
    zero = jnp.zeros(targets.shape, jnp.float32)
    (highest, total, logit), _ = jax.lax.scan(add_block, (first, zero, zero), jnp.arange(-(-size // entries)))
    return logit - highest - jnp.log(total)
