"""Generation on the device: a pass over the prompts, then token after token from a cache of one shape."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sgpt_jax.decoder.cache import Cache
from sgpt_jax.decoder.model import merge
from sgpt_jax.decoder.program import DecoderProgram
from sgpt_jax.decoder.sharding import on_mesh
from sgpt_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most probable token; otherwise logits are divided by it.
        top_k: only so many of the most probable tokens are drawn.
        top_p: of these only the most probable, until their probabilities, at the temperature, sum to top_p or more.
    """

    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 1:
            raise InputError(f"top_k must be at least 1, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, not {self.top_p}")


GREEDY = Sampling()


def choose(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token of every row.

    Args:
        logits: float32 [B, V].
        keys: typed random keys [B], one a row, so that what a row draws does not depend on the others.
        sampling: how.

    Returns:
        int32 [B].
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    best, tokens = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))  # most probable first
    best = best / sampling.temperature
    shares = jax.nn.softmax(best)
    before = jnp.cumsum(shares, axis=-1) - shares
    # The first stands whatever top_p is: a float32 close to 0 could otherwise leave none.
    drawn_from = (before < sampling.top_p).at[:, 0].set(True)
    drawn = jax.vmap(jax.random.categorical)(keys, jnp.where(drawn_from, best, -jnp.inf))
    return jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)


@DecoderProgram
def read_prefix(structure: Any, params: Any, ids: jax.Array, *, mesh: Mesh | None = None) -> Cache:
    """The cache, of one row, of what all prompts begin with: int32 [1, P], P at least 1."""
    decoder = merge(structure, params)
    with on_mesh(mesh):
        length = ids.shape[1]
        empty = Cache.empty(decoder.config, 1, length, decoder.dtype)
        return decoder.extend(ids, jnp.arange(length)[None], jnp.ones((1, length), bool), empty, 0)[1]


@functools.partial(DecoderProgram, static_argnames=("steps", "sampling"))
def generate_tokens(
    structure: Any,
    params: Any,
    prefix: Cache | None,
    ids: jax.Array,
    lengths: jax.Array,
    seeds: jax.Array,
    stops: jax.Array,
    *,
    steps: int,
    sampling: Sampling,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Continues prompts until each has a token that ends it, or `steps` tokens.

    One program for each shape of `ids`; the loop over tokens is inside it.

    Args:
        structure, params: from `model.split`; the decoder is causal and has a language-model head.
        prefix: what all prompts begin with, from `read_prefix`; None for nothing.
        ids: int32 [B, T], the prompts after the prefix, padded on the left.
        lengths: int32 [B], tokens of each; 0 for a row that is there for the shape alone.
        seeds: uint32 [B]: what a row draws depends on its own seed alone.
        stops: bool [V], tokens that end a text.
        steps: tokens at the most, 1 or more.
        sampling: how tokens are chosen.
        mesh: what the arrays lie on, or None.

    Returns:
        Both [B, steps], replicated: tokens int32, with the one that ends a text and -1 after it; and their
        log-probabilities float32, at temperature 1 over the whole vocabulary, 0 after it.
    """
    decoder = merge(structure, params)
    rows, width = ids.shape
    keys = jax.vmap(jax.random.key)(seeds)

    def add_token(step: Any, hidden: jax.Array, written: Any) -> Any:
        """Chooses the token of a step after hidden states [B, E]."""
        _, done, tokens, log_probs = written
        logits = decoder.logits(hidden)
        chosen = choose(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, step), sampling)
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[:, None], axis=-1)[:, 0]
        tokens = tokens.at[:, step].set(jnp.where(done, -1, chosen))
        log_probs = log_probs.at[:, step].set(jnp.where(done, 0, found))
        return chosen, done | stops[chosen], tokens, log_probs

    def unfinished(state: Any) -> jax.Array:
        step, (_, done, *_), _ = state
        return (step < steps) & ~done.all()

    def go_on(state: Any) -> Any:
        step, written, cache = state
        # Rows that are done go on too, to no effect: shapes stay as they are.
        hidden, cache = decoder.extend(
            written[0][:, None],
            (before + lengths + step - 1)[:, None],
            jnp.ones((rows, 1), bool),
            cache,
            before + width + step - 1,
        )
        return step + 1, add_token(step, hidden[:, 0], written), cache

    with on_mesh(mesh):
        before = 0 if prefix is None else prefix.valid.shape[1]
        slots = width + steps - 1  # the last token is not read
        if prefix is None:
            cache = Cache.empty(decoder.config, rows, slots, decoder.dtype)
        else:
            cache = prefix.repeated(rows, slots)
        own = jnp.arange(width)[None] - (width - lengths)[:, None]  # index in the prompt; negative at padding
        hidden, cache = decoder.extend(ids, before + jnp.maximum(own, 0), own >= 0, cache, before)
        nothing = (
            jnp.zeros(rows, jnp.int32),
            lengths == 0,
            jnp.full((rows, steps), -1, jnp.int32),
            jnp.zeros((rows, steps), jnp.float32),
        )
        state = (jnp.int32(1), add_token(0, hidden[:, -1], nothing), cache)
        _, (_, _, tokens, log_probs), _ = jax.lax.while_loop(unfinished, go_on, state)
    if mesh is not None:
        tokens, log_probs = jax.lax.with_sharding_constraint(
            (tokens, log_probs), NamedSharding(mesh, PartitionSpec())
        )
    return tokens, log_probs
