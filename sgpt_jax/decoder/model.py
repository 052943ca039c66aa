"""The one decoder: embedding, blocks, head. Families differ by their `DecoderConfig` only."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sgpt_jax.decoder.block import Block, Context, View, make_context
from sgpt_jax.decoder.build import Build
from sgpt_jax.decoder.cache import Cache, GrowingCache
from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.decoder.layers import ACTIVATIONS, Dropout, Linear, Norm, TokenTable, softcap
from sgpt_jax.decoder.matmul import matmul
from sgpt_jax.decoder.positions import positions_from_mask
from sgpt_jax.decoder.program import usual_promotion
from sgpt_jax.decoder.sharding import by_rows
from sgpt_jax.errors import InputError
from sgpt_jax.runtime.forks import check_fork


class Embed(nnx.Module):
    """Token ids to the first hidden states."""

    def __init__(self, config: DecoderConfig, build: Build):
        self.offset = config.position_offset
        self.scale, self.dropout_rate = config.embed_scale, config.embed_dropout
        self.tokens = TokenTable(config.vocab_size, config.hidden_dim, build=build)
        self.project_in = (
            Linear(config.token_dim, config.embed_dim, bias=False, build=build) if config.token_dim else None
        )
        rows = (config.max_positions or 0) + config.position_offset
        self.positions = (
            TokenTable(rows, config.embed_dim, build=build, quantised=False)
            if config.positions == "learned"
            else None
        )
        self.norm = Norm((config.embed_dim,), config, dtype=build.dtype) if config.embed_norm else None

    def __call__(self, ids: jax.Array, positions: jax.Array, dropout: Dropout | None) -> jax.Array:
        x = self.tokens(ids)  # [B, T, E]
        if self.scale != 1:
            x = x * jnp.asarray(self.scale, x.dtype)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.positions is not None:
            x = x + self.positions(positions + self.offset)
        if self.norm is not None:
            x = self.norm(x)
        return x if dropout is None else dropout(x, self.dropout_rate, 0)


class Head(nnx.Module):
    """The parts of the language-model head that are not the embedding: kernel and bias, and what comes before them.

    The transform, a linear layer, GELU and a norm, is ModernBERT's.
    """

    def __init__(self, config: DecoderConfig, build: Build):
        size, make = config.hidden_dim, functools.partial(Linear, build=build)
        untied = make(size, config.vocab_size, bias=False) if config.head == "untied" else None
        self.kernel = None if untied is None else untied.kernel
        self.scale = None if untied is None else untied.scale
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,), build.dtype)) if config.head_bias else None
        self.linear = make(size, size, bias=config.head_linear_bias) if config.head_transform else None
        self.norm = Norm((size,), config, dtype=build.dtype) if config.head_transform else None

    def transform(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., E] to what the kernel is applied to."""
        if self.linear is None or self.norm is None:
            return hidden
        return self.norm(ACTIVATIONS["gelu"](self.linear(hidden).astype(jnp.float32)))


class Decoder(nnx.Module):
    """A GPT decoder: token ids to hidden states, hidden states to logits.

    Attributes:
        config: its `DecoderConfig`.
        build: how its layers are made, without `rngs`.
        dtype: compute dtype of matmuls and hidden states; norms, softmax, rotary angles and logits are
            float32 whatever it is.
    """

    def __init__(self, config: DecoderConfig, build: Build):
        self.config, self.build, self.dtype = config, dataclasses.replace(build, rngs=None), build.dtype
        self.embed = Embed(config, build)
        self.blocks = nnx.List([Block(config, i, build) for i in range(config.num_layers)])
        self.final_norm = Norm((config.embed_dim,), config, dtype=build.dtype) if config.final_norm else None
        self.project_out = (
            Linear(config.embed_dim, config.token_dim, bias=False, build=build) if config.token_dim else None
        )
        has_head = config.head == "untied" or (
            config.head == "tied" and (config.head_bias or config.head_transform)
        )
        self.head = Head(config, build) if has_head else None

    def __repr__(self) -> str:
        c = self.config
        mask = ", bidirectional" if c.bidirectional else ""
        return (
            f"Decoder({c.num_layers} layers{mask}, {c.num_heads} heads ({c.num_kv_heads} key/value), "
            f"dimension {c.embed_dim}, MLP {c.mlp_dim}, vocabulary {c.vocab_size}, {self.dtype.name})"
        )

    @usual_promotion()
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm, of texts in a row each (`attention_mask`) or of packed rows (`segments`).

        Args:
            input_ids: int [B, T]. While a function is traced, ids outside the vocabulary are the caller's to refuse
                (`text.check_ids`), as a look-up would be clamped.
            attention_mask: int or bool [B, T], non-zero at valid tokens; padding on any side.
            positions: int [B, T]; by default counted along the valid tokens.
            segments: int [B, T], in place of a mask, see `Batch`; needs positions.
            dropout_keys: typed random keys [B], one a row, to train with the config's dropout; None for none.

        Returns:
            [B, T, E] in the compute dtype; what stands at padding is finite and has no meaning.

        Raises:
            ValueError: when there are both a mask and segments, or neither; when no positions are given and T exceeds
                those that a decoder with learned positions has.
            InputError: an id or a position, of arrays with values, is outside the model's.
        """
        check_fork()
        config = self.config
        _check_range(input_ids, config.vocab_size, "token id", "embeddings")
        if (attention_mask is None) == (segments is None):
            raise ValueError("the decoder takes either an attention mask or segments")
        if segments is None:
            assert attention_mask is not None
            segments = jnp.where(attention_mask != 0, 0, -1)
        if positions is None:
            if config.positions == "learned" and input_ids.shape[1] > (config.max_positions or 0):
                raise ValueError(
                    f"{input_ids.shape[1]} tokens, but the model has {config.max_positions} positions"
                )
            positions = positions_from_mask(segments >= 0)
        elif config.positions == "learned":
            _check_range(positions, config.max_positions or 0, "position", "positions")
        dropout = None if dropout_keys is None else Dropout(dropout_keys)
        return self._run(input_ids, positions, make_context(config, segments, positions, dropout))

    @usual_promotion()
    def extend(
        self,
        input_ids: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        cache: Cache,
        start: jax.Array | int,
    ) -> tuple[jax.Array, Cache]:
        """Hidden states of tokens that continue the texts in a cache, one in each row, and the cache with them.

        Args:
            input_ids: int [B, T].
            positions: int [B, T], of the tokens in their texts.
            valid: bool [B, T]; False is padding, on any side.
            cache: of these rows, with T slots free from `start` on.
            start: the slot of the first of the T tokens; may be traced. Slots are filled in order.

        Returns:
            [B, T, E] as `__call__` gives them for the whole texts, and the new cache.

        Raises:
            ValueError: the decoder is bidirectional: what was read before would change.
        """
        if self.config.bidirectional:
            raise ValueError("a bidirectional decoder cannot continue a text")
        growing = GrowingCache(cache, start, positions, valid)
        context = make_context(self.config, jnp.where(valid, 0, -1), positions, None, growing)
        return self._run(input_ids, positions, context), growing.cache()

    def _run(self, input_ids: jax.Array, positions: jax.Array, context: Context) -> jax.Array:
        """Embedding, blocks and what follows them: [B, T] to [B, T, E]."""
        x = by_rows(self.embed(input_ids, positions, context.dropout))
        for layer, block in enumerate(self.blocks):
            view = context.at(layer)
            if context.cache is None:
                x = _run_block(block, x, view)
            else:
                x = block(x, view, functools.partial(context.cache.add, layer))
            x = by_rows(x)
        if self.final_norm is not None:
            x = self.final_norm(x)
        return x if self.project_out is None else self.project_out(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token logits: hidden states [..., E] to float32 [..., V].

        Raises:
            ValueError: when the checkpoint had no language-model head.
        """
        return self.head_block(hidden, 0, self.config.vocab_size)

    def head_block(self, hidden: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
        """Logits of the `size` vocabulary entries from `start` on: [..., E] to float32 [..., size].

        Args:
            hidden: [..., E].
            start: first entry; may be traced. start + size must not exceed V.
            size: number of entries, static.

        Raises:
            ValueError: when the checkpoint had no language-model head.
        """
        return self._logits(hidden, lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, size, axis))

    def head_entries(self, hidden: jax.Array, entries: jax.Array) -> jax.Array:
        """Logits of some vocabulary entries: [..., E] and int [n] to float32 [..., n].

        Of a head that is sharded over the vocabulary, the entries alone go from device to device.

        Raises:
            ValueError: when the checkpoint had no language-model head.
        """
        return self._logits(hidden, lambda x, axis: jnp.take(x, entries, axis))

    @usual_promotion()
    def _logits(self, hidden: jax.Array, choose: Callable[[jax.Array, int], jax.Array]) -> jax.Array:
        """Logits of the entries that `choose` takes along the vocabulary's axis of an array."""
        if self.config.head == "none":
            raise ValueError("this checkpoint has no language-model head, so it gives vectors but no logits")
        hidden = hidden.astype(self.dtype)
        if self.head is not None:
            hidden = self.head.transform(hidden)
        tokens = self.embed.tokens
        matrix, scale, axis = tokens.embedding, tokens.scale, 0
        if self.head is not None and self.head.kernel is not None:
            matrix, scale, axis = self.head.kernel, self.head.scale, 1
        kernel = choose(matrix[...], axis)
        logits = matmul(hidden, (kernel if axis else kernel.T).astype(self.dtype))
        if scale is not None:
            logits = logits * choose(scale[...], 0)
        if self.head is not None and self.head.bias is not None:
            logits = logits + choose(self.head.bias[...], 0).astype(jnp.float32)
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        return softcap(logits, self.config.logit_softcap)


@jax.jit
def _run_block(block: Block, x: jax.Array, view: View) -> jax.Array:
    """A block's hidden states. Blocks that are alike are traced and lowered once, and inlined by XLA all the same."""
    return block(x, view)


def _check_range(values: jax.Array, size: int, what: str, of_what: str) -> None:
    """Refuses indices below 0 or from `size` on, where their values are at hand: not while a function is traced.

    Raises:
        InputError: naming the first.
    """
    if isinstance(values, jax.core.Tracer) or not getattr(values, "is_fully_addressable", True):
        return
    found = np.asarray(values)
    if wrong := found[(found < 0) | (found >= size)].tolist():
        raise InputError(f"{what} {wrong[0]} is outside the model's {size} {of_what}")


def abstract_decoder(config: DecoderConfig, build: Build) -> tuple[Any, dict]:
    """A decoder without any memory: (structure, params of `jax.ShapeDtypeStruct`), see `split`."""
    return split(nnx.eval_shape(lambda: Decoder(config, build)))


def split(decoder: Decoder) -> tuple[Any, dict]:
    """Takes a decoder apart for pure functions: (structure, params).

    The structure is hashable (a static argument of `jax.jit`); the params are a plain nested dict of arrays, such as
    `params["blocks"][0]["attn"]["q"]["kernel"]`, [in, out]. No two places of a decoder may share a variable.
    """
    leaves, found = jax.tree.flatten(decoder)
    structure, places = _places(found)
    return structure, jax.tree.map(leaves.__getitem__, places)


def merge(structure: Any, params: dict) -> Decoder:
    """The inverse of `split`.

    Raises:
        ValueError: the params are not those of this structure.
    """
    _, places = _places(structure)
    expected: Any = jax.tree.structure(places)
    if expected != jax.tree.structure(params):
        raise ValueError("these parameters belong to a decoder of another structure")
    leaves = [None] * structure.num_leaves
    jax.tree.map(leaves.__setitem__, places, params)
    return jax.tree.unflatten(structure, leaves)


@functools.lru_cache(maxsize=256)
def _places(structure: Any) -> tuple[Any, dict]:
    """Where the leaves of a structure stand in the params.

    Worked out once: `nnx.split` takes ten times as long as all of `split`.

    Returns:
        the first structure that was equal to this one, so that `jax.jit` meets the same object in every call; and the
        params with each leaf's number in its place.
    """
    numbered = jax.tree.unflatten(structure, range(structure.num_leaves))
    return structure, nnx.to_pure_dict(nnx.state(numbered))
