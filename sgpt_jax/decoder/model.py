"""The one decoder: embedding, attention, MLP, block, decoder. Families differ by their `DecoderConfig` only."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sgpt_jax.decoder.attention import attend, attention_mask_matrix
from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.decoder.layers import MLP, Dropout, Linear, Norm, TokenTable
from sgpt_jax.decoder.matmul import matmul
from sgpt_jax.decoder.positions import alibi_slopes, positions_from_mask, rotary_angles, rotate
from sgpt_jax.decoder.sharding import by_rows


@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares."""

    masks: dict[int | None, jax.Array]  # window -> bool [B, T, T]
    angles: tuple[jax.Array, jax.Array] | None
    alibi: jax.Array | None  # float32 [B, N, 1, T]
    dropout: Dropout | None


class Embed(nnx.Module):
    """Token ids to the first hidden states."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        self.offset = config.position_offset
        self.dropout_rate = config.embed_dropout
        self.tokens = TokenTable(config.vocab_size, config.hidden_dim, dtype=dtype, rngs=rngs)
        self.project_in = (
            Linear(config.token_dim, config.embed_dim, bias=False, dtype=dtype, rngs=rngs)
            if config.token_dim
            else None
        )
        rows = (config.max_positions or 0) + config.position_offset
        self.positions = (
            TokenTable(rows, config.embed_dim, dtype=dtype, rngs=rngs)
            if config.positions == "learned"
            else None
        )
        self.norm = Norm(config.embed_dim, config, dtype=dtype) if config.embed_norm else None

    def __call__(self, ids: jax.Array, positions: jax.Array, dropout: Dropout | None) -> jax.Array:
        x = self.tokens(ids)  # [B, T, E]
        if self.project_in is not None:
            x = self.project_in(x)
        if self.positions is not None:
            x = x + self.positions(positions + self.offset)
        if self.norm is not None:
            x = self.norm(x)
        return x if dropout is None else dropout(x, self.dropout_rate, 0)


class Attention(nnx.Module):
    """Self-attention of one layer."""

    def __init__(self, config: DecoderConfig, layer: int, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        self.config, self.layer = config, layer
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        make = functools.partial(Linear, dtype=dtype, rngs=rngs)
        self.q = make(config.embed_dim, width, bias=config.qkv_bias)
        self.k = make(config.embed_dim, kv_width, bias=config.qkv_bias)
        self.v = make(config.embed_dim, kv_width, bias=config.qkv_bias)
        self.o = make(width, config.embed_dim, bias=config.attn_out_bias)
        self.q_norm = Norm(config.head_dim, config, dtype=dtype, rms=True) if config.qk_norm else None
        self.k_norm = Norm(config.head_dim, config, dtype=dtype, rms=True) if config.qk_norm else None

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        config = self.config
        q, k, v = (part(x).reshape(*x.shape[:2], -1, config.head_dim) for part in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if config.rotary is not None and context.angles is not None:
            q, k = rotate(q, context.angles, config.rotary), rotate(k, context.angles, config.rotary)
        scale = config.attn_scale / (self.layer + 1 if config.scale_by_layer else 1)
        drop = None
        if context.dropout is not None and config.attn_dropout:
            drop = functools.partial(_drop_at, context.dropout, config.attn_dropout, (self.layer, 1))
        mask = context.masks[config.window(self.layer)]
        out = attend(q, k, v, mask, scale=scale, bias=context.alibi, drop=drop)  # [B, T, N, H]
        return self.o(out.reshape(*x.shape[:2], -1))


def _drop_at(dropout: Dropout, rate: float, site: tuple[int, ...], x: jax.Array) -> jax.Array:
    return dropout(x, rate, *site)


class Block(nnx.Module):
    """Attention and MLP with their norms and residual sums."""

    def __init__(self, config: DecoderConfig, layer: int, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        self.config, self.layer = config, layer
        self.norm1 = Norm(config.embed_dim, config, dtype=dtype)
        self.attn = Attention(config, layer, dtype=dtype, rngs=rngs)
        self.norm2 = None if config.shared_norm else Norm(config.embed_dim, config, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        config = self.config
        if config.parallel:
            normed = self.norm1(x)
            for_mlp = normed if self.norm2 is None else self.norm2(x)
            return (
                x
                + self._drop(self.attn(normed, context), context, 2)
                + self._drop(self.mlp(for_mlp), context, 3)
            )
        assert self.norm2 is not None
        if config.post_norm:
            x = self.norm1(x + self._drop(self.attn(x, context), context, 2))
            return self.norm2(x + self._drop(self.mlp(x), context, 3))
        normed = self.norm1(x)
        x = (normed if config.residual_from_norm else x) + self._drop(self.attn(normed, context), context, 2)
        normed = self.norm2(x)
        return (normed if config.residual_from_norm else x) + self._drop(self.mlp(normed), context, 3)

    def _drop(self, x: jax.Array, context: Context, site: int) -> jax.Array:
        if context.dropout is None:
            return x
        return context.dropout(x, self.config.residual_dropout, self.layer, site)


class Decoder(nnx.Module):
    """A GPT decoder: token ids to hidden states, hidden states to logits.

    Attributes:
        config: its `DecoderConfig`.
        dtype: compute dtype of matmuls and hidden states; norms, softmax, rotary angles and logits are
            float32 whatever it is.

    Made with `rngs`, its weights are random; with None they are zeros, for whoever wants the structure only.
    """

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        self.config, self.dtype = config, dtype
        self.embed = Embed(config, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(config, i, dtype=dtype, rngs=rngs) for i in range(config.num_layers)])
        self.final_norm = Norm(config.embed_dim, config, dtype=dtype) if config.final_norm else None
        self.project_out = (
            Linear(config.embed_dim, config.token_dim, bias=False, dtype=dtype, rngs=rngs)
            if config.token_dim
            else None
        )
        self.head = (
            Linear(config.hidden_dim, config.vocab_size, bias=config.head_bias, dtype=dtype, rngs=rngs)
            if config.head == "untied"
            else None
        )

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
            input_ids: int [B, T]. Ids outside the vocabulary are the caller's to refuse (`text.check_ids`).
            attention_mask: int or bool [B, T], non-zero at valid tokens; padding on any side.
            positions: int [B, T]; by default counted along the valid tokens.
            segments: int [B, T], in place of a mask, see `Batch`; needs positions.
            dropout_keys: typed random keys [B], one a row, to train with the config's dropout; None for none.

        Returns:
            [B, T, E] in the compute dtype; what stands at padding is finite and has no meaning.

        Raises:
            ValueError: when there are both a mask and segments, or neither; when no positions are given and T exceeds
                those that a decoder with learned positions has.
        """
        config = self.config
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
        windows = {config.window(layer) for layer in range(config.num_layers)}
        alibi = None
        if config.positions == "alibi":
            alibi = jnp.asarray(alibi_slopes(config.num_heads))[:, None, None] * positions[
                :, None, None, :
            ].astype(jnp.float32)
        context = Context(
            masks={w: attention_mask_matrix(segments, positions, w) for w in windows},
            angles=None if config.rotary is None else rotary_angles(config.rotary, positions),
            alibi=alibi,
            dropout=None if dropout_keys is None else Dropout(dropout_keys),
        )
        x = by_rows(self.embed(input_ids, positions, context.dropout))
        for block in self.blocks:
            x = by_rows(block(x, context))
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
        hidden = hidden.astype(self.dtype)
        bias = None
        if self.head is not None:
            kernel = jax.lax.dynamic_slice_in_dim(self.head.kernel[...], start, size, axis=1)
            if self.head.bias is not None:
                bias = jax.lax.dynamic_slice_in_dim(self.head.bias[...], start, size)
        elif self.config.head == "tied":
            kernel = jax.lax.dynamic_slice_in_dim(self.embed.tokens.embedding[...], start, size, axis=0).T
        else:
            raise ValueError("this checkpoint has no language-model head, so it gives vectors but no logits")
        logits = matmul(hidden, kernel.astype(self.dtype))
        return logits if bias is None else logits + bias.astype(jnp.float32)


def abstract_decoder(config: DecoderConfig, dtype: jnp.dtype) -> tuple[Any, dict]:
    """The decoder's structure without any memory: (graphdef, params of `jax.ShapeDtypeStruct`)."""
    return split(nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=None)))


def split(decoder: Decoder) -> tuple[Any, dict]:
    """Takes a decoder apart for pure functions: (graphdef, params).

    The graphdef is hashable (a static argument of `jax.jit`); the params are a plain nested dict of arrays, such as
    `params["blocks"][0]["attn"]["q"]["kernel"]`, [in, out].
    """
    graphdef, state = nnx.split(decoder)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: Any, params: dict) -> Decoder:
    """The inverse of `split`."""
    return nnx.merge(graphdef, params)
